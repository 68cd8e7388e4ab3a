"""Prediction: a stream of records in the order of the inputs, one a picture, whatever becomes of it."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mvcr_cli import weights
from mvcr_cli.checkpoint import Checkpoint, load_bare
from mvcr_cli.config import Device, PredictConfig
from mvcr_cli.data.folder import iter_images
from mvcr_cli.data.images import load_picture
from mvcr_cli.data.loader import ordered
from mvcr_cli.data.preprocess import Preprocess
from mvcr_cli.data.tiles import open_picture, stack_tiles
from mvcr_cli.engine import (
    EXPORT_SUFFIXES,
    RUNS,
    Say,
    Track,
    default_workers,
    find_run,
    pick_device,
    run_directory,
    say_nothing,
    silent,
)
from mvcr_cli.engine.evaluate import probabilities_of, tile_reader
from mvcr_cli.engine.explain import (
    draw_tiles,
    draw_views,
    for_panel,
    prepare_folder,
    refuse_among,
    save,
    says,
    seen_views,
)
from mvcr_cli.engine.rundir import refuse_in_data
from mvcr_cli.engine.verdict import Ready, Verdict
from mvcr_cli.engine.views import network_looking
from mvcr_cli.engine.zoom_step import Glimpse, look
from mvcr_cli.errors import BadImage, InputMissing, MvcrError, NotPermitted, Unavailable, UsageError
from mvcr_cli.models import build, config_for, load_trunk
from mvcr_cli.models.mvcr import MultiScaleResNet
from mvcr_cli.models.zoom import ZoomResNet
from mvcr_cli.paths import display_name
from mvcr_cli.records import Label, Prediction, Problem, Tile

IMAGENET_MODEL = "mvcr18"
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


class Predictor(Protocol):
    """A network ready to judge pictures, whatever runs it."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def size(self) -> int:
        """Side in pixels of the network's input."""

    def at_once(self, batch: int) -> int:
        """How many pictures to hold ready and judge at once, `batch` or fewer where they are large in memory."""

    def read(self, path: str) -> Ready:
        """One picture, ready for `judge`; called in a reader thread. Raises: BadImage."""

    def judge(self, group: list[Ready]) -> list[Verdict]: ...


def predict(config: PredictConfig, *, stdin: Iterable[bytes] = (), track: Track = silent,
            say: Say = say_nothing) -> Iterator[Prediction | Problem]:  # fmt: skip
    """Records in input order; a bad input becomes a `Problem` and the rest goes on.

    Names that come through a pipe are answered one by one, so that a slow producer gets each answer at once.

    Args:
        stdin: lines with file names, read when an input is "-".

    Raises: InputMissing when there is no model; CheckpointError when it cannot be used.
    """
    predictor = open_predictor(config, say)
    if config.explain is not None:
        prepare_folder(config.explain, _named(config.inputs))
        stdin = _apart(stdin, config.explain)
    piped = "-" in config.inputs
    batch = 1 if piped else predictor.at_once(config.batch)
    workers = max(1, default_workers(config.workers))
    total = None if any(map(_is_many, config.inputs)) else len(config.inputs)
    inputs = track(expand(config.inputs, stdin), total=total, label="predicting")
    read = ordered(lambda entry: _read(entry, predictor), inputs, workers, 0 if piped else 2 * batch)
    group: list[Ready] = []
    first = True  # the first picture goes alone, so that a reader sees a record at once
    for _, item in read:
        if isinstance(item, Problem):
            yield from _judge(group, predictor, config.topk, config.explain)
            group = []
            yield item
            continue
        group.append(item)
        if first or len(group) == batch:
            yield from _judge(group, predictor, config.topk, config.explain)
            group, first = [], False
    yield from _judge(group, predictor, config.topk, config.explain)


def expand(inputs: Iterable[str], stdin: Iterable[bytes]) -> Iterator[str | Problem]:
    """Files, folders, glob patterns and "-" as single files, in order."""
    for entry in inputs:
        if entry == "-":
            names = (os.fsdecode(line.rstrip(b"\r\n")) for line in stdin)
            yield from (name for name in names if name)
        elif os.path.isdir(entry):
            yield from _folder(entry)
        elif _is_pattern(entry):
            found = _matches(entry)
            yield from found
            if not found:
                yield Problem(path=entry, code="missing", detail="the pattern matches no file")
        else:
            yield entry


def _matches(pattern: str) -> list[str]:
    """A pattern means files: `**` also finds every folder on the way to them."""
    files = (name for name in glob.iglob(pattern, recursive=True) if not os.path.isdir(name))
    return sorted(files, key=os.fsencode)


