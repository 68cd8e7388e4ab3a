"""Validation during a training: the averaged weights on the validation pictures, and the weights files that come of it."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import numpy as np
import torch

from mvcr_cli import __version__
from mvcr_cli.checkpoint import Checkpoint
from mvcr_cli.engine import Stop, Track
from mvcr_cli.engine.agreement import FREE_SETTINGS
from mvcr_cli.engine.evaluate import infer, none_readable, summarise
from mvcr_cli.engine.feed import Feed
from mvcr_cli.engine.precise_bn import BATCH, with_precise_norms
from mvcr_cli.errors import DataError
from mvcr_cli.models import Network
from mvcr_cli.records import EvalReport

EVALUATION_PIXELS = {"cpu": 8 * 224 * 224}  # of a batch: on a CPU more than that leaves its caches, a tenth slower
MOST_EVALUATED = 64  # pictures a batch ...
MOST_ZOOMED = 16  # ... and with their tiles


def averaged(feed: Feed, stop: Stop) -> Network:
    """The network that is validated and kept: the averaged weights, with batch norms as the settings ask for.

    Cut short by a signal; so is the validation that follows.
    """
    average = feed.session.average.network
    if not feed.config.precise_bn:
        return average
    batch = BATCH if feed.zoom is None else feed.zoom.at_once(BATCH)
    batches = itertools.takewhile(lambda _: not stop(), feed.unaugmented(batch, feed.config.precise_bn))
    return with_precise_norms(average, batches, feed.session.device)


def validate(feed: Feed, network: Network, run: str, step: int, track: Track, stop: Stop) -> EvalReport | None:
    """How good a network is; None when a signal cut it short.

    Raises: DataError when no validation picture can be read, or the verdicts are no numbers.
    """
    session, val, began = feed.session, feed.prepared.val, time.monotonic()
    pixels = EVALUATION_PIXELS.get(session.device.type)
    most = MOST_EVALUATED if feed.zoom is None else feed.zoom.at_once(MOST_ZOOMED)
    batch = most if pixels is None else min(most, max(1, pixels // session.preprocess.size**2))
    shown = track(feed.validation(batch), total=-(-len(val) // batch), label="validating")
    # In float32 whatever the training computes in, as `mvcr eval` does: one network has one accuracy.
    kept, probabilities = infer(network, shown, session.device, torch.float32, stop)
    if stop():
        return None
    if not kept:
        raise none_readable("validation pictures", feed.problems())
    if not np.isfinite(probabilities).all():
        raise DataError(
            f"the network's verdicts are no numbers any more at step {step}",
            "lower --lr; the weights saved before are intact",
        )
    return summarise(
        run=run, data="validation split", labels=np.array([sample.label for sample in kept]),
        probabilities=probabilities, classes=feed.prepared.classes, missing=(), skipped=len(val) - len(kept),
        seconds=time.monotonic() - began,
    )  # fmt: skip


def keep(feed: Feed, network: Network, path: Path, step: int, accuracy: float) -> None:
    """Write a network as a checkpoint that every command can use."""
    session = feed.session
    settings = {key: value for key, value in feed.config.to_dict().items() if key not in FREE_SETTINGS}
    Checkpoint(
        config=session.network.config,
        classes=feed.prepared.classes,
        preprocess=session.preprocess,
        tensors=network.state_dict(),
        made={"by": f"mvcr {__version__}", "step": step, "val_accuracy": accuracy, "settings": settings},
    ).save(path)
