"""What is known of every place in a large picture before any tile is cut: from strips, so memory does not grow with it.

SIFT's detector says how much stands out there, the learned search how much it looks like what has decided so far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mvcr_cli.config import ZoomConfig
from mvcr_cli.data.glance import GlanceOfStrips
from mvcr_cli.data.plain_ground import ALL_COLUMNS, Columns, PlainGround
from mvcr_cli.data.turning import Box, Pixels
from mvcr_cli.models.sift import alignment, block_means, cell_energies, cell_px
from mvcr_cli.models.zoom import TileScorer

Finder = Callable[[Tensor], Tensor]  # `SearchScorer`, or what runs an exported one
STRIP_PIXELS = (
    3_000_000  # of a strip at full size, about: 2 and 4 million take some percent longer on scans or on photographs
)
_LUMA = (0.299, 0.587, 0.114)


class Picture(Protocol):
    """What is asked of a picture here; see `HugePicture`."""

    @property
    def size(self) -> tuple[int, int]: ...

    def glance(self, side: int) -> Image.Image: ...

    def strips(self, rows: int, shrink: int) -> Iterator[tuple[int, Pixels]]: ...

    def tiles(self, boxes: Sequence[Box], px: int) -> list[Pixels]: ...


def energies_and_scores(picture: Picture, zoom: ZoomConfig, finder: Finder | None,
                        glance: GlanceOfStrips | None = None) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """Energies and scores of every octave, from strips at half size, of which a glance is taken on the way if asked for."""
    unit = alignment(zoom.octaves)
    width, height = picture.size
    rows = unit * max(1, STRIP_PIXELS // width // unit)
    energies = [_GrowingMap(height / cell_px(octave)) for octave in range(zoom.octaves)]
    search = None if finder is None else Search(finder, zoom.octaves, picture.size)
    ground = PlainGround(block_columns(zoom.octaves))
    for _, strip in picture.strips(rows // 2, 2):
        if glance is not None:
            glance.add(strip)
        columns = ground.columns(strip)
        looked = plain_grey(columns.cut(strip, ground.block))
        x = torch.from_numpy(looked).permute(2, 0, 1).contiguous().float().div_(255)  # 1 or 3 x h x w
        luma = x[0] if len(x) == 1 else x[0] * _LUMA[0] + x[1] * _LUMA[1] + x[2] * _LUMA[2]
        for octave, part in enumerate(cell_energies(luma, zoom.octaves)):
            cells = -(-width // cell_px(octave))
            energies[octave].add(columns.widen(part, unit // cell_px(octave), cells, 0.0))
        if search is not None:
            search.add(x, columns)
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


def block_columns(octaves: int) -> int:
    """Columns, at half size, of a block that is searched or left out as one."""
    block = alignment(octaves) // 2
    assert block >= TileScorer.REACH << (octaves - 1)  # so that no window sees two that were apart, nor two strips back
    return block


class Search:
    """The learned proposal over a picture that comes in strips; the last rows of a strip are kept for the next.

    Args:
        size: width and height of the picture in pixels.
    """

    def __init__(self, finder: Finder, octaves: int, size: tuple[int, int]) -> None:
        self.finder = finder
        self.block = block_columns(octaves)
        self.kept: list[Tensor | None] = [None] * octaves
        self.widths = [-(-size[0] // (2 << octave)) for octave in range(octaves)]
        self._of_ground: dict[tuple[float, ...], float] = {}
        self.maps = [_GrowingMap(size[1] / (TileScorer.STRIDE * (2 << octave))) for octave in range(octaves)]

    def add(self, x: Tensor, columns: Columns = ALL_COLUMNS) -> None:
        """The next strip. Shape: (1 or 3, h, w), the given columns of a strip at half size."""
        for octave, width in enumerate(self.widths):
            if octave:
                x = block_means(x, 2)
            if width < TileScorer.REACH:
                continue  # no window fits
            block, kept = self.block >> octave, self.kept[octave]
            rows = x if kept is None else _below(columns.narrow(kept, block), x)
            count = max(0, (rows.shape[1] - TileScorer.REACH) // TileScorer.STRIDE + 1)
            if count:
                self.maps[octave].add(self._scores(rows, columns, octave))
            rest = rows[:, count * TileScorer.STRIDE :]
            ground = torch.tensor(columns.ground[: len(rows)]).view(-1, 1, 1)
            self.kept[octave] = columns.widen(rest, block, width, ground).clone()  # the strip itself is let go

    def _scores(self, rows: Tensor, columns: Columns, octave: int) -> Tensor:
        """Of all places in whole rows. Shape: (1 or 3, h, w), the given columns -> (h', W')."""
        found: Tensor = self.finder(rows[None])[0]
        if columns.runs is None:
            return found
        places = (self.widths[octave] - TileScorer.REACH) // TileScorer.STRIDE + 1
        block = (self.block >> octave) // TileScorer.STRIDE
        return columns.widen(found, block, places, self._score(columns.ground))

    def _score(self, ground: tuple[float, ...]) -> float:
        """Of a place in which there is nothing else."""
        if ground not in self._of_ground:
            place = torch.tensor(ground).view(1, -1, 1, 1).expand(-1, -1, TileScorer.REACH, TileScorer.REACH)
            self._of_ground[ground] = float(self.finder(place))
        return self._of_ground[ground]

    def scores(self) -> list[Tensor]:
        return [found.whole() for found in self.maps]


def _below(kept: Tensor, x: Tensor) -> Tensor:
    """Rows and the next ones, of three channels where one of them has a colour. Shape: (C, h, w), (C, k, w)."""
    channels = max(len(kept), len(x))
    return torch.cat((kept.expand(channels, -1, -1), x.expand(channels, -1, -1)), 1)
