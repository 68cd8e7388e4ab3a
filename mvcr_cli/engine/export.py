"""Export: a file for other programs, checked against the run on real pictures before anybody sees it.

* `onnx`: one file; `images` uint8 (N, H, W, 3) with dynamic N, H and W in, `probabilities` (N, K) out. The resize, the
  normalisation, all views, their fusion and the softmax are inside; class names and preprocessing are in its metadata.
* `torch`: the same graph as a `torch.export` program.
* `safetensors`: the bare trunk with torchvision's names, for tools that load a ResNet state dict.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from mvcr_cli.checkpoint import Checkpoint, pack
from mvcr_cli.config import FORMAT_SUFFIXES, ExportConfig, parse_views
from mvcr_cli.data.folder import Sample
from mvcr_cli.data.images import load_picture
from mvcr_cli.data.preprocess import PreprocessGraph
from mvcr_cli.engine import Say, Track, find_weights, run_directory, say_nothing, silent
from mvcr_cli.engine.evaluate import probabilities_of, validation_split
from mvcr_cli.engine.onnx_predictor import OnnxPredictor, require_onnx
from mvcr_cli.engine.rundir import refuse_in_data
from mvcr_cli.engine.verdict import Parity
from mvcr_cli.engine.views import first_view, through
from mvcr_cli.errors import BadImage, CannotCreate, CheckFailed, ConfigMismatch, UsageError
from mvcr_cli.models import Network
from mvcr_cli.paths import check_creatable, display_name, to_json, write_whole
from mvcr_cli.records import ExportReport

OPSET = 18
# Odd sizes that every check adds to the pictures as they are: tall, wide, tiny, prime.
CHECK_SIZES = (
    (333, 257),
    (97, 501),
    (64, 48),
    (31, 29),
    (1, 50),
    (500, 3),
    (224, 224),
    (640, 427),
    (101, 103),
    (719, 41),
)

Runner = Callable[[NDArray[np.uint8]], NDArray[np.float64]]


class ExportGraph(nn.Module):
    """Pixels in, probabilities out. Shape: (N, H, W, 3) uint8 -> (N, K) float32."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.preprocess = PreprocessGraph(checkpoint.preprocess)
        self.network = checkpoint.network()

    def forward(self, images: Tensor) -> Tensor:
        probabilities: Tensor = self.network(self.preprocess(images)).softmax(-1)
        return probabilities


def export(config: ExportConfig, *, track: Track = silent, say: Say = say_nothing) -> ExportReport:
    """Write the exported file, when it agrees with the run.

    Raises:
        CheckFailed: it does not; no file is written.
        CannotCreate: the file exists and may not be replaced, or would lie in the data of the run.
    """
    weights = find_weights(config.run)
    folder = run_directory(weights)
    if config.run is None:
        say(f"run: {display_name(folder or weights)}")
    target = config.out or _target_beside(weights, folder, config)
    refuse_in_data(folder, target, "the exported file", "an --out")
    check_target(target, config)
    checkpoint = Checkpoint.load(weights)
    if config.views == "1":
        if checkpoint.config.zoom is not None:
            raise UsageError("--views 1: the tiles of a network that zooms are no view", "leave --views out")
        checkpoint = first_view(checkpoint)
    elif (scales := parse_views(config.views)[1]) is not None:
        checkpoint = through(checkpoint, scales)
    if checkpoint.config.zoom is not None and config.format != "safetensors":
        files, parity = _zoom_files(config, checkpoint, folder, target, track)
    else:
        raw, runner = _FORMATS[config.format](checkpoint)
        pictures = track(_pictures(folder, checkpoint, config.images), total=None, label="checking")
        files, parity = {target: raw}, compare(checkpoint, runner, pictures)
    report = ExportReport(
        run=str(folder or weights),
        file=str(target),
        files=(str(target), *(str(path) for path in files if path != target)),
        format=config.format,
        megabytes=sum(map(len, files.values())) / 1e6,
        images=len(parity.sizes),
        sizes=tuple(f"{width}x{height}" for width, height in sorted(set(parity.sizes))[:20]),
        top1_agreement=parity.same / len(parity.sizes),
        max_probability_difference=parity.difference,
        tolerance=config.tolerance,
    )
    _refuse_disagreement(report)
    for path, raw in files.items():
        write_whole(path, raw)
    return report


