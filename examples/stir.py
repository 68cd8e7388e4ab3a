"""Unseen object scales: the STIR-Emoji benchmark (Altstidl 2022), with the training step and the network of `mvcr`.

Data: `stir_emoji.npz`, X[3 splits, 48 sizes (64 down to 17 px), 36 classes, 64, 64] uint8, one picture of every class at
every size in every split, white on black. Eval 1 trains at 17-32 px, eval 2 at 33-48, eval 3 at 49-64, eval 4 at all sizes;
every test is on all sizes, "unseen" are those outside of the training range. Three-fold: train, validation, test.
Every picture is moved at random inside its canvas (the published runs have no augmentation). The network is a small ResNet
(mvcr10n at half its width: 0.3 million parameters), the published ones have two 7x7 convolutions, so the published numbers are a landmark, not
a like-for-like rival; the rows of this table are like for like with each other.

    python examples/stir.py stir_emoji.npz [--trainings plain both] [--evals 1 2 3 4] [--seeds 0 1 2 3 4]

Prints Markdown: mean and standard deviation over the seeds of unseen-scale and seen-scale accuracy, and the cost of a test
picture as a multiple of one view of it. Published unseen-scale accuracy, eval 1/2/3: plain 17.7/39.1/23.7, DISCO
63.0/73.5/53.1, pyramid 65.4/66.5/50.9.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mvcr_cli.config import AugmentConfig, ModelConfig, TrainConfig, half_octaves
from mvcr_cli.data.augment import augment
from mvcr_cli.data.loader import Batch, epoch_order, stable_seed
from mvcr_cli.data.preprocess import Preprocess
from mvcr_cli.engine.optim import WeightAverage, make_optimiser
from mvcr_cli.engine.session import Session
from mvcr_cli.models import build, config_for
from mvcr_cli.models.mvcr import MultiScaleResNet

SIZES = np.arange(64, 16, -1)  # px, of the second axis of X
RANGES = {1: (17, 32), 2: (33, 48), 3: (49, 64), 4: (17, 64)}
STILL = AugmentConfig(crop=1, zoom=0, shear=0, hflip=False, trivial=0)
BLACK = (0, 0, 0)
WIDE, NARROW, PYRAMID = half_octaves(4, 0.25), half_octaves(2, 0.5), (1.0, 0.5, 0.25)
BATCH = 32


@dataclass(frozen=True)
class Training:
    """How a network is taught. Without a scale set, it is the plain network."""

    taught: tuple[float, ...] = (1.0,)
    unsure: float = 0.0
    resolution: float = 0.0
    zoom: float = 0.0


@dataclass(frozen=True)
class Looking:
    """How a taught network is looked through. "own" is the fusion that it was trained with."""

    scales: tuple[float, ...]
    rule: Literal["own", "averaged", "surest", "cheapest first"] = "surest"


TRAININGS = {
    "plain": Training(),
    "scale set": Training(taught=PYRAMID),
    "resolution": Training(resolution=0.6),
    "unsure": Training(unsure=0.3),
    "both": Training(unsure=0.3, resolution=0.6),
    "plain + jitter": Training(zoom=1.0),
    "both + jitter": Training(unsure=0.3, resolution=0.6, zoom=1.0),
}
ONCE = Looking((1.0,))
EVERY = {
    "five views, surest": Looking(NARROW),
    "nine views, surest": Looking(WIDE),
    "nine views, cheapest first": Looking(WIDE, "cheapest first"),
}
LOOKINGS = {
    "plain": {"one view": ONCE, "pyramid averaged": Looking(PYRAMID, "averaged"), **EVERY},
    "scale set": {"one view": ONCE, "three views": Looking(PYRAMID, "own")},
    "resolution": EVERY,
    "unsure": EVERY,
    "both": {"one view": ONCE, **EVERY},
    "plain + jitter": {"one view": ONCE, "pyramid averaged": Looking(PYRAMID, "averaged"), **EVERY},
    "both + jitter": {"one view": ONCE, **EVERY},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--trainings", nargs="+", default=list(TRAININGS), choices=list(TRAININGS))
    parser.add_argument("--evals", nargs="+", type=int, default=[1, 2, 3, 4], choices=list(RANGES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--epochs", type=int, default=60, help="of eval 1-3; eval 4 has three times the pictures and a third"
    )
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pictures = np.load(options.data)["X"]
    print(
        "| training | views | eval | unseen % | seen % | cost, views | CPU s |\n|---|---|---|---|---|---|---|",
        flush=True,
    )
    for name in options.trainings:
        for number in options.evals:
            results: dict[str, list[tuple[float, ...]]] = {}
            for seed in options.seeds:
                began = time.process_time()
                network = train(pictures[0][seen_sizes(number)], TRAININGS[name], seed, number, options)
                seconds = time.process_time() - began
                for label, looking in LOOKINGS[name].items():
                    results.setdefault(label, []).append((*test(network, pictures[2], looking, number), seconds))
            for label, values in results.items():
                print(
                    f"| {name} | {label} | {number} | " + " | ".join(map(spread, zip(*values, strict=True))) + " |",
                    flush=True,
                )


def seen_sizes(number: int) -> NDArray[np.bool_]:
    low, high = RANGES[number]
    return (low <= SIZES) & (high >= SIZES)


def train(pictures: NDArray[np.uint8], how: Training, seed: int, number: int,
          options: argparse.Namespace) -> MultiScaleResNet:  # fmt: skip
    """Pictures: (sizes, classes, 64, 64)."""
    flat = pictures.reshape(-1, 64, 64)
    labels = np.tile(np.arange(pictures.shape[1]), pictures.shape[0])
    config = TrainConfig(data=Path(), unsure=how.unsure, batch=BATCH, lr=3e-3, seed=seed,
                         augment=replace(STILL, resolution=how.resolution, zoom=how.zoom))  # fmt: skip
    model = replace(config_for("mvcr10n", 36, scales=how.taught, stem="fine"), width=options.width)
    session = make_session(config, model)
    per_epoch = len(flat) // BATCH
    steps = (options.epochs // 3 if number == 4 else options.epochs) * per_epoch
    for step in range(steps):
        epoch, position = divmod(step, per_epoch)
        chosen = epoch_order(len(flat), seed, epoch)[position * BATCH : (position + 1) * BATCH]
        images = [moved(flat[index], config, epoch, index) for index in chosen]
        batch = Batch(torch.from_numpy(np.stack(images)), torch.from_numpy(labels[chosen]), ("",) * len(chosen))
        session.step(batch, step, step / steps)
    assert isinstance(session.average.network, MultiScaleResNet)
    return session.average.network


def make_session(config: TrainConfig, model: ModelConfig) -> Session:
    torch.manual_seed(config.seed)
    network = build(model).to(memory_format=torch.channels_last).train()
    assert config.lr is not None
    return Session(
        config=config, network=network, average=WeightAverage(network, config.ema),
        optimiser=make_optimiser(network, config.lr, config.weight_decay, set()), preprocess=Preprocess(size=64),
        device=torch.device("cpu"), dtype=torch.float32, weights=None, scaler=torch.amp.GradScaler("cpu", enabled=False),
    )  # fmt: skip


def moved(picture: NDArray[np.uint8], config: TrainConfig, epoch: int, index: int) -> NDArray[np.uint8]:
    """The picture somewhere else inside its canvas, then augmented. Shape: (64, 64) -> (64, 64, 3)."""
    rng = np.random.default_rng(stable_seed(config.seed, epoch, int(index), "move"))
    rows, columns = np.flatnonzero(picture.any(1)), np.flatnonzero(picture.any(0))
    down = rng.integers(-rows[0], 64 - rows[-1])
    right = rng.integers(-columns[0], 64 - columns[-1])
    image = Image.fromarray(np.roll(picture, (down, right), (0, 1)))
    return augment(image, 64, "pad", config.augment, random.Random(stable_seed(config.seed, epoch, int(index))), BLACK)


def looked_through(network: MultiScaleResNet, how: Looking) -> MultiScaleResNet:
    """The same weights, looked through in another way."""
    config = network.config
    if how.rule != "own":
        config = replace(config, scales=how.scales, taught=(1.0,), surest=how.rule != "averaged")
    made = build(config)
    assert isinstance(made, MultiScaleResNet)
    tensors = network.state_dict()
    if how.rule != "own" and made.fusion is not None:
        tensors |= {"fusion.beta": torch.tensor(1.0), "fusion.log_tau": torch.tensor(-20.0)}  # all views count alike
    made.load_state_dict({name: tensor for name, tensor in tensors.items() if name in made.state_dict()})
    made.look = "auto" if how.rule == "cheapest first" else "all"
    return made.eval().to(memory_format=torch.channels_last)


@torch.inference_mode()
def test(network: MultiScaleResNet, pictures: NDArray[np.uint8], how: Looking, number: int) -> tuple[float, ...]:
    """Unseen and seen accuracy in percent, and the mean cost of a picture as a multiple of one view."""
    network, preprocess = looked_through(network, how), Preprocess(size=64)
    correct, costs = [], []
    for size in pictures:
        x = preprocess.normalise(torch.from_numpy(size)[:, None].expand(-1, 3, -1, -1))
        x = x.contiguous(memory_format=torch.channels_last)
        if network.look == "auto":
            logits, cost = network.forward_until_sure(x)
            costs.append(float(cost.mean()))
        else:
            logits = network(x)
            costs.append(sum(network.config.scales[view] ** 2 for view in network.views_at(64)))
        correct.append((logits.argmax(1) == torch.arange(len(x))).numpy())
    right, seen = np.stack(correct), seen_sizes(number)
    unseen = right[~seen].mean() if (~seen).any() else np.nan
    return 100 * float(unseen), 100 * float(right[seen].mean()), statistics.mean(costs)


def spread(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.1f} ± {deviation:.1f}"


if __name__ == "__main__":
    main()
