"""What the five commands share: progress, devices, precision, and finding a run."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from mvcr_cli.config import Device, Precision
from mvcr_cli.errors import ConfigMismatch, InputMissing
from mvcr_cli.paths import display_name

T = TypeVar("T")
Say = Callable[[str], None]
Stop = Callable[[], str | None]

PRECISIONS: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISION_NAMES = {dtype: name for name, dtype in PRECISIONS.items()}
EXPORT_SUFFIXES = (".onnx",)
RUNS = Path("runs")


class Track(Protocol):
    """Progress: gives back the same items, and shows how far it is."""

    def __call__(self, items: Iterable[T], *, total: int | None, label: str) -> Iterator[T]: ...


def silent(items: Iterable[T], *, total: int | None = None, label: str = "") -> Iterator[T]:
    return iter(items)


def say_nothing(text: str) -> None:
    pass


def never() -> str | None:
    return None


def find_run(run: Path | None) -> Path:
    """The weights or exported file that `--run` means: a run folder, a file, or the newest finished run below ./runs.

    Raises: InputMissing with the commands that help.
    """
    if run is None:
        finished = [folder.parent for folder in RUNS.glob("*/summary.json")]
        if not finished:
            raise InputMissing(
                "there is no finished run below ./runs",
                "train one with: mvcr train DATA   or name one with: --run runs/NAME",
            )
        run = max(finished, key=lambda folder: ((folder / "summary.json").stat().st_mtime_ns, folder.name))
    if run.is_dir():
        return _best_weights(run)
    if not run.is_file():
        raise InputMissing(f"there is no run or file {display_name(run)}", _meant(run))
    return run


def _best_weights(run: Path) -> Path:
    weights = run / "weights" / "best.safetensors"
    if weights.is_file():
        return weights
    shown = display_name(run)
    if not any((run / name).exists() for name in ("config.json", ".lock")):
        raise InputMissing(f"{shown} is no run folder", "name a folder that mvcr train made; list them with: ls runs")
    raise InputMissing(
        f"{shown} has no weights/best.safetensors",
        f"go on with the training: the command that began it, with --run {shown} --resume",
    )


def _meant(run: Path) -> str:
    """The hint for a run that is not there: one in ./runs of this name, or nearly."""
    names = [path.name for path in RUNS.glob("*") if path.is_dir()] if run.parent in (Path(), RUNS) else []
    near = [run.name] if run.name in names else difflib.get_close_matches(run.name, names, 1)
    return f"did you mean {display_name(RUNS / near[0])}?" if near else "list the runs with: ls runs"


def find_weights(run: Path | None) -> Path:
    """As `find_run`, for what an exported file cannot do.

    Raises: InputMissing, or ConfigMismatch for an exported file.
    """
    path = find_run(run)
    if path.suffix in EXPORT_SUFFIXES:
        raise ConfigMismatch(f"{display_name(path)} is an exported file, good for predict alone", "name its run")
    return path


def run_directory(weights: Path) -> Path | None:
    """`runs/x/weights/best.safetensors` -> `runs/x`; None for a file that stands alone."""
    folder = weights.parent.parent
    return folder if weights.parent.name == "weights" and (folder / "config.json").is_file() else None


def pick_device(name: Device) -> torch.device:
    """Raises: ConfigMismatch when the device is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there[name]:
        raise ConfigMismatch(f"--device {name}: this machine or this build of torch has none", "use --device cpu")
    return torch.device(name)


def pick_precision(name: Precision, device: torch.device) -> torch.dtype:
    """The dtype of the activations. "auto" is bf16 where the hardware multiplies in it, else fp16 on CUDA, else fp32.

    Raises: ConfigMismatch for fp16 on a CPU.
    """
    if name != "auto":
        if name == "fp16" and device.type == "cpu":
            raise ConfigMismatch("--precision fp16 is for CUDA and MPS", "use --precision bf16 or fp32")
        return PRECISIONS[name]
    if device.type == "mps":
        return torch.float32
    if not emulates_bf16(device):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32


def emulates_bf16(device: torch.device) -> bool:
    """Whether bf16 is an order of magnitude slower than fp32 there; `auto` never emulates."""
    if device.type == "cuda":
        return not torch.cuda.is_bf16_supported()
    return device.type == "cpu" and not cpu_has_bf16()


def cpu_has_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text().split("flags", 2)[1].split("\n", 1)[0].split()
    except (OSError, IndexError):
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def default_workers(workers: int | None) -> int:
    """Decoding threads: one less than the cores, at least 1 and at most 8."""
    return workers if workers is not None else min(8, max(1, available_cores() - 1))


def default_threads(threads: int | None) -> int:
    """Threads that compute: as many as asked for, else as OMP_NUM_THREADS says, else one a core."""
    said = os.environ.get("OMP_NUM_THREADS", "")
    return threads or (int(said) if said.isdecimal() else 0) or available_cores()


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_rss_mb() -> float:
    """Peak resident memory of this process in MiB."""
    try:
        import resource
    except ImportError:  # Windows has no such counter in the standard library
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)