def _named(inputs: Iterable[str]) -> Iterator[str]:
    """Files and folders that are named before anything is read."""
    for entry in inputs:
        if entry != "-":
            yield from _matches(entry) if _is_pattern(entry) else (entry,)


def _apart(names: Iterable[bytes], folder: Path) -> Iterator[bytes]:
    """The same names, none of a picture that explanations would be written beside. Raises: CannotCreate."""
    for name in names:
        refuse_among(folder, os.fsdecode(name.rstrip(b"\r\n")))
        yield name


def _is_many(entry: str) -> bool:
    """Whether an input may be any number of files."""
    return entry == "-" or os.path.isdir(entry) or _is_pattern(entry)


def _is_pattern(entry: str) -> bool:
    return not os.path.lexists(entry) and glob.has_magic(entry) and not _ADDRESS.match(entry)


def _folder(entry: str) -> Iterator[str | Problem]:
    """The pictures below a folder; a folder that gives none is a record, too."""
    try:
        found = iter_images(Path(entry))
    except NotPermitted:
        yield Problem(path=entry, code="permission", detail="the folder may not be read")
        return
    except (MvcrError, OSError):  # it was there a moment ago
        yield Problem(path=entry, code="missing", detail="no such folder any more")
        return
    empty = True
    for item in found:
        empty = False
        yield item
    if empty:
        yield Problem(path=entry, code="missing", detail="no picture in this folder")


def _read(entry: str | Problem, predictor: Predictor) -> Ready | Problem:
    if isinstance(entry, Problem):
        return entry
    try:
        return predictor.read(entry)
    except BadImage as bad:
        is_address = bad.code == "missing" and _ADDRESS.match(entry)
        detail = "addresses are not fetched; download the picture first" if is_address else bad.detail
        return Problem(path=entry, code=bad.code, detail=detail)


def _judge(group: list[Ready], predictor: Predictor, topk: int, folder: Path | None) -> Iterator[Prediction]:
    if not group:
        return
    for ready, verdict in zip(group, predictor.judge(group), strict=True):
        row = verdict.probabilities
        best = np.argsort(-row, kind="stable")[:topk]
        labels = tuple(Label(label=predictor.classes[index], probability=float(row[index])) for index in best)
        yield Prediction(
            path=ready.path,
            label=labels[0].label,
            probability=labels[0].probability,
            topk=labels,
            width=ready.width,
            height=ready.height,
            tiles=verdict.tiles,
            explanation=None if folder is None or verdict.image is None else save(verdict.image, folder, ready.path),
        )


class TorchPredictor:
    """A checkpoint's network in PyTorch.

    Args:
        explains: give every verdict a picture of what decided.

    Raises: UsageError when the network cannot look or explain so.
    """

    def __init__(self, checkpoint: Checkpoint, device: Device, views: str = "all", *, explains: bool = False) -> None:
        self.classes = checkpoint.classes
        self.size = checkpoint.preprocess.size
        self._preprocess = checkpoint.preprocess
        self._device = pick_device(device)
        network = network_looking(checkpoint, views)
        self._network = network.to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._reader = tile_reader(self._network, self._preprocess, 0)
        self._explains = explains
        if explains and not isinstance(self._network, MultiScaleResNet):
            raise UsageError(
                f"--explain: the model {checkpoint.config.name} has no views to show", "leave --explain out"
            )

    def at_once(self, batch: int) -> int:
        return batch if self._reader is None else self._reader.at_once(batch)

    def read(self, path: str) -> Ready:
        if self._reader is not None:
            with open_picture(path) as picture:
                image, candidates = self._reader.look(picture)
                width, height = picture.size
        else:
            found = load_picture(path, 2 * self.size)
            image, width, height, candidates = found.image, found.width, found.height, None
        x = self._preprocess.tensor(image).numpy()
        return Ready(path, width, height, x, candidates, for_panel(image) if self._explains else None)

    @torch.inference_mode()
    def judge(self, group: list[Ready]) -> list[Verdict]:
        x = torch.from_numpy(np.stack([ready.input for ready in group]))
        if isinstance(self._network, ZoomResNet):
            return self._judge_tiles(self._network, x, group)
        rows = probabilities_of(self._network, x, self._device, torch.float32).numpy()
        if not self._explains:
            return [Verdict(row) for row in rows]
        assert isinstance(self._network, MultiScaleResNet)
        seen = seen_views(self._network, x.to(self._device), rows.argmax(1))
        return [
            Verdict(row, (), draw_views(ready.image, views, row, self.classes, self._preprocess))
            for ready, row, views in zip(group, rows, seen, strict=True)
            if ready.image is not None
        ]

    def _judge_tiles(self, network: ZoomResNet, x: Tensor, group: list[Ready]) -> list[Verdict]:
        candidates = stack_tiles([ready.tiles for ready in group if ready.tiles is not None]).to(self._device)
        found = look(network, x.to(self._device), candidates, self._preprocess)
        rows = found.verdict.logits.float().cpu().double().softmax(-1).numpy()
        tiles = [self._tiles(network, found, number, ready) for number, ready in enumerate(group)]
        return [
            Verdict(row, of, self._drawn(ready, row, of)) for ready, row, of in zip(group, rows, tiles, strict=True)
        ]

    def _drawn(self, ready: Ready, row: NDArray[np.float64], tiles: tuple[Tile, ...]) -> Image.Image | None:
        if ready.image is None:
            return None
        verdict = says(self.classes, best := int(row.argmax()), row[best])
        return draw_tiles(ready.image, tiles, (ready.width, ready.height), verdict)

    def _tiles(self, network: ZoomResNet, found: Glimpse, number: int, ready: Ready) -> tuple[Tile, ...]:
        """The tiles that one picture's verdict rests on, the weightiest first."""
        own = network.fc(found.verdict.features[number]).float().softmax(-1)
        chosen, weights = found.chosen[number].cpu().numpy(), found.verdict.weights[number].cpu().numpy()
        return tile_records(ready, chosen, weights, own.cpu().numpy(), self.classes)


