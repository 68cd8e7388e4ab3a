"""The whole picture at a small size, put together while its strips go by for another purpose: saves a pass over the file."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
MOST_SHRINK = 32  # bounds the rows that wait for those below them


class Glance:
    """Means of squares of pixels.

    Args:
        size: width and height of what comes in strips, in pixels.
        side: the longer side of the result is at least as long, and not twice as long unless the picture is enormous.
    """

    def __init__(self, size: tuple[int, int], side: int) -> None:
        self.shrink = min(MOST_SHRINK, max(1, max(size) // side))
        self._waiting: list[Pixels] = []
        self._parts: list[Pixels] = []

    def add(self, strip: Pixels) -> None:
        """The next rows. Shape: (h, W, 1 or 3)."""
        rows = np.concatenate((*self._waiting, strip))
        ready = len(rows) - len(rows) % self.shrink
        self._waiting = [rows[ready:].copy()]
        if ready:
            self._parts.append(self._reduced(rows[:ready]))

    def image(self) -> Image.Image:
        """After the last strip."""
        rest = [self._reduced(rows) for rows in self._waiting if len(rows)]
        return _image(np.concatenate((*self._parts, *rest)))

    def _reduced(self, rows: Pixels) -> Pixels:
        reduced = np.asarray(_image(rows).reduce(self.shrink))
        return reduced.reshape(*reduced.shape[:2], -1)


def _image(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