def _target_beside(weights: Path, folder: Path | None, config: ExportConfig) -> Path:
    """`runs/x/x.onnx`, or `y.onnx` beside weights `y.safetensors` that stand alone; "." is named as the folder is."""
    name = weights.stem if folder is None else folder.resolve().name
    return (folder or weights.parent) / f"{name}{FORMAT_SUFFIXES[config.format]}"


def check_target(target: Path, config: ExportConfig) -> None:
    """Refuse before the work what could not be written after it. Raises: CannotCreate, NotPermitted, WriteFailed."""
    _refuse_existing((target,), config)
    if not target.parent.is_dir():
        raise CannotCreate(f"there is no folder {display_name(target.parent)}", "make it, or choose another --out")
    check_creatable(target)


def _refuse_existing(paths: Iterable[Path], config: ExportConfig) -> None:
    there = next((path for path in paths if path.exists()), None)
    if there is not None and not config.overwrite:
        raise CannotCreate(f"{display_name(there)} exists", "replace it with --overwrite, or choose another --out")


def _zoom_files(config: ExportConfig, checkpoint: Checkpoint, folder: Path | None, target: Path,
                track: Track) -> tuple[dict[Path, bytes], Parity]:  # fmt: skip
    """The three ONNX files of a zooming network, the one that names the run last, and what they do beside the run."""
    from mvcr_cli.engine.export_zoom import PARTS, OnnxZoomPredictor, compare_files, part_path, zoom_files
    from mvcr_cli.engine.predict import TorchPredictor

    if config.format != "onnx":
        raise UsageError(
            f"--format {config.format} holds one graph, and a network that zooms needs several", "export it as onnx"
        )
    require_onnx()
    paths = {part: part_path(target, part) for part in (*PARTS, "")}
    _refuse_existing(paths.values(), config)
    network = checkpoint.network()
    facts = {"classes": checkpoint.classes, "preprocess": checkpoint.preprocess.to_dict(),
             "model": checkpoint.config.to_dict(), "lessons": int(getattr(network, "lessons", 0)),
             "weights": hashlib.sha256(pack(checkpoint.tensors, {})).hexdigest()}  # fmt: skip
    files = zoom_files(checkpoint, partial(_traced, facts=facts, checkpoint=checkpoint))
    samples = _checked_samples(folder, checkpoint, config.images)
    theirs = OnnxZoomPredictor.from_files(files, "the exported files")
    shown = track(samples, total=len(samples), label="checking")
    return {path: files[part] for part, path in paths.items()}, compare_files(
        TorchPredictor(checkpoint, "cpu"), theirs, shown
    )


def _refuse_disagreement(report: ExportReport) -> None:
    agreement, difference = report.top1_agreement, report.max_probability_difference
    if agreement < 1 or difference > report.tolerance:
        raise CheckFailed(
            f"the exported {report.format} does not do what the run does: top-1 agreement {agreement:.2%}, largest "
            f"difference of a probability {difference:.2g} (allowed {report.tolerance:.0e}); no file was written",
            "report this with the run's config.json, or allow more with --tolerance",
        )


def compare(checkpoint: Checkpoint, runner: Runner, pictures: Iterable[Image.Image]) -> Parity:
    """What an exported file does beside the run on the same pictures."""
    network, parity = checkpoint.network(), Parity()
    for image in pictures:
        x = checkpoint.preprocess.tensor(image)[None]
        own = probabilities_of(network, x, torch.device("cpu"), torch.float32).numpy()[0]
        parity.add(own, runner(np.array(image, dtype=np.uint8)), image.size)
    return parity


