"""Schedules as pure functions of the progress of a run, a number from 0 (first step) to 1 (end)."""

from __future__ import annotations

import math


def lr_factor(progress: float, warmup: float) -> float:
    """Linear warm-up, then half a cosine to 0; a share of the peak learning rate."""
    if progress < warmup:
        return max(progress / warmup, 1e-3)
    through = min(1.0, (progress - warmup) / (1 - warmup))
    return 0.5 * (1 + math.cos(math.pi * through))


def doubt_share(progress: float) -> float:
    """Share of `--unsure` that counts: nothing while the network is young, then growing from 0.4 to all of it at 0.6.

    A network that knows nothing yet is unsure of everything; asked to be so, it begins to learn late or never.
    """
    return min(1.0, max(0.0, (progress - 0.4) / 0.2))


def training_side(size: int, crop: float) -> int:
    """Side in pixels of the last training pictures, so that objects have the size that they have in evaluation.

    A random crop that keeps an area share between `crop` and 1 enlarges what it shows by `1 / sqrt(share)`; evaluation
    shows the whole picture at `size`. Training on smaller pictures takes the enlargement back, and is cheaper.

    Sources: Touvron et al. 2019 (arXiv 1906.06423), who enlarge the test pictures instead.
    """
    return min(size, 8 * math.floor(size * math.sqrt((1 + crop) / 2) / 8 + 0.5))


def size_at(progress: float, size: int) -> int:
    """Side in pixels of the training pictures: half size for the first half, then growing to full size at 0.8.

    Sources: progressive resizing of FFCV's `train_imagenet.py` and Composer; convolutions cost the square of the side,
    so half of the run costs a quarter, and small pictures act as a regulariser while the network is young.
    """
    floor = max(32, size // 2)
    if size <= floor or progress >= 0.8:
        return size
    if progress < 0.5:
        return _multiple(floor, size)
    return _multiple(floor + (size - floor) * (progress - 0.5) / 0.3, size)


def _multiple(side: float, size: int) -> int:
    """The nearest multiple of 16 pixels, not above `size`."""
    return min(size, max(16, 16 * math.floor(side / 16 + 0.5)))


def ema_decay(step: int, decay: float) -> float:
    """Decay of the weight average: short memory at first, so that the random start is forgotten."""
    return min(decay, (1 + step) / (10 + step))


def lessons(epoch: int) -> int:
    """How often, before `epoch` (the first is 0), a zooming network's own proposal of tiles has been renewed: after 2, 6,
    18, 54, ... epochs.

    Each time all pictures are searched anew, so the pauses grow.
    """
    count, at = 0, 2
    while epoch >= at:
        count, at = count + 1, 3 * at
    return count
