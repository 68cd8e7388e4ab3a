"""A zooming network as three ONNX files side by side, and the predictor that runs them.

    NAME.onnx          the bag: glance `images` uint8 (N, H, W, 3) and tile `features` (N, T, F) -> `probabilities` (N, K),
                       `weights` (N, T) and `tile_probabilities` (N, T, K)
    NAME.encoder.onnx  candidate `tiles` uint8 (N, C, s, s, 3) and their `prior` (N, C) -> `features` (N, T, F) of the best
                       T, and which they are, `chosen` (N, T)
    NAME.finder.onnx   a strip at half size, normalised, (1, 3, h, w) -> `scores` (1, h', w'): the learned proposal

What lies between (reading in strips, SIFT's detector, cutting tiles) is `data.tiles`. `OnnxZoomPredictor` puts the
three together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mvcr_cli.checkpoint import Checkpoint, read_bytes
from mvcr_cli.config import ModelConfig
from mvcr_cli.data.folder import Sample
from mvcr_cli.data.preprocess import Preprocess, PreprocessGraph
from mvcr_cli.data.tiles import MARGIN, TileReader, open_picture
from mvcr_cli.engine.onnx_predictor import Worker, as_probabilities, exported_classes
from mvcr_cli.engine.predict import Predictor, tile_records
from mvcr_cli.engine.verdict import Parity, Ready, Verdict
from mvcr_cli.errors import BadImage, CheckpointError, ConfigMismatch, UsageError
from mvcr_cli.models.zoom import TileScorer, ZoomResNet
from mvcr_cli.paths import display_name

PARTS = ("encoder", "finder")
Files = dict[str, bytes]  # part -> file; "" is the bag


class EncoderGraph(nn.Module):
    """Shape: (N, C, s, s, 3) uint8, (N, C) -> features (N, T, F), chosen (N, T)."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: ZoomResNet, preprocess: Preprocess) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(preprocess.mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(preprocess.std).view(3, 1, 1) * 255, persistent=False)

    def forward(self, tiles: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        zoom = self.network.zoom
        side = zoom.tile_px + 2 * MARGIN
        x = (tiles.permute(0, 1, 4, 2, 3).float() - self.mean) / self.std
        bags = x.reshape(-1, 3, side, side)
        if zoom.covers:
            features = self.network.encode(bags[..., MARGIN : side - MARGIN, MARGIN : side - MARGIN])
            all_of_them = torch.arange(zoom.tiles) + torch.zeros_like(prior, dtype=torch.int64)
            return features.reshape(-1, zoom.tiles, features.shape[-1]), all_of_them
        scores = self.network.rank(bags, prior.reshape(-1)).reshape(-1, zoom.candidates)
        chosen = scores.topk(zoom.tiles, 1).indices
        flat = x.reshape(-1, zoom.candidates, 3 * side * side)
        picked = flat.gather(1, chosen[..., None].expand(-1, -1, flat.shape[-1])).reshape(-1, 3, side, side)
        inner = picked[..., MARGIN : side - MARGIN, MARGIN : side - MARGIN]
        features = self.network.encode(inner)
        return features.reshape(-1, zoom.tiles, features.shape[-1]), chosen


class BagGraph(nn.Module):
    """Shape: (N, H, W, 3) uint8, (N, T, F) -> (N, K), (N, T), (N, T, K)."""

    def __init__(self, network: ZoomResNet, preprocess: Preprocess) -> None:
        super().__init__()
        self.network, self.preprocess = network, PreprocessGraph(preprocess)

    def forward(self, images: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        glance = self.network(self.preprocess(images))
        bag, weights = self.network.judge_bag(features)
        logits = glance + self.network.beta * (bag - glance)
        return logits.softmax(-1), weights, self.network.fc(features).softmax(-1)


def zoom_files(checkpoint: Checkpoint, onnx_file: Callable[..., bytes]) -> Files:
    """The three files.

    Args:
        onnx_file: (graph, example inputs, input names, output names, dynamic axes) -> an ONNX file with its metadata.
    """
    network = checkpoint.network()
    assert isinstance(network, ZoomResNet)
    zoom, side = network.zoom, network.zoom.tile_px + 2 * MARGIN
    images = torch.randint(0, 256, (2, 61, 47, 3), dtype=torch.uint8)
    tiles = torch.randint(0, 256, (2, zoom.candidates, side, side, 3), dtype=torch.uint8)
    prior = -torch.rand(2, zoom.candidates)
    features = torch.rand(2, zoom.tiles, network.channels[3])
    return {
        "": onnx_file(
            BagGraph(network, checkpoint.preprocess), (images, features), ["images", "features"],
            ["probabilities", "weights", "tile_probabilities"],
            {"images": {0: "N", 1: "H", 2: "W"}, "features": {0: "N"}, "probabilities": {0: "N"}, "weights": {0: "N"},
             "tile_probabilities": {0: "N"}},
        ),
        "encoder": onnx_file(
            EncoderGraph(network, checkpoint.preprocess), (tiles, prior), ["tiles", "prior"], ["features", "chosen"],
            {"tiles": {0: "N"}, "prior": {0: "N"}, "features": {0: "N"}, "chosen": {0: "N"}},
        ),
        "finder": onnx_file(
            network.finder, (torch.rand(1, 3, 64, 80),), ["strip"], ["scores"],
            {"strip": {2: "h", 3: "w"}, "scores": {1: "rows", 2: "columns"}},
        ),
    }  # fmt: skip


def part_path(path: Path, part: str) -> Path:
    """`runs/a.onnx`, "encoder" -> `runs/a.encoder.onnx`."""
    return path.with_suffix(f".{part}.onnx") if part else path


class _Finder:
    """The exported learned proposal where `data.tiles` expects a `SearchScorer`."""

    def __init__(self, graph: Worker, preprocess: Preprocess) -> None:
        self._graph, self._preprocess = graph, preprocess

    def __call__(self, x: Tensor) -> Tensor:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self._preprocess.mean, self._preprocess.std))
        (scores,) = self._graph.run(1, strip=((x - mean) / std).numpy())
        if scores.shape != TileScorer.shape(x.shape):
            raise self._graph.refusal()
        return torch.from_numpy(scores.astype(np.float32))