def _pictures(folder: Path | None, checkpoint: Checkpoint, limit: int) -> Iterator[Image.Image]:
    """Real validation pictures, each as it is or, by turns, resized to an odd size."""
    found = 0
    for number, sample in enumerate(_checked_samples(folder, checkpoint, limit)):
        try:
            image = load_picture(sample.path, 2 * checkpoint.preprocess.size).image
        except BadImage:
            continue
        found += 1
        yield image if number % 2 else image.resize(CHECK_SIZES[number // 2 % len(CHECK_SIZES)])
    if not found:
        raise ConfigMismatch("none of the run's validation pictures can be read", "put them back where they were")


def _checked_samples(folder: Path | None, checkpoint: Checkpoint, limit: int) -> tuple[Sample, ...]:
    """Up to `limit` validation pictures, spread over all of them."""
    samples: tuple[Sample, ...] = ()
    if folder is not None:
        samples = validation_split(folder, checkpoint.classes)
    if not samples:
        raise ConfigMismatch(
            "the weights stand alone: there are no validation pictures to check an export on",
            "name the run folder: --run runs/NAME",
        )
    count = min(limit, len(samples))
    return tuple(samples[place * len(samples) // count] for place in range(count))


def onnx_bytes(checkpoint: Checkpoint) -> bytes:
    """The ONNX file of a checkpoint; class names, preprocessing and model in its metadata."""
    require_onnx()
    example = (torch.randint(0, 256, (2, 61, 47, 3), dtype=torch.uint8),)
    axes = {"images": {0: "N", 1: "H", 2: "W"}, "probabilities": {0: "N"}}
    facts = {"classes": checkpoint.classes, "preprocess": checkpoint.preprocess.to_dict()}
    return _traced(ExportGraph(checkpoint), example, ["images"], ["probabilities"], axes, facts, checkpoint)


def _traced(graph: nn.Module, example: tuple[Tensor, ...], inputs: list[str], outputs: list[str],
            axes: dict[str, dict[int, str]], facts: dict[str, Any], checkpoint: Checkpoint) -> bytes:  # fmt: skip
    """One graph as an ONNX file that tells what it is."""
    import onnx

    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        # The TorchScript exporter needs no further package and keeps dynamic sizes exact; torch calls it deprecated.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            graph.eval(),
            example,
            buffer,  # type: ignore[arg-type]  # a buffer is taken as well as a path
            dynamo=False,
            opset_version=OPSET,
            input_names=inputs,
            output_names=outputs,
            dynamic_axes=axes,
        )
    model = onnx.load_from_string(buffer.getvalue())
    onnx.helper.set_model_props(model, {"mvcr": to_json(facts), "model": to_json(checkpoint.config.to_dict())})
    onnx.checker.check_model(model)
    raw: bytes = model.SerializeToString()
    return raw


def _onnx(checkpoint: Checkpoint) -> tuple[bytes, Runner]:
    raw = onnx_bytes(checkpoint)
    predictor = OnnxPredictor.from_bytes(raw, "the exported file")
    return raw, lambda pixels: predictor.probabilities([pixels])[0]


def _torch(checkpoint: Checkpoint) -> tuple[bytes, Runner]:
    dynamic = {axis: torch.export.Dim(name, min=1, max=65_536) for axis, name in enumerate("NHW")}
    example = (torch.randint(0, 256, (2, 61, 47, 3), dtype=torch.uint8),)
    graph = ExportGraph(checkpoint).eval()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(graph, example, dynamic_shapes=(dynamic,))
        buffer = io.BytesIO()
        extra = {"classes.json": to_json(list(checkpoint.classes))}
        torch.export.save(program, buffer, extra_files=extra)
    module = program.module()

    @torch.no_grad()
    def run(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
        result: NDArray[np.float64] = module(torch.from_numpy(pixels)[None]).double().numpy()[0]
        return result

    return buffer.getvalue(), run


def _safetensors(checkpoint: Checkpoint) -> tuple[bytes, Runner]:
    """The bare trunk and last layer of view 1; checked by loading it into a plain network of the same parts."""
    import safetensors.torch

    from mvcr_cli.models import build

    raw = safetensors.torch.save({name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()})
    network: Network = build(checkpoint.config)
    network.load_state_dict(safetensors.torch.load(raw))
    network.eval()

    def run(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
        x = checkpoint.preprocess.tensor(Image.fromarray(pixels))[None]
        return probabilities_of(network, x, torch.device("cpu"), torch.float32).numpy()[0]  # type: ignore[no-any-return]

    return raw, run


_FORMATS: dict[str, Callable[[Checkpoint], tuple[bytes, Runner]]] = {
    "onnx": _onnx,
    "torch": _torch,
    "safetensors": _safetensors,
}
