"""Networks ready to be timed: in eager mode with a training session, or in onnxruntime, on one batch of random pictures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvcr_cli.checkpoint import Checkpoint
from mvcr_cli.config import EvalConfig, Look, ModelConfig, Precision, TrainConfig
from mvcr_cli.data.loader import Batch
from mvcr_cli.data.preprocess import Preprocess
from mvcr_cli.data.tiles import MARGIN, TileBatch
from mvcr_cli.engine import autocast, default_threads, pick_precision
from mvcr_cli.engine.optim import WeightAverage, make_optimiser
from mvcr_cli.engine.session import Session
from mvcr_cli.engine.zoom_step import look
from mvcr_cli.models import Network, build, mac_count_of, parameter_count, plain_twin, useful_scales
from mvcr_cli.models.mvcr import MultiScaleResNet, trunk_side
from mvcr_cli.models.zoom import ZoomResNet

LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Machine:
    """Where and how everything is computed: forwards in `dtype`, training steps in `train_dtype`."""

    device: torch.device
    dtype: torch.dtype
    train_dtype: torch.dtype
    threads: int

    @classmethod
    def of(cls, device: torch.device, precision: Precision, threads: int | None) -> Machine:
        """Raises: ConfigMismatch when the device has no such precision."""
        judges: Precision = EvalConfig.precision if precision == "auto" else precision
        dtypes = pick_precision(judges, device), pick_precision(precision, device)
        return cls(device, *dtypes, default_threads(threads))


@dataclass(frozen=True)
class Entry:
    """One network at one size, looked through in one way, and what it costs by count.

    "auto" is counted and timed at its best: the first view is sure at once. At its worst it costs what "all" does.
    """

    checkpoint: Checkpoint
    look: Look
    parameters: int
    mac: int

    @classmethod
    def of(cls, checkpoint: Checkpoint, look: Look = "all") -> Entry:
        with torch.device("meta"):  # counting needs no arithmetic
            network = looking(build(checkpoint.config), look).eval()
            size = checkpoint.preprocess.size
            x, tiles = torch.zeros(1, 3, size, size), some_tiles(checkpoint.config, 1)
            if look == "auto" and isinstance(
                network, MultiScaleResNet
            ):  # its choice needs numbers, its first view none
                view = min(network.views_at(size), key=lambda view: checkpoint.config.scales[view])
                mac = mac_count_of(lambda: network.look_at(x, view))
            else:
                mac = mac_count_of(lambda: judge(network, x, tiles, checkpoint.preprocess))
        return cls(checkpoint, look, parameter_count(network), mac)

    @property
    def name(self) -> str:
        return self.checkpoint.config.name

    @property
    def size(self) -> int:
        return self.checkpoint.preprocess.size


def looks_of(config: ModelConfig, size: int) -> tuple[Look, ...]:
    """The ways to look through a network at `size` pixels that differ."""
    scales = useful_scales(config.scales, trunk_side(size, config.detail), config.stem)
    if len(scales) == 1:
        return ("all",)
    return ("all", "1", "auto") if config.zoom is None else ("all", "1")


def looking(network: Network, look: Look) -> Network:
    """The network, set to look this way; "auto" ends after the first view."""
    network.look = look
    if isinstance(network, MultiScaleResNet):
        network.sure = -1.0
    return network


def plain_config(config: ModelConfig) -> ModelConfig | None:
    """The plain ResNet on the same trunk; None for a model that is plain already."""
    name = plain_twin(config.name)
    if name is None:
        return None
    plain = replace(config, name=name, scales=(1.0,), blur=False, gem=False, max=False, heads=False)
    return replace(plain, sacs=(), detail=False, sift=False, zoom=None)


def some_tiles(config: ModelConfig, batch: int) -> TileBatch | None:
    """Candidates of black pictures, on torch's default device; None for a network that does not zoom."""
    if config.zoom is None:
        return None
    count, side = config.zoom.candidates, config.zoom.tile_px + 2 * MARGIN
    return TileBatch(torch.zeros(batch, count, 3, side, side, dtype=torch.uint8), torch.zeros(batch, count))


