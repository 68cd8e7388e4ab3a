"""What zoom is measured against: the plain ResNet at several sizes, and tiles that nobody chose.

Data: examples/megapixel_mnist.py, or with --zoom and --options other large pictures (examples/elpv_modules.py). Every row
gets the same processor time (`--time` counts that of the process here, so other work on the machine takes nothing from a
row), one thread, one seed, the same recipe, and the trunk of mvcr10n:

zoom            tiles where detector, learned search and grid propose them
grid tiles      as many candidates, spread evenly over the picture, the same ones in all pictures of a size
random tiles    as many candidates at random places, drawn whenever a picture is read
plain SIZE      resnet10n, the whole picture at that many pixels; 1500 is the full resolution of Megapixel-MNIST

    python examples/zoom_baselines.py DATA WORK [--minutes 15] [--rows zoom "plain 224" ...] [--seed 0]
        [--zoom "--imgsz 128 --tile-px 32 --batch 16"] [--options "--no-augment"]

Prints Markdown: test accuracy and balanced accuracy of the last weights, epochs, processor minutes, processor seconds of
the prediction of one picture (reading included, median of 20), and peak memory of the process that predicts (Linux), batch 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

ROWS = ("zoom", "grid tiles", "random tiles", "plain 224", "plain 512", "plain 1500")
PICTURES = 20
DEFAULTS = ("--imgsz 128 --tile-px 32 --batch 16", "--no-augment")  # of --zoom and --options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--minutes", type=int, default=15)
    parser.add_argument("--rows", nargs="+", default=ROWS, help="zoom, grid tiles, random tiles, plain SIZE")
    parser.add_argument("--zoom", default=DEFAULTS[0], help="options of the rows with tiles")
    parser.add_argument("--options", default=DEFAULTS[1], help="options of all rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--do", choices=("train", "eval", "predict"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.do:
        do(options, options.rows[0])
        return
    print(
        "| row | test accuracy % | balanced % | epochs | CPU min | CPU s a picture | peak MB |\n|---|---|---|---|---|---|---|"
    )
    for row in options.rows:
        run = run_of(options, row)
        if not (run / "summary.json").exists():
            start(options, row, "train")
        found = json.loads(start(options, row, "eval"))
        cost = json.loads(start(options, row, "predict"))
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        print(
            f"| {row} | {100 * found['top1']['value']:.1f} | {100 * found['balanced_accuracy']:.1f} | {last['epoch']} "
            f"| {last['cpu_seconds'] / 60:.0f} | {cost['seconds']:.2f} | {cost['peak_rss_mb']} |",
            flush=True,
        )


def run_of(options: argparse.Namespace, row: str) -> Path:
    other = () if (options.zoom, options.options) == DEFAULTS else (options.zoom, options.options)
    key = f"-{hashlib.sha256(repr(other).encode()).hexdigest()[:8]}" if other else ""
    work: Path = options.work
    return work / f"{row.replace(' ', '-')}-{options.minutes}m-{options.seed}{key}"


def start(options: argparse.Namespace, row: str, what: str) -> str:
    """One row's work in a process of its own; its last line."""
    command = [sys.executable, __file__, str(options.data), str(options.work), "--minutes", str(options.minutes),
               "--seed", str(options.seed), f"--zoom={options.zoom}", f"--options={options.options}", "--rows", row,
               "--do", what]  # fmt: skip
    lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return lines[-1] if lines else ""


def do(options: argparse.Namespace, row: str) -> None:
    if row in ("grid tiles", "random tiles"):
        propose_blindly(at_random=row == "random tiles")
    run = run_of(options, row)
    if options.do == "train":
        count_processor_time()
        kind = ["--model", "mvcr10n", "--zoom", "on", *shlex.split(options.zoom)]
        if row.startswith("plain"):
            size = row.split()[1]
            batch = "16" if int(size) < 1000 else "4"
            kind = ["--model", "resnet10n", "--zoom", "off", "--imgsz", size, "--batch", batch, "--cache", "1500"]
        command(["train", str(options.data), "--run", str(run), "--weights", "none", "--threads", "1", "--workers", "1",
                 "--seed", str(options.seed), "--time", f"{options.minutes}m", *kind,
                 *shlex.split(options.options)])  # fmt: skip
    elif options.do == "eval":
        command(["eval", "--run", str(run / "weights" / "last.safetensors"), str(options.data), "--batch", "4",
                 "--json"])  # fmt: skip
    else:
        print(json.dumps(predicting(options.data, run)))


def command(argv: list[str]) -> None:
    from mvcr_cli.__main__ import main

    main(argv)


def propose_blindly(at_random: bool) -> None:
    from mvcr_cli.data import tiles

    propose, spread = tiles.propose, tiles.spread
    rng = np.random.default_rng()

    def scattered(size: tuple[int, int], count: int, octaves: int) -> list[tuple[float, float, int]]:
        return [(*rng.uniform(0, size), octave) for _, _, octave in spread(size, count, octaves)]

    if at_random:
        tiles.spread = scattered
    tiles.side_by_side = covered
    tiles.propose = lambda picture, zoom, _, glance: propose(
        picture, replace(zoom, grid=1.0, learned=0.0), None, glance
    )


def covered(*_: object) -> None:
    raise SystemExit("these tiles cover the pictures, which leaves nothing to propose: choose fewer or smaller ones")


def count_processor_time() -> None:
    from mvcr_cli.engine.clock import Clock

    Clock.elapsed = lambda clock: clock.before + time.process_time()  # type: ignore[method-assign]


def predicting(data: Path, run: Path) -> dict[str, Any]:
    """Processor seconds of one picture, and peak memory in MiB."""
    import torch

    from mvcr_cli.checkpoint import Checkpoint
    from mvcr_cli.engine.predict import TorchPredictor

    torch.set_num_threads(1)
    predictor = TorchPredictor(Checkpoint.load(run / "weights" / "last.safetensors"), "cpu")
    seconds = []
    for path in sorted((data / "val").rglob("*.*"))[:: max(1, 1000 // PICTURES)]:
        began = time.process_time()
        predictor.judge([predictor.read(str(path))])
        seconds.append(time.process_time() - began)
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) >> 10 for line in lines if line.startswith("VmHWM:"))
    return {"seconds": statistics.median(seconds), "peak_rss_mb": peak}


if __name__ == "__main__":
    main()
