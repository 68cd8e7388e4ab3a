"""What is known of every place in a large picture before any tile is cut: from strips, so memory does not grow with it.

SIFT's detector says how much stands out there, the learned search how much it looks like what has decided so far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mvcr_cli.config import ZoomConfig
from mvcr_cli.data.turning import Box
from mvcr_cli.models.sift import alignment, cell_energies, cell_px
from mvcr_cli.models.zoom import TileScorer

Pixels = NDArray[np.uint8]
Finder = Callable[[Tensor], Tensor]  # `SearchScorer`, or what runs an exported one
STRIP_PIXELS = 2_000_000  # of a strip at full size, about; more would not fit the processor's cache
_LUMA = (0.299, 0.587, 0.114)


class Picture(Protocol):
    """What is asked of a picture here; see `HugePicture`."""

    @property
    def size(self) -> tuple[int, int]: ...

    def glance(self, side: int) -> Image.Image: ...

    def strips(self, rows: int, shrink: int) -> Iterator[tuple[int, Pixels]]: ...

    def tiles(self, boxes: Sequence[Box], px: int) -> list[Pixels]: ...


def energies_and_scores(picture: Picture, zoom: ZoomConfig, finder: Finder | None) -> tuple[list[Tensor], list[Tensor]]:
    """Energies and scores of every octave, from strips at half size."""
    unit = alignment(zoom.octaves)
    rows = unit * max(1, STRIP_PIXELS // picture.size[0] // unit)
    energies = [_GrowingMap(picture.size[1] / cell_px(octave)) for octave in range(zoom.octaves)]
    search = None if finder is None else Search(finder, zoom.octaves, picture.size[1])
    for _, strip in picture.strips(rows // 2, 2):
        x = torch.from_numpy(plain_grey(strip)).permute(2, 0, 1).contiguous().float().div_(255)  # 1 or 3 x h x w
        luma = x[0] if len(x) == 1 else x[0] * _LUMA[0] + x[1] * _LUMA[1] + x[2] * _LUMA[2]
        for energy, part in zip(energies, cell_energies(luma, zoom.octaves), strict=True):
            energy.add(part)
        if search is not None:
            search.add(x)
    return [energy.whole() for energy in energies], [] if search is None else search.scores()


def plain_grey(strip: Pixels) -> Pixels:
    """A copy, of one channel where all three agree: a third of the work. Shape: (h, w, 1 or 3) -> (h, w, 1 or 3)."""

    def grey(pixels: Pixels) -> bool:
        return bool((pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 0] == pixels[..., 2]).all())

    if strip.shape[2] == 3 and grey(strip[::8, ::8]) and grey(strip):  # a colour is mostly seen at the first look
        return strip[..., :1].copy()
    return np.array(strip)


class _GrowingMap:
    """A map that comes in strips, from top to bottom, in memory that is taken once.

    Small strips kept between large tensors that come and go would scatter the heap, a hundred megabytes of a large picture.

    Args:
        rows: of the whole map, at most.
    """

    def __init__(self, rows: float) -> None:
        self._rows, self._filled = math.ceil(rows), 0
        self._map = torch.empty(0, 0)

    def add(self, part: Tensor) -> None:
        """The next rows. Shape: (h, W)."""
        if not self._filled:
            self._map = part.new_empty(self._rows, part.shape[1])
        self._map[self._filled : self._filled + len(part)] = part
        self._filled += len(part)

    def whole(self) -> Tensor:
        return self._map[: self._filled]


class Search:
    """The learned proposal over a picture that comes in strips; the last rows of a strip are kept for the next.

    Args:
        height: of the picture in pixels.
    """

    def __init__(self, finder: Finder, octaves: int, height: int) -> None:
        self.finder = finder
        self.kept: list[Tensor | None] = [None] * octaves
        self.maps = [_GrowingMap(height / (TileScorer.STRIDE * (2 << octave))) for octave in range(octaves)]

    def add(self, x: Tensor) -> None:
        for octave, kept in enumerate(self.kept):
            if octave:
                x = _halved(x)
            rows = x if kept is None else _below(kept, x)
            count = (rows.shape[1] - TileScorer.REACH) // TileScorer.STRIDE + 1
            if count > 0 and rows.shape[2] >= TileScorer.REACH:
                self.maps[octave].add(self.finder(rows[None])[0])
                rows = rows[:, count * TileScorer.STRIDE :].clone()  # the strip itself is let go
            self.kept[octave] = rows

    def scores(self) -> list[Tensor]:
        return [found.whole() for found in self.maps]


def _below(kept: Tensor, x: Tensor) -> Tensor:
    """Rows and the next ones, of three channels where one of them has a colour. Shape: (C, h, w), (C, k, w)."""
    channels = max(len(kept), len(x))
    return torch.cat((kept.expand(channels, -1, -1), x.expand(channels, -1, -1)), 1)


def _halved(x: Tensor) -> Tensor:
    """Means of 2 x 2, of fewer at the edge: `avg_pool2d` takes three times as long. Shape: (C, h, w) -> (C, ceil, ceil)."""
    if x.shape[-2] % 2 or x.shape[-1] % 2:
        x = F.pad(x[None], (0, x.shape[-1] % 2, 0, x.shape[-2] % 2), mode="replicate")[0]
    rows = x[:, ::2] + x[:, 1::2]
    return (rows[..., ::2] + rows[..., 1::2]).mul_(0.25)
