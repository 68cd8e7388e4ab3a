"""CPU seconds to 95 % of the final accuracy of a plain resnet18 that is trained the way of torchvision's references.

Data: ELPV (`examples/elpv.py`), 128 px, from scratch. The reference: torchvision's resnet18 and transforms (RandomResizedCrop,
mirror; Resize and CenterCrop), SGD 0.1 with momentum 0.9, weight decay 1e-4, learning rate divided by ten at one and two
thirds of the epochs, float32, batch 32, validation after every epoch. Then `mvcr train`, one step added at a time. The
threshold is 95 % of the reference's accuracy at its last epoch; a run passes it at its first validation that is above.

    python examples/time_to_accuracy.py DATA WORK [--epochs 15] [--ours 30] [--seed 0] [--steps "+ scale set" ...]

CPU seconds are user and system time of the process and its threads from its start, start-up and validations included; they
hardly depend on what else the machine does. The reference reads its pictures in a second process, which is not counted.
Prints Markdown: seconds to the threshold, final accuracy, ratio.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

RECIPE = "--turn --vflip --crop 1 --shear 0 --zoom-range 0.1 --trivial 0.3 --label-smoothing 0"
STEPS = {
    "resnet18 in fp32": "--model resnet18 --no-progressive --precision fp32",
    "+ bf16, where the CPU has it": "--model resnet18 --no-progressive",
    "+ progressive size": "--model resnet18",
    "+ smaller trunk": "--model resnet14n",
    "+ scale set": "--model mvcr14n --scales 1,1/2 --layers blur,gem,heads",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--epochs", type=int, default=15, help="of the reference")
    parser.add_argument("--ours", type=int, default=30, help="epochs of mvcr train")
    parser.add_argument("--imgsz", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--reference", action="store_true", help="be the reference process (internal)")
    options = parser.parse_args()
    if options.reference:
        reference(options)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    curve = reference_curve(options)
    final = curve[-1][1]
    base = first_above(curve, 0.95 * final)
    print("| training | CPU s to the threshold | against the reference | final top-1 % |\n|---|---|---|---|")
    print(f"| torchvision reference, {options.epochs} epochs | {base:.0f} | 1 | {100 * final:.1f} |", flush=True)
    for name in options.steps:
        curve = our_curve(name, options)
        seconds = first_above(curve, 0.95 * final)
        ratio = "never" if seconds is None else f"1/{base / seconds:.1f}"
        shown = "–" if seconds is None else f"{seconds:.0f}"
        print(f"| `mvcr train`, {name} | {shown} | {ratio} | {100 * curve[-1][1]:.1f} |", flush=True)
    print(f"\nThreshold: {95 * final:.1f} %.")


def first_above(curve: list[tuple[float, float]], threshold: float) -> float | None:
    """Curve: (CPU seconds, accuracy) of every validation."""
    return next((seconds for seconds, accuracy in curve if accuracy >= threshold), None)


def reference_curve(options: argparse.Namespace) -> list[tuple[float, float]]:
    """The reference's curve, from its file when it has run already."""
    stored = options.work / f"reference-{options.imgsz}-{options.epochs}-{options.threads}-{options.seed}.json"
    if not stored.exists():
        command = [sys.executable, __file__, *sys.argv[1:], "--reference"]
        stored.write_bytes(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return [tuple(point) for point in json.loads(stored.read_text())]


def our_curve(name: str, options: argparse.Namespace) -> list[tuple[float, float]]:
    key = "".join(letter if letter.isalnum() else "-" for letter in name.strip("+ "))
    run = options.work / f"ours-{key}-{options.imgsz}-{options.ours}-{options.threads}-{options.seed}"
    if not (run / "summary.json").exists():
        command = [sys.executable, "-m", "mvcr_cli", "train", str(options.data), "--run", str(run), "--weights", "none",
                   "--imgsz", str(options.imgsz), "--batch", "32", "--epochs", str(options.ours), "--seed",
                   str(options.seed), "--threads", str(options.threads), *STEPS[name].split(), *RECIPE.split()]  # fmt: skip
        subprocess.run(command, check=True, stdout=sys.stderr)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["cpu_seconds"], row["val_accuracy"]) for row in rows]


def reference(options: argparse.Namespace) -> None:
    import torch
    from torch import nn
    from torch.utils.data import DataLoader
    from torchvision import datasets, models, transforms

    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    normalise = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    side = options.imgsz
    training = transforms.Compose(
        [transforms.RandomResizedCrop(side), transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalise]
    )
    testing = transforms.Compose(
        [transforms.Resize(side * 256 // 224), transforms.CenterCrop(side), transforms.ToTensor(), normalise]
    )
    loaders = [DataLoader(datasets.ImageFolder(str(options.data / folder), transform), 32, shuffle=folder == "train",
                          num_workers=1, drop_last=folder == "train", persistent_workers=True)
               for folder, transform in (("train", training), ("val", testing))]  # fmt: skip
    network = models.resnet18(num_classes=len(loaders[0].dataset.classes))
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.StepLR(optimiser, max(1, options.epochs // 3))
    curve = []
    for epoch in range(options.epochs):
        network.train()
        for x, labels in loaders[0]:
            optimiser.zero_grad()
            nn.functional.cross_entropy(network(x), labels).backward()
            optimiser.step()
        schedule.step()
        network.eval()
        with torch.inference_mode():
            right = sum(int((network(x).argmax(1) == labels).sum()) for x, labels in loaders[1])
        curve.append((cpu_seconds(), right / len(loaders[1].dataset)))
        print(
            f"reference epoch {epoch + 1}: {curve[-1][0]:.0f} s, {100 * curve[-1][1]:.1f} %",
            file=sys.stderr,
            flush=True,
        )
    print(json.dumps(curve))


def cpu_seconds() -> float:
    """User and system time of this process."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    return own.ru_utime + own.ru_stime


if __name__ == "__main__":
    main()
