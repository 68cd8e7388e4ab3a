"""Unseen object scales: the STIR-Emoji benchmark (Altstidl 2022), with the training step and the network of `mvcr`.

Data: `stir_emoji.npz`, X[3 splits, 48 sizes (64 down to 17 px), 36 classes, 64, 64] uint8, one picture of every class at
every size in every split, white on black. Eval 1 trains at 17-32 px, eval 2 at 33-48, eval 3 at 49-64, eval 4 at all sizes;
every test is on all sizes, "unseen" are those outside of the training range.

Resolution jitter leaves every training picture at least 16 px of detail, so eval 1 and 4 have hardly any. "jitter" is
two-sided size jitter of half an octave, as far as a face keeps 16 px and fits the canvas.

Pictures are not centred: black is 0, which is what convolutions pad with. Otherwise every view has a frame as bright as its
faces, the network learns how it lies on the grid of strides, and views of a size that it was not taught fail for that alone.

Every picture is moved at random inside its canvas (the published runs have no augmentation). The network is a small ResNet
(mvcr10n at a quarter of its width, without a stride in the stem: 80,000 parameters), the published ones have two 7x7
convolutions; so the published numbers are a landmark, and only the rows of this table are like for like with each other.

    python examples/stir.py stir_emoji.npz [--trainings plain both] [--evals 1 2 3 4] [--seeds 0 1 2 3 4]

Prints Markdown: mean and standard deviation over the seeds of unseen-scale and seen-scale accuracy, and the cost of a test
picture as a multiple of one view of it. Published unseen-scale accuracy, eval 1/2/3: plain 17.7/39.1/23.7, DISCO
63.0/73.5/53.1, pyramid 65.4/66.5/50.9.
"""

from __future__ import annotations

import argparse
import math
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
from torch import Tensor

from mvcr_cli.config import AugmentConfig, ModelConfig, TrainConfig, half_octaves, parse_layers
from mvcr_cli.data.augment import augment
from mvcr_cli.data.loader import Batch, epoch_order, stable_seed
from mvcr_cli.data.preprocess import Preprocess
from mvcr_cli.engine.loss import taught_sureness
from mvcr_cli.engine.optim import WeightAverage, make_optimiser
from mvcr_cli.engine.session import Session
from mvcr_cli.models import build, config_for
from mvcr_cli.models.mvcr import MultiScaleResNet
from mvcr_cli.models.scale_set import make_view, sureness

SIZES = np.arange(64, 16, -1)  # px, of the second axis of X
RANGES = {1: (17, 32), 2: (33, 48), 3: (49, 64), 4: (17, 64)}
STILL = AugmentConfig(crop=1, zoom=0, shear=0, hflip=False, trivial=0)
BLACK = (0, 0, 0)
PREPROCESS = Preprocess(size=64, mean=(0.0, 0.0, 0.0), std=(0.25, 0.25, 0.25))
WIDE, NARROW, PYRAMID = half_octaves(4, 0.25), half_octaves(2, 0.5), (1.0, 0.5, 0.25)
BATCH = 32
CLASSES = 36
LEAST_FACE = 16  # px


