"""The commands that use a trained network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mvcr_cli.config.checks import check, check_batch, check_imgsz, check_preset, check_workers
from mvcr_cli.config.constants import FORMAT_SUFFIXES, MOST_SHRUNK, Device, ExportFormat, Precision
from mvcr_cli.config.parsing import factor_text, parse_views
from mvcr_cli.errors import UsageError
from mvcr_cli.paths import display_name


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """`mvcr eval`. `data=None` is the run's own validation split.

    Args:
        scales: factors of the size at which the pictures are shown, increasing, for accuracy against object scale.
        against: another run whose curve over scale is laid beside this one's.
        views: see `parse_views`.
    """

    data: Path | None = None
    run: Path | None = None
    scales: tuple[float, ...] | None = None
    against: Path | None = None
    out: Path | None = None
    views: str = "all"
    batch: int = 32
    workers: int | None = None
    device: Device = "auto"
    precision: Precision = "fp32"
    ignore_extra_classes: bool = False
    keep_going: bool = False
    follow_links: bool = False

    def __post_init__(self) -> None:
        parse_views(self.views)
        check_batch(self.batch)
        check_workers(self.workers)
        if self.scales is None:
            if self.against is not None:
                raise UsageError("--against compares accuracy over scale", "give the scales as well: --scales 1/4..4")
            return
        inside = all(1 / MOST_SHRUNK <= factor <= MOST_SHRUNK for factor in self.scales)
        check(inside and 1 in self.scales and len(self.scales) > 1, "--scales", map(factor_text, self.scales),
               f"a range or list of two or more with 1 in it, each between 1/{MOST_SHRUNK} and {MOST_SHRUNK}")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """`mvcr predict`. `inputs` are files, folders, glob patterns, or "-" for names on stdin, one a line.

    `explain` is a folder for one overlay picture an input.
    """

    inputs: tuple[str, ...]
    run: Path | None = None
    explain: Path | None = None
    topk: int = 5
    views: str = "all"
    batch: int = 16
    workers: int | None = None
    device: Device = "auto"
    offline: bool = False

    def __post_init__(self) -> None:
        check(len(self.inputs) > 0, "INPUTS", "nothing", "at least one file, folder, pattern or -")
        check(self.topk >= 1, "--topk", self.topk, "1 or more")
        parse_views(self.views)
        check_batch(self.batch)
        check_workers(self.workers)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """`mvcr export`. `out=None` writes beside the run's weights; `images` cap the parity check.

    `from_torch` is a torch file to convert to safetensors in the place of a run to export; `out=None` then writes into
    the current folder.
    """

    run: Path | None = None
    from_torch: Path | None = None
    format: ExportFormat = "onnx"
    views: str = "all"
    out: Path | None = None
    images: int = 64
    tolerance: float = 1e-4
    overwrite: bool = False

    def __post_init__(self) -> None:
        check(
            parse_views(self.views)[0] != "auto",
            "--views",
            self.views,
            "1, all or a scale set: a graph cannot stop early",
        )
        check(1 <= self.images <= 100_000, "--images", self.images, "between 1 and 100,000")
        check(0 < self.tolerance < 1, "--tolerance", self.tolerance, "between 0 and 1")
        if self.from_torch is not None:
            self._check_conversion()
        suffix = FORMAT_SUFFIXES[self.format]
        if self.out is not None and self.out.suffix.lower() not in ("", suffix):
            raise UsageError(
                f"--out {display_name(self.out)}: --format {self.format} writes a {suffix} file",
                f"write --out {display_name(self.out.with_suffix(suffix))}, or choose another --format",
            )

    def _check_conversion(self) -> None:
        if self.format != "safetensors":
            raise UsageError(f"--from-torch makes safetensors, and no {self.format}", "leave --format out")
        for name in ("run", "views", "images", "tolerance"):
            if getattr(self, name) != getattr(ExportConfig, name):
                raise UsageError(f"--{name} is for a run, and --from-torch converts a file", f"leave --{name} out")


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """`mvcr benchmark`. `models` empty and `run=None` benchmarks the default models.

    `sizes` and `classes` are those of the models; a run has its own.
    `precision="auto"` is what the other commands do by default: fp32 to judge, and to train what `mvcr train` takes.
    """

    models: tuple[str, ...] = ()
    run: Path | None = None
    data: Path | None = None
    sizes: tuple[int, ...] = (128, 224)
    batches: tuple[int, ...] = (1, 8)
    classes: int = 10
    rounds: int = 10
    device: Device = "auto"
    precision: Precision = "auto"
    threads: int | None = None
    workers: int | None = None
    onnx: bool = True
    train: bool = True

    def __post_init__(self) -> None:
        for name in self.models:
            check_preset(name)
        for size in self.sizes:
            check_imgsz(size)
        check(all(1 <= batch <= 65_536 for batch in self.batches), "--batch", self.batches, "between 1 and 65,536")
        check(1 <= self.rounds <= 10_000, "--rounds", self.rounds, "between 1 and 10,000")
        check(1 <= self.classes <= 100_000, "--classes", self.classes, "between 1 and 100,000")
        check(self.threads is None or 1 <= self.threads <= 1024, "--threads", self.threads, "between 1 and 1024")
        check_workers(self.workers)
        if self.run is not None and not self.models:
            for name, option in (("sizes", "--imgsz"), ("classes", "--classes")):
                if getattr(self, name) != getattr(BenchmarkConfig, name):
                    raise UsageError(f"{option} is for MODELS, and a run has its own", f"leave {option} out")