def judge(network: Network, x: Tensor, tiles: TileBatch | None, preprocess: Preprocess) -> None:
    """Whatever a network computes for a verdict."""
    if isinstance(network, ZoomResNet) and tiles is not None:
        look(network, x, tiles, preprocess)
    else:
        network(x)


def untrained(config: ModelConfig, preprocess: Preprocess) -> Checkpoint:
    """A checkpoint with random weights and numbers for class names."""
    classes = tuple(str(number) for number in range(config.classes))
    return Checkpoint(config=config, classes=classes, preprocess=preprocess, tensors=build(config).state_dict())


@dataclass
class EagerContender:
    """A network with one batch; `session` is what its training steps change, and None when it never trains."""

    network: Network
    machine: Machine
    batch: Batch
    x: Tensor  # N x 3 x S x S, normalised, on the device
    tiles: TileBatch | None  # on the device
    preprocess: Preprocess
    session: Session | None

    @classmethod
    def ready(cls, entry: Entry, batch: int, machine: Machine, *, trains: bool) -> EagerContender:
        preprocess = entry.checkpoint.preprocess
        network = looking(entry.checkpoint.network(), entry.look)
        network = network.to(machine.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        pictures = torch.from_numpy(random_pictures(batch, entry.size))
        tiles = some_tiles(entry.checkpoint.config, batch)
        x = preprocess.normalise(pictures.to(machine.device).permute(0, 3, 1, 2))
        return cls(
            network=network,
            machine=machine,
            batch=Batch(pictures, torch.arange(batch) % entry.checkpoint.config.classes, (), tiles),
            tiles=None if tiles is None else tiles.to(machine.device),
            preprocess=preprocess,
            x=x.contiguous(memory_format=torch.channels_last),
            session=training_session(entry.checkpoint, network, machine) if trains else None,
        )

    @torch.inference_mode()
    def forward(self) -> None:
        with autocast(self.machine.device, self.machine.dtype):
            judge(self.network, self.x, self.tiles, self.preprocess)

    def train(self) -> None:
        assert self.session is not None
        # At the end of a run the learning rate is 0: the arithmetic is the same, and random labels spoil nothing.
        self.session.step(self.batch, 0, 1.0)

    @classmethod
    def worked(cls, entry: Entry, batch: int, machine: Machine, *, trains: bool) -> EagerContender:
        """One that has been at its peak memory: in a second step all moments and gradients are there."""
        contender = cls.ready(entry, batch, machine, trains=trains)
        contender.network.train(trains)
        for _ in range(2):
            if trains:
                contender.train()
            else:
                contender.forward()
        return contender


def training_session(checkpoint: Checkpoint, network: Network, machine: Machine) -> Session:
    """What `mvcr train` makes of its default settings, with doubt for a network that has learned to doubt."""
    made = checkpoint.made.get("settings")
    doubts = isinstance(made, dict) and bool(made.get("unsure"))  # the cost does not depend on its weight
    config = TrainConfig(data=Path(), lr=LEARNING_RATE, unsure=float(doubts))
    return Session(
        config=config,
        network=network,
        average=WeightAverage(network, config.ema),
        optimiser=make_optimiser(network, LEARNING_RATE, config.weight_decay, set()),
        preprocess=checkpoint.preprocess,
        device=machine.device,
        dtype=machine.train_dtype,
        weights=None,
        scaler=torch.amp.GradScaler(machine.device.type, enabled=machine.train_dtype == torch.float16),
    )


@dataclass
class OnnxContender:
    """An exported network in onnxruntime, on the CPU. Shape: pictures (N, S, S, 3) uint8."""

    session: Any
    pictures: NDArray[np.uint8]

    @classmethod
    def worked(cls, graph: bytes, size: int, batch: int, machine: Machine) -> OnnxContender:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = machine.threads
        # Threads that spin after their work would slow down, and be counted with, whoever is timed next.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        contender = cls(session, random_pictures(batch, size))
        contender.forward()
        return contender

    def forward(self) -> None:
        self.session.run(None, {"images": self.pictures})


def random_pictures(count: int, side: int) -> NDArray[np.uint8]:
    """Shape: (N, side, side, 3)."""
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
