"""Whole commands of `mvcr` against those of its peers, one after the other on the same folders.

    python examples/peers.py startup --yolo PATH/TO/yolo
    python examples/peers.py epoch   --data DATA --timm PATH/TO/pytorch-image-models --python PATH/TO/its/python
    python examples/peers.py yolo    --data DATA --yolo PATH/TO/yolo --minutes 6

startup  CPU seconds (user + system of the process and its children), median of N, interleaved: `mvcr --help`, `yolo --help`.
epoch    wall seconds of one epoch of resnet18, 224 px, batch 32, with validation: timm's `train.py`, and `mvcr train` with
         progressive resolution (its default; --fixed adds a run without); start-up and everything included.
yolo     top-1 of ultralytics yolo11n-cls from scratch at 128 px within the minutes; its own defaults otherwise.

Peers live in an environment of their own (`pip install ultralytics timm`); DATA comes from `examples/elpv.py`.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MVCR = [sys.executable, "-m", "mvcr_cli"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("startup", "epoch", "yolo"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--yolo", default="yolo")
    parser.add_argument("--timm", type=Path, help="checkout of pytorch-image-models")
    parser.add_argument("--python", default=sys.executable, help="the Python that timm is installed for")
    parser.add_argument("--fixed", action="store_true", help="epoch: also without progressive resolution")
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        {"startup": startup, "epoch": epoch, "yolo": yolo}[options.what](options, Path(scratch))


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
    wall("yolo11n-cls", [options.yolo, "classify", "train", f"data={options.data.resolve()}", "model=yolo11n-cls.yaml",
                         "imgsz=128", f"time={options.minutes / 60}", "pretrained=False", "device=cpu", "plots=False",
                         f"project={scratch}"])  # fmt: skip
    results = next(scratch.rglob("results.csv"))
    shutil.copy(results, "yolo_results.csv")
    header, *rows = [line.split(",") for line in results.read_text().splitlines()]
    column = [name.strip() for name in header].index("metrics/accuracy_top1")
    print(f"best top-1 {100 * max(float(row[column]) for row in rows):.1f} % in {len(rows)} epochs")


def wall(name: str, command: list[str], folder: Path | None = None) -> float:
    began = time.monotonic()
    subprocess.run(command, check=True, stdout=sys.stderr, cwd=folder, env=os.environ)
    seconds = time.monotonic() - began
    print(f"{name}: {seconds:.0f} s wall", flush=True)
    return seconds


if __name__ == "__main__":
    main()