class OnnxZoomPredictor:
    """Three exported files as a predictor; the records are those of the run."""

    def __init__(self, bag: Worker, encoder: Worker, finder: Worker) -> None:
        facts, self._bag, self._encoder = bag.facts, bag, encoder
        try:
            preprocess = Preprocess.from_dict(facts["preprocess"])
            config = ModelConfig.from_dict(facts["model"])
            self.classes, self.size = exported_classes(bag), preprocess.size
            learned = bool(facts["lessons"])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, UsageError) as error:
            raise CheckpointError(f"{bag.shown} was not exported by mvcr", "export a run with: mvcr export") from error
        if config.zoom is None:
            raise CheckpointError(f"{bag.shown} does not zoom", "export the run again: mvcr export")
        if not facts == encoder.facts == finder.facts:
            raise CheckpointError(
                f"{bag.shown} and the files beside it are not of one export", "export the run again: mvcr export"
            )
        self._zoom = config.zoom
        self._reader = TileReader(config.zoom, preprocess, 0)
        if learned:
            self._reader.search_with(_Finder(finder, preprocess))

    @classmethod
    def from_files(cls, files: Files, shown: str) -> OnnxZoomPredictor:
        return cls(*(Worker(files[part], shown) for part in ("", *PARTS)))

    @classmethod
    def beside(cls, path: Path, bag: Worker) -> OnnxZoomPredictor:
        """Raises: ConfigMismatch when the other two files are missing."""
        others = []
        for part in PARTS:
            other = part_path(path, part)
            if not other.is_file():
                raise ConfigMismatch(
                    f"{display_name(path.name)} needs {display_name(other.name)} beside it",
                    "keep the three files of an export together",
                )
            others.append(Worker(read_bytes(other), display_name(other.name)))
        return cls(bag, *others)

    def at_once(self, batch: int) -> int:
        return self._reader.at_once(batch)

    def read(self, path: str) -> Ready:
        with open_picture(path) as picture:
            glance, tiles = self._reader.look(picture)
            width, height = picture.size
        return Ready(path, width, height, np.array(glance.convert("RGB")), tiles)

    def judge(self, group: list[Ready]) -> list[Verdict]:
        return [self._one(ready) for ready in group]

    def _one(self, ready: Ready) -> Verdict:
        assert ready.tiles is not None
        shape = (*ready.tiles.pixels.shape[:3], 3)
        candidates = np.broadcast_to(ready.tiles.pixels, shape)[None]
        features, chosen = self._encoder.run(2, tiles=candidates, prior=ready.tiles.prior[None])
        places = 1, self._zoom.tiles
        if chosen.shape != places or not np.isin(chosen, np.arange(self._zoom.candidates)).all():
            raise self._encoder.refusal()
        rows, weights, own = self._bag.run(3, images=ready.input[None], features=features)
        row = as_probabilities(rows, len(self.classes), self._bag.shown)
        if weights.shape != places or own.shape != (*places, len(self.classes)):
            raise self._bag.refusal()
        if not np.isfinite(weights).all() or not np.isfinite(own).all():
            raise self._bag.refusal()
        return Verdict(row, tile_records(ready, chosen[0].astype(np.int64), weights[0], own[0], self.classes))


def compare_files(own: Predictor, theirs: Predictor, samples: Iterable[Sample]) -> Parity:
    """What the exported files do beside the run on the same pictures."""
    parity = Parity()
    for sample in samples:
        try:
            ready, other = own.read(sample.path), theirs.read(sample.path)
        except BadImage:
            continue
        (a,), (b,) = own.judge([ready]), theirs.judge([other])
        parity.add(a.probabilities, b.probabilities, (ready.width, ready.height))
    if not parity.sizes:
        raise ConfigMismatch("none of the run's validation pictures can be read", "put them back where they were")
    return parity
