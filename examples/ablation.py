"""What every part of the network and of the recipe brings: one of them off, or one more on, and the rest as in the first row.

Data: ELPV (`examples/elpv.py`), from scratch; with `--split block`, so that neighbouring cells, often of one module, stand on
one side; every seed makes its own split. All rows have the same epochs, so a part also has to earn the time it takes.

    python examples/ablation.py WORK [--epochs 16] [--imgsz 128] [--seeds 0 1 2] [--split block] [--trunk 14n] [--threads 1]
                                [--rows "no blur" ...]

Prints Markdown, mean and standard deviation over the seeds of the last epoch, which nobody chose: accuracy, area under ROC,
loss; and the processor seconds of the training against those of the first row.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RECIPE = "--turn --vflip --crop 1 --shear 0 --zoom-range 0.1 --trivial 0.3 --label-smoothing 0"
BASE = "two views, blur, GeM, heads"
LAYERS, VIEWS = "--layers blur,gem,heads", "--scales 1,1/2"
ROWS = {
    BASE: f"{VIEWS} {LAYERS}",
    "one view (--scales 1)": f"--scales 1 {LAYERS}",
    "no teaching across scales (--distill 0)": f"--distill 0 {VIEWS} {LAYERS}",
    "no blur": f"{VIEWS} --layers gem,heads",
    "mean in the place of GeM": f"{VIEWS} --layers blur,heads",
    "no heads": f"{VIEWS} --layers blur,gem",
    "one view, blur and GeM: the default": "--scales 1 --layers blur,gem",
    "no layers: the plain trunk with views": f"{VIEWS} --layers none",
    "plain ResNet": "--model resnet{trunk}",
    "scale-aware convolutions added": f"{VIEWS} {LAYERS},sacs",
    "detail branch added": f"{VIEWS} {LAYERS},detail",
    "dense RootSIFT added": f"{VIEWS} {LAYERS},sift",
    "resolution jitter added": f"{VIEWS} --resolution 0.6 {LAYERS}",
    "one view, maximum pooled (--scales 1 --layers blur,max)": "--scales 1 --layers blur,max",
    "the same, doubt at foreign scales added (--unsure 0.3)": "--scales 1 --layers blur,max --unsure 0.3",
    "no weight average": f"{VIEWS} --ema 0 {LAYERS}",
    "batch norms measured anew (--precise-bn 32)": f"{VIEWS} --precise-bn 32 {LAYERS}",
    "full size throughout": f"{VIEWS} --no-progressive {LAYERS}",
    "no colour operations": f"{VIEWS} --trivial 0 {LAYERS}",
}
COLUMNS = ("top-1 %", "AUROC", "loss", "CPU s, against the first row")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--imgsz", type=int, default=128)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--split", default="block", choices=("random", "block"))
    parser.add_argument("--trunk", default="14n")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    options = parser.parse_args()
    print("| " + " | ".join(("changed", *COLUMNS)) + " |\n|" + "---|" * (1 + len(COLUMNS)))
    base: list[tuple[float, ...]] = []
    for name in options.rows:
        results = [one_run(name, seed, options) for seed in options.seeds]
        base = base or results
        relative = [own[3] / first[3] for own, first in zip(results, base, strict=True)]
        cells = [spread([result[column] for result in results]) for column in range(3)]
        print(f"| {name} | " + " | ".join(cells) + f" | {statistics.mean(relative):.2f} |", flush=True)


def one_run(name: str, seed: int, options: argparse.Namespace) -> tuple[float, ...]:
    """Top-1 in percent, area under ROC, loss and processor seconds of one training."""
    data = options.work / f"elpv-{options.split}-{seed}"
    laid_out = [sys.executable, HERE / "elpv.py", data, "--split", options.split, "--seed", str(seed)]
    subprocess.run(laid_out, check=True, stdout=sys.stderr)
    key = "".join(letter if letter.isalnum() else "-" for letter in name)
    run = options.work / "runs" / f"{key}-{options.split}-{options.trunk}-{options.imgsz}-{options.epochs}-{seed}"
    own = shlex.split(ROWS[name].format(trunk=options.trunk))
    model = [] if "--model" in own else ["--model", f"mvcr{options.trunk}"]
    if not (run / "summary.json").exists():
        command = [sys.executable, "-m", "mvcr_cli", "train", str(data), "--run", str(run), "--weights", "none", *model,
                   "--imgsz", str(options.imgsz), "--batch", "32", "--epochs", str(options.epochs), "--seed", str(seed),
                   "--threads", str(options.threads), *shlex.split(RECIPE), *own]  # fmt: skip
        subprocess.run(command, check=True, stdout=sys.stderr)
    command = [sys.executable, "-m", "mvcr_cli", "eval", "--run", str(run / "weights" / "last.safetensors"),
               str(data), "--json"]  # fmt: skip
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
    seconds = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["cpu_seconds"]
    return 100 * found["top1"]["value"], found["auroc"], found["loss"], seconds


def spread(values: list[float]) -> str:
    digits = 1 if max(values) > 10 else 3
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


if __name__ == "__main__":
    main()
