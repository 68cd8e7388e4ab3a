"""Prediction: a stream of records in the order of the inputs, one a picture, whatever becomes of it."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mvcr_cli import weights
from mvcr_cli.checkpoint import Checkpoint, load_bare
from mvcr_cli.config import PredictConfig
from mvcr_cli.data.folder import iter_images
from mvcr_cli.data.images import load_picture
from mvcr_cli.data.loader import ordered
from mvcr_cli.data.preprocess import Preprocess
from mvcr_cli.engine import (
    EXPORT_SUFFIXES,
    RUNS,
    Say,
    Track,
    default_workers,
    find_run,
    pick_device,
    run_directory,
    say_nothing,
    silent,
)
from mvcr_cli.engine.evaluate import probabilities_of
from mvcr_cli.errors import BadImage, ConfigMismatch, InputMissing, MvcrError, NotPermitted, Unavailable
from mvcr_cli.models import build, config_for, load_trunk
from mvcr_cli.paths import display_name
from mvcr_cli.records import Label, Prediction, Problem

IMAGENET_MODEL = "mvcr18"


@dataclass(frozen=True, slots=True)
class Ready:
    """One picture read and preprocessed; width and height of the original in pixels."""

    path: str
    width: int
    height: int
    input: NDArray[np.generic]


class Predictor(Protocol):
    """A network ready to judge pictures, whatever runs it."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def size(self) -> int:
        """Side in pixels of the network's input."""

    def read(self, image: Image.Image) -> NDArray[np.generic]:
        """What `probabilities` takes, for one upright RGB picture; called in a reader thread."""

    def probabilities(self, inputs: list[NDArray[np.generic]]) -> NDArray[np.float64]:
        """Shape: N inputs -> (N, K), rows sum to 1."""


def predict(config: PredictConfig, *, stdin: Iterable[bytes] = (), track: Track = silent,
            say: Say = say_nothing) -> Iterator[Prediction | Problem]:  # fmt: skip
    """Records in input order; a bad input becomes a `Problem` and the rest goes on.

    Names that come through a pipe are answered one by one, so that a slow producer gets each answer at once.

    Args:
        stdin: lines with file names, read when an input is "-".

    Raises: InputMissing when there is no model; CheckpointError when it cannot be used.
    """
    predictor = open_predictor(config, say)
    piped = "-" in config.inputs
    batch = 1 if piped else config.batch
    workers = max(1, default_workers(config.workers))
    inputs = track(expand(config.inputs, stdin), total=None, label="predicting")
    read = ordered(lambda entry: _read(entry, predictor), inputs, workers, 0 if piped else 2 * batch)
    group: list[Ready] = []
    first = True  # the first picture goes alone, so that a reader sees a record at once
    for _, item in read:
        if isinstance(item, Problem):
            yield from _judge(group, predictor, config.topk)
            group = []
            yield item
            continue
        group.append(item)
        if first or len(group) == batch:
            yield from _judge(group, predictor, config.topk)
            group, first = [], False
    yield from _judge(group, predictor, config.topk)


def expand(inputs: Iterable[str], stdin: Iterable[bytes]) -> Iterator[str | Problem]:
    """Files, folders, glob patterns and "-" as single files, in order."""
    for entry in inputs:
        if entry == "-":
            names = (os.fsdecode(line.rstrip(b"\r\n")) for line in stdin)
            yield from (name for name in names if name)
        elif os.path.isdir(entry):
            yield from _folder(entry)
        elif not os.path.lexists(entry) and glob.has_magic(entry):
            # A pattern means files: `**` also finds every folder on the way to them.
            files = (name for name in glob.iglob(entry, recursive=True) if not os.path.isdir(name))
            found = sorted(files, key=os.fsencode)
            yield from found
            if not found:
                yield Problem(path=entry, code="missing", detail="the pattern matches no file")
        else:
            yield entry