@dataclass(frozen=True)
class Training:
    """How a network is taught. Without a scale set, it is the plain network."""

    taught: tuple[float, ...] = (1.0,)
    unsure: float = 0.0
    resolution: float = 0.0
    octaves: float = 0.0  # of two-sided size jitter


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
    "plain + jitter": Training(octaves=0.5),
    "both + jitter": Training(unsure=0.3, resolution=0.6, octaves=0.5),
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
    parser.add_argument("--every", type=int, default=1, help="test on every n-th size only")
    parser.add_argument(
        "--layers", default="blur,max", help="of every network; global max-pooling, as the published ones have"
    )
    parser.add_argument("--unsure", type=float, help="weight of the uniform target, where one is taught")
    parser.add_argument(
        "--coarsest", type=float, help="of resolution jitter; default: at least 16 px of detail are left"
    )
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
                scales = tuple(sorted({s for how in LOOKINGS[name].values() for s in how.scales}, reverse=True))
                verdicts = all_verdicts(network, pictures[2][:: options.every], scales)
                for label, how in LOOKINGS[name].items():
                    logits, cost = decided(verdicts, scales, how, network)
                    row = (*scored(logits, number, SIZES[:: options.every]), cost, seconds)
                    results.setdefault(label, []).append(row)
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
    jitter = STILL
    if how.resolution:
        jitter = replace(STILL, resolution=how.resolution, coarsest=options.coarsest or coarsest(number))
    unsure = options.unsure if options.unsure is not None and how.unsure else how.unsure
    config = TrainConfig(data=Path(), unsure=unsure, batch=BATCH, lr=3e-3, ema=0.98, seed=seed, augment=jitter)
    model = replace(
        config_for("mvcr10n", CLASSES, scales=how.taught, stem="fine", layers=parse_layers(options.layers)),
        width=options.width,
    )
    model = replace(model, sure=model.sure * taught_sureness(CLASSES, config.label_smoothing))
    session = make_session(config, model)
    per_epoch = len(flat) // BATCH
    steps = (options.epochs // 3 if number == 4 else options.epochs) * per_epoch
    for step in range(steps):
        epoch, position = divmod(step, per_epoch)
        chosen = epoch_order(len(flat), seed, epoch)[position * BATCH : (position + 1) * BATCH]
        images = [moved(flat[index], config, how.octaves, epoch, index) for index in chosen]
        batch = Batch(torch.from_numpy(np.stack(images)), torch.from_numpy(labels[chosen]), ("",) * len(chosen))
        session.step(batch, step, step / steps)
    assert isinstance(session.average.network, MultiScaleResNet)
    return session.average.network


def coarsest(number: int) -> float:
    """How much coarser resolution jitter may make pictures: a face of fewer pixels could be any."""
    return max(1.0, RANGES[number][0] / LEAST_FACE)


def make_session(config: TrainConfig, model: ModelConfig) -> Session:
    torch.manual_seed(config.seed)
    network = build(model).to(memory_format=torch.channels_last).train()
    assert config.lr is not None
    return Session(
        config=config, network=network, average=WeightAverage(network, config.ema),
        optimiser=make_optimiser(network, config.lr, config.weight_decay, set()), preprocess=PREPROCESS,
        device=torch.device("cpu"), dtype=torch.float32, weights=None, scaler=torch.amp.GradScaler("cpu", enabled=False),
    )  # fmt: skip


def moved(picture: NDArray[np.uint8], config: TrainConfig, octaves: float, epoch: int, index: int) -> NDArray[np.uint8]:
    """The face somewhere else inside its canvas, larger or smaller, then augmented. Shape: (64, 64) -> (64, 64, 3)."""
    rng = np.random.default_rng(stable_seed(config.seed, epoch, int(index), "move"))
    rows, columns = np.flatnonzero(picture.any(1)), np.flatnonzero(picture.any(0))
    face = Image.fromarray(picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    if octaves:
        face = resized(face, 2 ** rng.uniform(-octaves, octaves))
    image = Image.new("L", (64, 64))
    top, left = (int(rng.integers(65 - side)) for side in (face.height, face.width))
    image.paste(face, (left, top))
    return augment(image, 64, "pad", config.augment, random.Random(stable_seed(config.seed, epoch, int(index))), BLACK)


def resized(face: Image.Image, factor: float) -> Image.Image:
    """By the factor, as far as the longer side stays between 16 px, which tell the faces apart, and the canvas."""
    longer = max(face.size)
    factor = min(max(factor, min(1.0, LEAST_FACE / longer)), 64 / longer)
    return face.resize(
        (max(1, round(face.width * factor)), max(1, round(face.height * factor))), Image.Resampling.BILINEAR
    )


@torch.inference_mode()
def all_verdicts(network: MultiScaleResNet, pictures: NDArray[np.uint8], scales: tuple[float, ...]) -> Tensor:
    """What every view says of every picture, the views' own batch norms or the nearest. Shape: (views, pictures, classes)."""
    config = network.config
    taught = config.taught or config.scales
    made = build(replace(config, scales=tuple(sorted({*scales, *taught}, reverse=True)), taught=taught))
    assert isinstance(made, MultiScaleResNet)
    made.load_state_dict({n: t for n, t in network.state_dict().items() if n in made.state_dict()}, strict=False)
    made.eval().to(memory_format=torch.channels_last)
    rows = []
    for size in pictures:
        x = PREPROCESS.normalise(torch.from_numpy(size)[:, None].expand(-1, 3, -1, -1))
        x = x.contiguous(memory_format=torch.channels_last)
        rows.append(torch.stack([made.view_logits(make_view(x, s), made.config.scales.index(s)) for s in scales]))
    return torch.cat(rows, 1)


def decided(
    verdicts: Tensor, scales: tuple[float, ...], how: Looking, network: MultiScaleResNet
) -> tuple[Tensor, float]:
    """The verdict on every picture by the rule, and the mean cost of a picture as a multiple of one view."""
    views = [scales.index(scale) for scale in how.scales]
    said = verdicts[views]
    cost = sum(scale**2 for scale in how.scales)
    if how.rule == "own" and network.fusion is not None:
        with torch.inference_mode():
            return network.fusion(list(said)), cost
    if how.rule == "averaged":
        return said.mean(0), cost
    if how.rule == "surest":
        return surest(said), cost
    return cheapest_first(said, how.scales, network.config.sure)


def surest(said: Tensor) -> Tensor:
    return said[sureness(said).argmax(0), torch.arange(said.shape[1])]


def cheapest_first(said: Tensor, scales: tuple[float, ...], sure: float) -> tuple[Tensor, float]:
    """The rule of `MultiScaleResNet.forward_until_sure` on verdicts that are known already."""
    order = sorted(range(len(scales)), key=lambda view: scales[view])
    certain = sureness(said[order])  # V x N
    stops = (certain >= sure).float()
    looked = torch.where(stops.any(0), stops.argmax(0) + 1, len(scales))  # views looked at
    costs = torch.tensor([scales[view] ** 2 for view in order]).cumsum(0)
    unseen = torch.arange(len(scales))[:, None] >= looked[None]
    best = certain.masked_fill(unseen, -1).argmax(0)
    return said[order][best, torch.arange(said.shape[1])], float(costs[looked - 1].mean())


def scored(logits: Tensor, number: int, sizes: NDArray[np.int64]) -> tuple[float, float]:
    """Accuracy in percent at unseen and at seen sizes."""
    right = (logits.argmax(1).reshape(len(sizes), -1) == torch.arange(CLASSES)).numpy()
    low, high = RANGES[number]
    seen = (low <= sizes) & (high >= sizes)
    unseen = right[~seen].mean() if (~seen).any() else np.nan
    return 100 * float(unseen), 100 * float(right[seen].mean())


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation; eval 4 has no unseen sizes."""
    if any(map(math.isnan, values)):
        return "–"
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.1f} ± {deviation:.1f}"


if __name__ == "__main__":
    main()