def tile_records(ready: Ready, chosen: NDArray[np.int64], weights: NDArray[np.float32], own: NDArray[np.float32],
                 classes: tuple[str, ...]) -> tuple[Tile, ...]:  # fmt: skip
    """The tiles that a verdict rests on, the weightiest first.

    Args:
        chosen: which candidates they are, (T,).
        own: the verdict of each alone, (T, K).
    """
    assert ready.tiles is not None
    boxes = ready.tiles.boxes[chosen].clip(0, np.array([ready.width, ready.height, ready.width, ready.height]))
    return tuple(
        Tile(
            box=tuple(boxes[index].tolist()),
            weight=float(weights[index]),
            label=classes[int(own[index].argmax())],
            probability=float(own[index].max()),
        )
        for index in np.argsort(-weights, kind="stable").tolist()
    )


def open_predictor(config: PredictConfig, say: Say) -> Predictor:
    """The model of `--run`, else of the newest finished run, else the ImageNet network.

    Raises: InputMissing with the commands that help; CannotCreate when explanations would be written into the run's data.
    """
    if config.run is None and not any(RUNS.glob("*/summary.json")):
        return _predictor(_imagenet(config, say), config)
    path = find_run(config.run)
    if config.run is None:
        say(f"run: {display_name(run_directory(path) or path)}")
    if path.suffix in EXPORT_SUFFIXES:
        from mvcr_cli.engine.onnx_predictor import open_exported

        if config.views != "all":
            raise UsageError(
                f"{display_name(path)} looks through all its views: they are part of an exported file",
                "leave --views out, or name the run",
            )
        if config.explain is not None:
            raise UsageError(
                "--explain needs a run or its weights, not an exported file", "name the run: --run runs/NAME"
            )
        return open_exported(path)
    if config.explain is not None:
        refuse_in_data(run_directory(path), config.explain, "the explanations", "an --explain folder")
    return _predictor(Checkpoint.load(path), config)


def _predictor(checkpoint: Checkpoint, config: PredictConfig) -> TorchPredictor:
    return TorchPredictor(checkpoint, config.device, config.views, explains=config.explain is not None)


def _imagenet(config: PredictConfig, say: Say) -> Checkpoint:
    """The pretrained network as a checkpoint; class names come with torchvision."""
    try:
        tensors = load_bare(weights.pretrained(IMAGENET_MODEL, offline=config.offline, say=say))
    except Unavailable as error:
        raise InputMissing(
            f"there is no finished run below ./runs, and {error.message}",
            "train one: mvcr train DATA   or name one: mvcr predict IMAGE --run runs/NAME",
        ) from error
    from torchvision.models import ResNet18_Weights

    classes = tuple(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
    network = build(config_for(IMAGENET_MODEL, len(classes)), exact=True)
    load_trunk(network, tensors)
    say(f"run: none; using {IMAGENET_MODEL} with ImageNet weights")
    preprocess = Preprocess(size=224)
    return Checkpoint(config=network.config, classes=classes, preprocess=preprocess, tensors=network.state_dict())
