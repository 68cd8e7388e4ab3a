"""Accuracy on ELPV solar cells after a few minutes of training from scratch, over seeds and splits.

Data: `examples/elpv.py`; label = defect probability above 0.5; 75 % train, 25 % validation; every seed makes its own split.
Protocol: `mvcr train --time T --weights none` with the options below, start-up included; accuracy of the best epoch of the
averaged weights on the validation cells (the epoch is chosen on the same cells), and of the last epoch, which is not chosen.

    python examples/elpv_table.py WORK [--time 3m] [--splits random block] [--seeds 0 1 2] [--options "--model mvcr14n"]

Prints one Markdown row a split: mean and standard deviation over the seeds. The results of this script, with hardware and
versions, stand in docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
# A solar cell fills its picture and has no up or down: all turns and mirrors, hardly any zoom, nothing cropped away.
RECIPE = "--turn --vflip --crop 1 --shear 0 --zoom-range 0.1 --trivial 0.3 --label-smoothing 0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--time", default="3m")
    parser.add_argument("--splits", nargs="+", default=["random", "block"], choices=("random", "block"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--options", default="", help="further options of mvcr train")
    options = parser.parse_args()
    print(
        "| split | best top-1 % | last top-1 % | AUROC | balanced % | majority % | wall s |\n|---|---|---|---|---|---|---|"
    )
    for split in options.splits:
        rows = [one_run(options, split, seed) for seed in options.seeds]
        columns = [spread([row[index] for row in rows]) for index in range(6)]
        print(f"| {split} | " + " | ".join(columns) + " |", flush=True)


def one_run(options: argparse.Namespace, split: str, seed: int) -> tuple[float, ...]:
    data = options.work / f"elpv-{split}-{seed}"
    subprocess.run(
        [sys.executable, HERE / "elpv.py", data, "--split", split, "--seed", str(seed)], check=True, stdout=sys.stderr
    )
    name = "-".join(["elpv", split, str(seed), options.time, *options.options.replace("--", "").split()])
    run = options.work / "runs" / name.replace("/", "_")
    command = [sys.executable, "-m", "mvcr_cli", "train", str(data), "--run", str(run), "--weights", "none",
               "--time", options.time, "--seed", str(seed), *shlex.split(RECIPE), *shlex.split(options.options)]  # fmt: skip
    began = time.monotonic()
    subprocess.run(command, check=True, stdout=sys.stderr)
    wall = time.monotonic() - began
    found = json.loads((run / "eval.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    counts = [entry["n"] for entry in found["classes"]]
    shares = (found["top1"]["value"], summary["last_accuracy"])
    return (100 * shares[0], 100 * shares[1], found["auroc"], 100 * found["balanced_accuracy"],
            100 * max(counts) / sum(counts), wall)  # fmt: skip


def spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    digits = 3 if max(values) <= 1 else 1
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


if __name__ == "__main__":
    main()
