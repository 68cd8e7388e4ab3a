"""Whole commands of `mvcr` against those of its peers, one after the other on the same folders.

    python examples/peers.py startup --yolo PATH/TO/yolo
    python examples/peers.py epoch   --data DATA --timm PATH/TO/pytorch-image-models --python PATH/TO/its/python
    python examples/peers.py yolo    --data DATA --yolo PATH/TO/yolo --minutes 6
    python examples/peers.py reach   --data DATA --threshold 77.6 --yolo PATH --timm PATH --python PATH [--minutes 15]
                                     [--only mvcr timm]

startup  CPU seconds (user + system of the process and its children), median of N, interleaved: `mvcr --help`, `yolo --help`.
epoch    wall seconds of one epoch of resnet18, 224 px, batch 32, with validation: timm's `train.py`, and `mvcr train` with
         progressive resolution (its default; --fixed adds a run without); start-up and everything included.
yolo     top-1 of ultralytics yolo11n-cls from scratch at 128 px within the minutes; its own defaults otherwise.
reach    wall seconds from the start of the command to the first validation at or above a top-1 accuracy, from scratch at
         128 px, batch 32: `mvcr train --time 3m` with the options of the other examples, yolo11n-cls, and timm's resnet18
         with 20 epochs and its defaults. A command that has not reached it after the minutes is stopped.

Peers live in an environment of their own (`pip install ultralytics timm`); DATA comes from `examples/elpv.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

MVCR = [sys.executable, "-m", "mvcr_cli"]
RECIPE = "--turn --vflip --crop 1 --shear 0 --zoom-range 0.1 --trivial 0.3 --label-smoothing 0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("startup", "epoch", "yolo", "reach"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--yolo", default="yolo")
    parser.add_argument("--timm", type=Path, help="checkout of pytorch-image-models")
    parser.add_argument("--python", default=sys.executable, help="the Python that timm is installed for")
    parser.add_argument("--fixed", action="store_true", help="epoch: also without progressive resolution")
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--threshold", type=float, help="reach: top-1 in percent")
    parser.add_argument("--only", nargs="+", default=["mvcr", "yolo11n-cls", "timm"], help="reach: these commands")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        {"startup": startup, "epoch": epoch, "yolo": yolo, "reach": reach}[options.what](options, Path(scratch))


def startup(options: argparse.Namespace, scratch: Path) -> None:
    commands = {"mvcr --help": [*MVCR, "--help"], "yolo --help": [options.yolo, "--help"]}
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(options.rounds):
        for name, command in commands.items():
            times[name].append(cpu_seconds(command))
    for name, values in times.items():
        print(f"{name}: {statistics.median(values):.2f} s CPU, median of {options.rounds}")
    print(f"ratio: 1/{statistics.median(times['yolo --help']) / statistics.median(times['mvcr --help']):.1f}")


def cpu_seconds(command: list[str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def epoch(options: argparse.Namespace, scratch: Path) -> None:
    mvcr = [*MVCR, "train", str(options.data), "--weights", "none", "--model", "resnet18", "--imgsz", "224",
            "--batch", "32", "--epochs", "1", "--run"]  # fmt: skip
    timm = [options.python, "train.py", str(options.data.resolve()), "--train-split", "train", "--val-split", "val",
            "--model", "resnet18", "--num-classes", "2", "--img-size", "224", "-b", "32", "--epochs", "1",
            "--warmup-epochs", "0", "--device", "cpu", "--output", str(scratch)]  # fmt: skip
    ours = wall("mvcr train, progressive", [*mvcr, str(scratch / "a")])
    fixed = [*mvcr, str(scratch / "b"), "--no-progressive"]
    fixed_seconds = wall("mvcr train --no-progressive", fixed) if options.fixed else None
    theirs = wall("timm train.py", timm, options.timm)
    print(
        f"ratio: 1/{theirs / ours:.2f}" + (f", at fixed size 1/{theirs / fixed_seconds:.2f}" if fixed_seconds else "")
    )


def yolo(options: argparse.Namespace, scratch: Path) -> None:
    wall("yolo11n-cls", [*yolo_command(options, scratch), f"time={options.minutes / 60}"])
    accuracies = column(next(scratch.rglob("results.csv")), "metrics/accuracy_top1")
    print(f"best top-1 {100 * max(accuracies):.1f} % in {len(accuracies)} epochs")


def yolo_command(options: argparse.Namespace, scratch: Path) -> list[str]:
    return [options.yolo, "classify", "train", f"data={options.data.resolve()}", "model=yolo11n-cls.yaml", "imgsz=128",
            "pretrained=False", "device=cpu", "plots=False", f"project={scratch}"]  # fmt: skip


def reach(options: argparse.Namespace, scratch: Path) -> None:
    ours = [*MVCR, "train", str(options.data), "--run", str(scratch / "run"), "--weights", "none", "--imgsz", "128",
            "--time", "3m", *RECIPE.split()]  # fmt: skip
    timm = [options.python, "train.py", str(options.data.resolve()), "--train-split", "train", "--val-split", "val",
            "--model", "resnet18", "--num-classes", "2", "--img-size", "128", "-b", "32", "--epochs", "20", "--device", "cpu",
            "--output", str(scratch)]  # fmt: skip
    watched = {
        "mvcr": (ours, None, lambda: our_accuracies(scratch / "run" / "metrics.jsonl")),
        "yolo11n-cls": ([*yolo_command(options, scratch), f"time={options.minutes / 60}"], None,
                        lambda: [100 * value for file in scratch.rglob("results.csv")
                                 for value in column(file, "metrics/accuracy_top1")]),
        "timm": (timm, options.timm, lambda: [value for file in scratch.rglob("summary.csv")
                                                       for value in column(file, "eval_top1")]),
    }  # fmt: skip
    for name in options.only:
        command, folder, accuracies = watched[name]
        seconds, best = seconds_to(options.threshold, command, folder, accuracies, 60 * options.minutes)
        found = f"{seconds:.0f} s" if seconds is not None else f"not after {options.minutes:g} min"
        print(f"{name}: {found} to {options.threshold} %, best {best:.1f} %", flush=True)


def seconds_to(threshold: float, command: list[str], folder: Path | None, accuracies: Callable[[], list[float]],
               most: float) -> tuple[float | None, float]:  # fmt: skip
    """Wall seconds until the command has written an accuracy at or above the threshold, None if it never does, and its best."""
    began = time.monotonic()
    with subprocess.Popen(command, stdout=sys.stderr, cwd=folder, start_new_session=True) as process:
        while True:
            ended, found = process.poll() is not None, accuracies()
            seconds, best = time.monotonic() - began, max(found, default=0.0)
            if best >= threshold or ended or seconds > most:
                break
            time.sleep(0.1)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return (seconds if best >= threshold else None), best


def our_accuracies(file: Path) -> list[float]:
    if not file.exists():
        return []
    return [100 * json.loads(line)["val_accuracy"] for line in file.read_text().splitlines()]


def column(file: Path, name: str) -> list[float]:
    """Of a CSV file whose header may be padded."""
    with file.open() as lines:
        return [float(row[name]) for row in csv.DictReader(line.replace(" ", "") for line in lines) if row[name]]


def wall(name: str, command: list[str], folder: Path | None = None) -> float:
    began = time.monotonic()
    subprocess.run(command, check=True, stdout=sys.stderr, cwd=folder, env=os.environ)
    seconds = time.monotonic() - began
    print(f"{name}: {seconds:.0f} s wall", flush=True)
    return seconds


if __name__ == "__main__":
    main()
