"""Accuracy when objects change size: trained at one size, tested at 1/4 to 4 times, plain ResNet beside MVCR.

Data: any folder with train and val (`examples/elpv.py`, `examples/digits.py`), from scratch. All networks have the same trunk,
recipe, two-sided size jitter (--zoom-range) and budget; with `--budget "--time 2m"` the same wall time, with `--epochs` the
same pictures, though doubt takes a third more time a step. "plain ResNet" is what it says; all other rows have the same
layers, `blur,max`. One such network without doubt gives three rows, because views cost no training: looked at once, its
verdicts over all views averaged (pyramid test-time augmentation), and the surest view alone. The last rows train
resolution jitter (--resolution), doubt at foreign scales (--unsure), and both.

    python examples/scale_curve.py DATA WORK [--budget "--time 2m"] [--seeds 0 1 2] [--trunk 10n] [--imgsz 64] [--views 2..1/4]
                                   [--trainings plain "resolution jitter, unsure"] [--options "--turn --vflip ..."]

Accuracy by `mvcr eval DATA --scales 1/4,1/2,1,2,4`: pictures re-rendered at each factor, nothing cut off, the last weights.
Prints Markdown: mean and standard deviation over the seeds of the area under the curve over log2 size, the worst size, size 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from mvcr_cli.checkpoint import Checkpoint
from mvcr_cli.config import parse_scales

RESNET = "plain ResNet"
OURS = "--model mvcr{trunk} --scales 1 --layers blur,max"
TRAINED = {
    RESNET: "--model resnet{trunk}",
    "plain": OURS,
    "resolution jitter": f"{OURS} --resolution 0.6",
    "unsure": f"{OURS} --unsure 0.3",
    "resolution jitter, unsure": f"{OURS} --resolution 0.6 --unsure 0.3",
}
LOOKS = {RESNET: ("once",), "plain": ("once", "averaged", "surest")}  # any other: the surest
AVERAGED = -20.0  # logarithm of a sharpness so low that all views count alike


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument(
        "--budget", default="--time 2m", help="options of mvcr train that end a run: --time 2m, --epochs 30"
    )
    parser.add_argument("--trainings", nargs="+", default=list(TRAINED), choices=list(TRAINED))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--trunk", default="10n")
    parser.add_argument("--imgsz", type=int, default=64)
    parser.add_argument("--views", default="2..1/4")
    parser.add_argument("--factors", default="1/4,1/2,1,2,4")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--options", default="", help="further options of mvcr train, the same for all")
    options = parser.parse_args()
    rows: dict[str, list[dict[str, object]]] = {}
    for seed in options.seeds:
        for name in options.trainings:
            run = trained(name, seed, options)
            for label, weights in looked_through(run, name, options):
                rows.setdefault(label, []).append(curve(weights, options))
    print("| training, views | area % | worst size % | size 1 % |\n|---|---|---|---|")
    for label, curves in rows.items():
        keys = ("area", "worst_accuracy", "accuracy_at_1")
        print(f"| {label} | " + " | ".join(spread([100 * float(c[key]) for c in curves]) for key in keys) + " |")  # type: ignore[arg-type]
    print(
        "\n| training, views | "
        + " | ".join(f"{p['factor']:.2f}" for p in next(iter(rows.values()))[0]["points"])
        + " |"
    )  # type: ignore[attr-defined]
    for label, curves in rows.items():
        points = zip(*(c["points"] for c in curves), strict=True)  # type: ignore[call-overload]
        print(f"| {label} | " + " | ".join(f"{mean_accuracy(point):.1f}" for point in points) + " |")


def mean_accuracy(points: tuple[dict[str, dict[str, float]], ...]) -> float:
    return 100 * statistics.mean(point["accuracy"]["value"] for point in points)


def trained(name: str, seed: int, options: argparse.Namespace) -> Path:
    command = [str(options.data), "--weights", "none", "--imgsz", str(options.imgsz), "--seed", str(seed), "--threads",
               str(options.threads), *shlex.split(TRAINED[name].format(trunk=options.trunk)),
               *shlex.split(options.budget), *shlex.split(options.options)]  # fmt: skip
    run: Path = options.work / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}-{key(command)}"
    if not (run / "summary.json").exists():
        command = [sys.executable, "-m", "mvcr_cli", "train", *command, "--run", str(run)]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return run


def key(command: list[str]) -> str:
    """Tells what was run with other settings apart."""
    return hashlib.sha256(repr(command).encode()).hexdigest()[:8]


def looked_through(run: Path, name: str, options: argparse.Namespace) -> list[tuple[str, Path]]:
    """The same weights as files that look once, and through all views with one rule or another."""
    last = run / "weights" / "last.safetensors"
    checkpoint, files = Checkpoint.load(last), []
    for look in LOOKS.get(name, ("surest",)):
        if look == "once":
            files.append((f"{name}, one view", last))
            continue
        config = replace(checkpoint.config, scales=parse_scales(options.views), taught=(1.0,), surest=look == "surest")
        fusion = {"fusion.beta": torch.tensor(1.0), "fusion.log_tau": torch.tensor(AVERAGED)}
        file = run / f"{look}-{key([options.views])}.safetensors"
        replace(checkpoint, config=config, tensors=checkpoint.tensors | fusion).save(file)
        files.append((f"{name}, {len(config.scales)} views, {look}", file))
    return files


def curve(weights: Path, options: argparse.Namespace) -> dict[str, object]:
    stored = weights.with_suffix(f".{key([options.factors])}.json")
    if not stored.exists():
        command = [sys.executable, "-m", "mvcr_cli", "eval", str(options.data), "--run", str(weights),
                   "--scales", options.factors, "--json"]  # fmt: skip
        stored.write_bytes(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    found: dict[str, object] = json.loads(stored.read_text())["curve"]
    return found


def spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.1f} ± {deviation:.1f}"


if __name__ == "__main__":
    main()
