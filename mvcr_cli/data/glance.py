"""The whole picture at a small size, put together while its strips go by for another purpose: saves a pass over the file."""

from __future__ import annotations

import numpy as np
from PIL import Image

from mvcr_cli.data.turning import Pixels

MOST_SHRINK = 32  # bounds the rows that wait for those below them


class GlanceOfStrips:
    """A picture shrunk by a whole number: every pixel is the mean of `shrink` x `shrink`, of fewer at the right and the bottom.

    Args:
        size: width and height of what comes in strips, in pixels.
        side: the longer side of the result is at least as long, and not twice as long unless the picture is enormous.
    """

    def __init__(self, size: tuple[int, int], side: int) -> None:
        self.shrink = min(MOST_SHRINK, max(1, max(size) // side))
        self._width, self._height = (-(-length // self.shrink) for length in size)
        self._pixels: Pixels | None = None
        self._filled = 0
        self._waiting: Pixels | None = None

    def add(self, strip: Pixels) -> None:
        """The next rows. Shape: (h, W, 1 or 3)."""
        rows = strip if self._waiting is None else np.concatenate((self._waiting, strip))
        ready = len(rows) - len(rows) % self.shrink
        self._fill(rows[:ready])
        self._waiting = rows[ready:].copy()

    def image(self) -> Image.Image:
        """After the last strip."""
        assert self._waiting is not None and self._pixels is not None
        self._fill(self._waiting)
        return _image(self._pixels)

    def _fill(self, rows: Pixels) -> None:
        if self._pixels is None:
            self._pixels = np.empty((self._height, self._width, rows.shape[2]), np.uint8)
        if not len(rows):
            return
        reduced = np.asarray(_image(rows).reduce(self.shrink))
        target = self._pixels[self._filled : self._filled + len(reduced)]
        target[:] = reduced.reshape(target.shape)
        self._filled += len(reduced)


def _image(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
