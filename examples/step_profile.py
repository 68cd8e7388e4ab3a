"""Where the processor time of training goes: reading, and the operators of a step, counted by PyTorch's profiler.

Data: any folder with train, or with a folder a class (`examples/elpv.py`); its first pictures only. One thread, everything in
this process, from random weights, the full size (the expensive end of progressive resolution), options of `mvcr train`
at their defaults.

    python examples/step_profile.py DATA [--models resnet14n mvcr14n] [--imgsz 128] [--batch 32] [--steps 20]

Prints Markdown: share of the processor time of a step and of the reading of its pictures. Reading is counted twice: the first
epoch decodes, the later ones take decoded pictures from the cache and only augment.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from mvcr_cli.config import TrainConfig
from mvcr_cli.data.folder import Sample, find_layout, scan
from mvcr_cli.data.loader import Batch, PixelCache, Step, TrainingReader, decode_side
from mvcr_cli.data.preprocess import Preprocess
from mvcr_cli.engine.optim import WeightAverage, make_optimiser
from mvcr_cli.engine.session import Session
from mvcr_cli.models import build, config_for

WARM = 3  # steps before the profile
PARTS = {  # the first pattern that an operator's name contains decides
    "convolutions": ("conv", "addmm", "mm", "linear"),
    "batch norms": ("batch_norm",),
    "optimiser": ("adam", "_foreach_norm", "_foreach_mul", "linalg_vector_norm", "clip"),
    "average of the weights": ("lerp",),
    "activations, sums, pooling": ("relu", "threshold", "add", "pool", "clamp", "pow", "mean", "upsample"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--models", nargs="+", default=["resnet14n", "mvcr14n"])
    parser.add_argument("--imgsz", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    samples = scan(find_layout(options.data).train).samples[: options.batch * (options.steps + WARM)]
    config = TrainConfig(data=options.data, batch=options.batch, lr=1e-3, imgsz=options.imgsz)
    first, later, batches = read(samples, config)
    columns = {}
    for name in options.models:
        spent = profiled(name, len({sample.label for sample in samples}), batches, config)
        columns[name] = {"reading, first epoch": first, "reading, later epochs": later, **spent}
    print("| share of a step's processor time | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for part in next(iter(columns.values())):
        cells = (f"{100 * spent[part] / step_seconds(spent):.1f} %" for spent in columns.values())
        print(f"| {part} | " + " | ".join(cells) + " |")


def step_seconds(spent: dict[str, float]) -> float:
    return sum(seconds for part, seconds in spent.items() if not part.startswith("reading"))


def read(samples: tuple[Sample, ...], config: TrainConfig) -> tuple[float, float, list[Batch]]:
    """Processor seconds a batch with and without decoding, and the batches."""
    assert config.batch is not None and config.imgsz is not None
    preprocess = Preprocess(size=config.imgsz)
    reader = TrainingReader(
        PixelCache(1 << 30),
        preprocess,
        config.augment,
        decode_side(config.imgsz, config.augment),
        config.seed,
        workers=0,
    )
    seconds = []
    for epoch in range(2):
        steps = (Step(epoch, config.imgsz, tuple(chosen)) for chosen in batched(samples, config.batch))
        began = time.process_time()
        batches = [batch for _, batch in reader.batches(steps) if batch is not None]
        seconds.append((time.process_time() - began) / len(batches))
    return seconds[0], seconds[1], batches


def batched(samples: tuple[Sample, ...], count: int) -> Iterator[tuple[Sample, ...]]:
    rest = iter(samples)
    while chosen := tuple(itertools.islice(rest, count)):
        yield chosen


def profiled(name: str, classes: int, batches: list[Batch], config: TrainConfig) -> dict[str, float]:
    """Processor seconds a step, by part."""
    session = make_session(name, classes, config)
    for step, batch in enumerate(batches[:WARM]):
        session.step(batch, step, 0.5)
    with profile(activities=[ProfilerActivity.CPU]) as record:
        for step, batch in enumerate(batches[WARM:], WARM):
            session.step(batch, step, 0.5)
    spent: dict[str, float] = dict.fromkeys((*PARTS, "the rest"), 0.0)
    for event in record.key_averages():
        part = next((part for part, names in PARTS.items() if any(n in event.key for n in names)), "the rest")
        spent[part] += event.self_cpu_time_total / 1e6 / len(batches[WARM:])
    return spent


def make_session(name: str, classes: int, config: TrainConfig) -> Session:
    assert config.lr is not None and config.imgsz is not None
    torch.manual_seed(config.seed)
    network = build(config_for(name, classes)).to(memory_format=torch.channels_last).train()
    return Session(
        config=config, network=network, average=WeightAverage(network, config.ema),
        optimiser=make_optimiser(network, config.lr, config.weight_decay, set()), preprocess=Preprocess(size=config.imgsz),
        device=torch.device("cpu"), dtype=torch.float32, weights=None, scaler=torch.amp.GradScaler("cpu", enabled=False),
    )  # fmt: skip


if __name__ == "__main__":
    main()