def _folder(entry: str) -> Iterator[str | Problem]:
    """The pictures below a folder; a folder that gives none is a record, too."""
    try:
        found = iter_images(Path(entry))
    except NotPermitted:
        yield Problem(path=entry, code="permission", detail="the folder may not be read")
        return
    except (MvcrError, OSError):  # it was there a moment ago
        yield Problem(path=entry, code="missing", detail="no such folder any more")
        return
    empty = True
    for item in found:
        empty = False
        yield item
    if empty:
        yield Problem(path=entry, code="missing", detail="no picture in this folder")


def _read(entry: str | Problem, predictor: Predictor) -> Ready | Problem:
    if isinstance(entry, Problem):
        return entry
    try:
        picture = load_picture(entry, 2 * predictor.size)
    except BadImage as bad:
        return Problem(path=entry, code=bad.code, detail=bad.detail)
    return Ready(entry, picture.width, picture.height, predictor.read(picture.image))


def _judge(group: list[Ready], predictor: Predictor, topk: int) -> Iterator[Prediction]:
    if not group:
        return
    for ready, row in zip(group, predictor.probabilities([ready.input for ready in group]), strict=True):
        best = np.argsort(-row, kind="stable")[:topk]
        labels = tuple(Label(label=predictor.classes[index], probability=float(row[index])) for index in best)
        yield Prediction(
            path=ready.path,
            label=labels[0].label,
            probability=labels[0].probability,
            topk=labels,
            width=ready.width,
            height=ready.height,
        )


class TorchPredictor:
    """A checkpoint's network in PyTorch."""

    def __init__(self, checkpoint: Checkpoint, config: PredictConfig) -> None:
        self.classes = checkpoint.classes
        self.size = checkpoint.preprocess.size
        self._preprocess = checkpoint.preprocess
        self._device = pick_device(config.device)
        self._network = checkpoint.network().to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._network.look = config.views

    def read(self, image: Image.Image) -> NDArray[np.generic]:
        return self._preprocess.tensor(image).numpy()

    def probabilities(self, inputs: list[NDArray[np.generic]]) -> NDArray[np.float64]:
        x = torch.from_numpy(np.stack(inputs))
        return probabilities_of(self._network, x, self._device, torch.float32).numpy()


def open_predictor(config: PredictConfig, say: Say) -> Predictor:
    """The model of `--run`, else of the newest finished run, else the ImageNet network.

    Raises: InputMissing with the commands that help.
    """
    if config.run is None and not any(RUNS.glob("*/summary.json")):
        return TorchPredictor(_imagenet(config, say), config)
    path = find_run(config.run)
    if config.run is None:
        say(f"run: {display_name(run_directory(path) or path)}")
    if path.suffix in EXPORT_SUFFIXES:
        from mvcr_cli.engine.onnx_predictor import OnnxPredictor

        if config.views != "all":
            raise ConfigMismatch(
                f"{display_name(path)} looks through all its views: they are part of an exported file",
                "leave --views out, or name the run",
            )
        return OnnxPredictor(path)
    return TorchPredictor(Checkpoint.load(path), config)


def _imagenet(config: PredictConfig, say: Say) -> Checkpoint:
    """The pretrained network as a checkpoint; class names come with torchvision."""
    try:
        tensors = load_bare(weights.pretrained(IMAGENET_MODEL, offline=config.offline, say=say))
    except Unavailable as error:
        raise InputMissing(
            f"there is no finished run below ./runs, and {error.message}",
            "train one: mvcr train DATA   or name one: mvcr predict IMAGE --run runs/NAME",
        ) from error
    from torchvision.models import ResNet18_Weights

    classes = tuple(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
    network = build(config_for(IMAGENET_MODEL, len(classes)), exact=True)
    load_trunk(network, tensors)
    say(f"run: none; using {IMAGENET_MODEL} with ImageNet weights")
    preprocess = Preprocess(size=224)
    return Checkpoint(config=network.config, classes=classes, preprocess=preprocess, tensors=network.state_dict())
