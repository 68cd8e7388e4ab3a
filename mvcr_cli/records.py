"""What comes out: one frozen record a result, plain values only, with the unit in the field's name.

`record(...)` turns one into the dictionary that `--json` prints: `record` and `schema` first.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

from mvcr_cli.paths import json_path

SCHEMA = 1
# Codes of files that are passed over and with which no picture is lost. What else is harmless, each command says.
NO_LOSS = frozenset({"duplicate_link", "hidden", "not_an_image"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    label: str
    probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One tile of a large picture: left, top, right, bottom in its pixels, its weight in the verdict, its own verdict."""

    box: tuple[int, int, int, int]
    weight: float
    label: str
    probability: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """One picture: the best class, the runners-up, and the size of the upright picture in pixels.

    `tiles` are those that a zooming network looked at, the weightiest first; `explanation` is the file of `--explain`.
    Both are left out of the record where there are none.
    """

    path: str
    label: str
    probability: float
    topk: tuple[Label, ...]
    width: int
    height: int
    tiles: tuple[Tile, ...] = ()
    explanation: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictSummary:
    """The last record of `mvcr predict --json`: every input has been answered. Counts are of records."""

    images: int
    bad: int  # pictures that should have been classified, and could not be
    passed_over: int  # files in folders that are no pictures, links, and so on


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One file that was skipped, and why. Codes: see `BadImage`, and those of `data.folder`."""

    path: str
    code: str
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PicturePair:
    """Two pictures of a data set that should not both be where they are.

    Codes: `leak`, the same picture in training and in validation; `conflict`, the same picture with two labels; `alike`
    and `alike_conflict`, the same for pictures that look the same: other encodings and sizes, or scenes that hardly differ.
    """

    path: str
    other: str
    code: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """The end of a dry run: what there is to train on, and what a person should know about it.

    Args:
        decoded: pictures that were decoded, the broken ones included.
        compared: pictures among which copies were looked for.
        findings: `{"code", "count", "detail"}` each.
    """

    data: str
    classes: tuple[str, ...]
    train_images: int
    val_images: int
    decoded: int
    compared: int
    broken: int
    skipped: int
    findings: tuple[dict[str, Any], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochReport:
    """One validated epoch. Accuracies are fractions; `val_*` are of the averaged (EMA) weights.

    `seconds` is the wall time of the whole run; `cpu_seconds` is the time of all threads of this process since its start.
    """

    epoch: int
    epochs: int | None
    step: int
    size_px: int
    lr: float
    train_loss: float
    val_loss: float
    val_accuracy: float
    best_accuracy: float
    images_per_second: float
    seconds: float
    cpu_seconds: float
    left_seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReport:
    """The end of `mvcr train`."""

    run: str
    best_accuracy: float
    best_epoch: int
    last_accuracy: float
    epochs: int
    steps: int
    seconds: float
    stopped_by: str  # "finished", "patience", "SIGINT" or "SIGTERM"
    train_images: int
    val_images: int
    skipped: int
    peak_rss_mb: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A share of n with its 95 % Wilson interval."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassReport:
    label: str
    n: int
    precision: float | None
    recall: float | None
    f1: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """Trustworthy evaluation of one run on one set of pictures. `confusion[i][j]`: true class i predicted as j.

    Args:
        skipped: files that should have been evaluated and could not be.
        ignored: pictures of classes that the run does not know, left out through --ignore-extra-classes.
        views: how the network looked: "all", "1" or "auto".
        trained_on: how many of the `images` the run has learned from; None where its folder does not tell.
    """

    run: str
    data: str
    images: int
    top1: Interval
    top5: Interval | None
    balanced_accuracy: float
    macro_f1: float
    auroc: float | None
    loss: float
    calibration_error: float
    classes: tuple[ClassReport, ...]
    confusion: tuple[tuple[int, ...], ...]
    missing_classes: tuple[str, ...]
    skipped: int
    ignored: int = 0
    trained_on: int | None = None
    views: str = "all"
    seconds: float

    @property
    def commonest(self) -> ClassReport:
        return max(self.classes, key=lambda one: one.n)

    @property
    def majority_accuracy(self) -> float:
        """Top-1 of who always answers the commonest class; the record has it, too."""
        return self.commonest.n / max(1, sum(one.n for one in self.classes))


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageResult:
    """One evaluated picture, for `--out`."""

    path: str
    label: str
    predicted: str
    correct: bool
    probability: float
    probabilities: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalePoint:
    """Accuracy with every picture shown at `factor` times its size, on a canvas of `canvas_px` a side."""

    factor: float
    canvas_px: int
    accuracy: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleCurve:
    """Accuracy of one run against object scale. `area` is the mean accuracy over log2 of the scale.

    `trained_on` is how many of the pictures the run has learned from; None where its folder does not tell.
    """

    run: str
    size_px: int
    points: tuple[ScalePoint, ...]
    area: float
    worst_factor: float
    worst_accuracy: float
    accuracy_at_1: float
    trained_on: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The mean of n differences, one a picture, with its 95 % normal interval."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleCurveReport:
    """Accuracy against object scale on one set of pictures; differences are this run's value less the other's.

    `views` says how the networks looked: "all", "1" or "auto".
    """

    data: str
    images: int
    curve: ScaleCurve
    against: ScaleCurve | None
    area_difference: Difference | None
    worst_difference: float | None
    missing_classes: tuple[str, ...]
    skipped: int
    ignored: int = 0
    views: str = "all"
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """An exported file and the proof that it does what the run does.

    `files` are all that were written: those of a network that zooms belong together, and `file` is the one to name.
    """

    run: str
    file: str
    files: tuple[str, ...]
    format: str
    megabytes: float
    images: int
    sizes: tuple[str, ...]
    top1_agreement: float
    max_probability_difference: float
    tolerance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionReport:
    """A torch file as bare weights. There is no network to check them against; their numbers are finite."""

    source: str
    file: str
    format: str
    megabytes: float
    tensors: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkRow:
    """Speed of one model at one input. Milliseconds are a batch; `mac` are multiply-accumulates a picture.

    `precision` is that of the forward, `train_precision` that of the training step where one was timed.
    """

    model: str
    views: str  # "all", "1", or "auto" at its best
    backend: str  # "eager" or "onnxruntime"
    device: str
    precision: str
    size_px: int
    batch: int
    parameters: int
    mac: int
    forward_p50_ms: float
    forward_p95_ms: float
    forward_images_per_second: float
    train_precision: str | None = None
    train_p50_ms: float | None
    train_images_per_second: float | None
    peak_memory_mb: float
    relative_time: float | None  # forward time over that of the plain ResNet of the same depth


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderReport:
    """How fast pictures reach the network, and which side waits for the other."""

    images: int
    decode_images_per_second: float
    loader_images_per_second: float
    train_images_per_second: float
    train_precision: str
    bottleneck: str  # "loader" or "network"


_NAMES = {
    Prediction: "prediction",
    PredictSummary: "summary",
    Problem: "error",
    PicturePair: "pair",
    CheckReport: "check",
    EpochReport: "epoch",
    TrainReport: "train",
    EvalReport: "eval",
    ImageResult: "image",
    ScaleCurveReport: "scale_curve",
    ExportReport: "export",
    ConversionReport: "conversion",
    BenchmarkRow: "benchmark",
    LoaderReport: "loader",
}


def record(result: Any) -> dict[str, Any]:
    """The JSON record of a result; paths are valid Unicode, with `path_b64` where the name is not UTF-8."""
    values = asdict(result)
    head: dict[str, Any] = {"record": _NAMES[type(result)], "schema": SCHEMA}
    for key in ("path", "other"):
        if key in values:
            shown = json_path(os.fspath(values.pop(key)))
            head |= {name.replace("path", key): text for name, text in shown.items()}
    if isinstance(result, Problem):
        return head | {"error": {"code": result.code, "detail": result.detail}}
    if isinstance(result, Prediction):
        values = {key: value for key, value in values.items() if value or key not in ("tiles", "explanation")}
    if isinstance(result, EvalReport):
        values["majority_accuracy"] = result.majority_accuracy
    return head | {key: _plain(value) for key, value in values.items()}


def _plain(value: Any) -> Any:
    """Text fields may carry undecodable bytes from file names; JSON may not."""
    if isinstance(value, str):
        return json_path(value)["path"]
    if isinstance(value, tuple) and value and isinstance(value[0], str):
        return tuple(map(_plain, value))
    return value
