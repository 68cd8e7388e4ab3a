"""Accuracy against compute: a plain ResNet at several input sizes, and MVCR looked through in its three ways.

Data: any folder with train and val (`examples/elpv.py`, `examples/digits.py`), from scratch. All rows have the same recipe; the
plain network gets 1.3 times the epochs, because two views cost that much more to train. The cost of a picture is counted in
multiply-accumulates, and timed: CPU milliseconds of one thread, median over batches of 16, all rows by turns in one process.

    python examples/compute.py DATA WORK [--epochs 20] [--seeds 0 1 2 3 4] [--plain 64 96 128 160] [--multi 96 128]
                               [--sets 1,1/2 1] [--layers blur,gem] [--options "--turn --vflip ..."]

Prints Markdown: mean and standard deviation over the seeds. "auto" begins with the cheapest view and stops when one is sure.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import shlex
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mvcr_cli.checkpoint import Checkpoint
from mvcr_cli.data.loader import PixelCache, evaluation_batches
from mvcr_cli.engine.evaluate import validation_split
from mvcr_cli.models import Network, mac_count
from mvcr_cli.models.mvcr import MultiScaleResNet

BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--epochs", type=int, default=20, help="of the multi-scale network")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--plain", nargs="+", type=int, default=[64, 96, 128, 160])
    parser.add_argument("--multi", nargs="+", type=int, default=[96, 128])
    parser.add_argument("--sets", nargs="+", default=["1,1/2", "1"], help="scale sets of the multi-scale network")
    parser.add_argument("--layers", help="of the multi-scale network; default: its own")
    parser.add_argument("--trunk", default="14n")
    parser.add_argument("--threads", type=int, default=2, help="of training; timing has one")
    parser.add_argument(
        "--options", default="--turn --vflip --crop 1 --shear 0 --zoom-range 0.1 --trivial 0.3 --label-smoothing 0"
    )
    options = parser.parse_args()
    cells: dict[tuple[str, int], list[Cell]] = defaultdict(list)
    for seed in options.seeds:
        runs = [
            trained(f"resnet{options.trunk}", size, round(1.3 * options.epochs), seed, options)
            for size in options.plain
        ]
        for size, scales in itertools.product(options.multi, options.sets):
            own = ["--scales", scales]
            own += ["--layers", options.layers] if options.layers else []
            runs.append(trained(f"mvcr{options.trunk}", size, options.epochs, seed, options, own))
        for cell in measured(runs):
            cells[cell.name, cell.size].append(cell)
    print("| network | px | MMACs | CPU ms, one thread | top-1 % |\n|---|---|---|---|---|")
    for (name, size), rows in sorted(cells.items(), key=lambda item: statistics.mean(cell.mac for cell in item[1])):
        columns = [statistics.mean(row.mac for row in rows) / 1e6, statistics.mean(row.milliseconds for row in rows)]
        accuracy = [100 * row.accuracy for row in rows]
        deviation = statistics.stdev(accuracy) if len(accuracy) > 1 else 0.0
        print(
            f"| {name} | {size} | {columns[0]:.0f} | {columns[1]:.1f} | {statistics.mean(accuracy):.1f} ± {deviation:.1f} |"
        )


def trained(
    model: str, size: int, epochs: int, seed: int, options: argparse.Namespace, own: Sequence[str] = ()
) -> Path:
    command = [str(options.data), "--weights", "none", "--model", model, "--imgsz", str(size), "--epochs", str(epochs),
               "--seed", str(seed), "--batch", "32", "--threads", str(options.threads),
               *shlex.split(options.options), *own]  # fmt: skip
    key = hashlib.sha256(repr(command).encode()).hexdigest()[:8]
    run: Path = options.work / f"{model}-{size}-{epochs}-{seed}-{key}"
    if not (run / "summary.json").exists():
        command = [sys.executable, "-m", "mvcr_cli", "train", *command, "--run", str(run)]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return run


@dataclass
class Cell:
    """One network, looked through in one way."""

    name: str
    size: int
    checkpoint: Checkpoint
    network: Network
    right: int = 0
    count: int = 0
    costs: list[float] = field(default_factory=list)  # of a picture, as a multiple of its view at scale 1
    times: list[float] = field(default_factory=list)  # CPU ms of a picture

    @property
    def accuracy(self) -> float:
        return self.right / self.count

    @property
    def milliseconds(self) -> float:
        return statistics.median(self.times)

    @property
    def mac(self) -> float:
        if self.network.look != "auto":
            return mac_count(self.network, self.size)
        self.network.look = "1"
        once = mac_count(self.network, self.size)
        self.network.look = "auto"
        return once * statistics.mean(self.costs)


@torch.inference_mode()
def measured(runs: list[Path]) -> list[Cell]:
    """Accuracy on the validation split (last weights: no epoch is chosen on it) and time, batch by batch in turns."""
    cells = []
    for run in runs:
        checkpoint = Checkpoint.load(run / "weights" / "last.safetensors")
        looks = ("1", "all", "auto") if len(checkpoint.config.scales) > 1 else ("all",)
        for look in looks:
            network = checkpoint.network().eval().to(memory_format=torch.channels_last)
            network.look = look
            name = checkpoint.config.name
            if name.startswith("mvcr"):
                name += " --scales 1" if len(looks) == 1 else f" --views {look}"
            cells.append(Cell(name, checkpoint.preprocess.size, checkpoint, network))
    torch.set_num_threads(1)
    samples = validation_split(runs[0], cells[0].checkpoint.classes)
    loaders = {
        cell.size: evaluation_batches(samples, cell.checkpoint.preprocess, BATCH, 1, PixelCache(0)) for cell in cells
    }
    for batches in zip(*loaders.values(), strict=True):
        inputs = dict(zip(loaders, batches, strict=True))
        for cell in cells:
            kept, x = inputs[cell.size]
            began = time.thread_time()  # readers decode the next batches meanwhile
            logits = cell.network(x.contiguous(memory_format=torch.channels_last))
            cell.times.append(1000 * (time.thread_time() - began) / len(kept))
            cell.right += sum(int(row.argmax()) == sample.label for row, sample in zip(logits, kept, strict=True))
            cell.count += len(kept)
            if cell.network.look == "auto" and isinstance(cell.network, MultiScaleResNet):
                cell.costs.append(float(cell.network.forward_until_sure(x)[1].mean()))
    return cells


if __name__ == "__main__":
    main()
