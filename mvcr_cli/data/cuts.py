"""Square tiles out of a picture that is read from top to bottom."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mvcr_cli.data.decoders import Decoder, Reader
from mvcr_cli.data.turning import Box

FILL = (124, 116, 104)  # mean colour of ImageNet, for a tile that lies outside of the picture
BAND_PIXELS = 1 << 19  # decoded at a time: what the processor caches; more costs memory and time
_MOST_SHRINK = 64  # by boxes, before the filter: bounds how many rows must be held together


def cut_tiles(decoder: Decoder, boxes: Sequence[Box], px: int) -> list[NDArray[np.uint8]]:
    """Boxes of the stored picture as tiles of (px, px, 3), in the order of the boxes.

    Raises: BadImage; ValueError for a box without pixels.
    """
    cuts = [_Cut(box, px, (decoder.width, decoder.height)) for box in boxes]
    if not cuts:
        return []
    by_top = sorted(cuts, key=lambda cut: cut.box[1])
    shrink = min(cut.shrink for cut in cuts)
    reduction = max(number for number in decoder.reductions if shrink % number == 0) if decoder.exact else 1
    with decoder.reader(reduction) as reader:
        # Where parts can be had alone, nothing between the boxes is decoded.
        for group in [[cut] for cut in by_top] if decoder.random_access else [by_top]:
            _read(reader, reduction, group)
    return [cut.tile for cut in cuts]


def _read(reader: Reader, reduction: int, cuts: Sequence[_Cut]) -> None:
    """Feed the cuts with the bands that they need, and no wider than they need them."""
    step = max(cut.shrink for cut in cuts) // reduction
    rows = band_rows(reader.width, step)
    for top in range(0, reader.height, rows):
        height = min(rows, reader.height - top)
        wanted = [cut for cut in cuts if cut.overlaps(top * reduction, (top + height) * reduction)]
        left, right = _span(wanted, step * reduction)
        left, right = max(0, left // reduction), min(reader.width, right // reduction)
        if left >= right:
            continue
        band = reader.fetch(left, top, right - left, height)
        for shrink in sorted({cut.shrink for cut in wanted}):
            shrunk = box_shrink(band, shrink // reduction)
            for cut in wanted:
                if cut.shrink == shrink:
                    cut.feed(left * reduction // shrink, top * reduction // shrink, shrunk)
        for cut in wanted:
            if cut.box[3] <= (top + height) * reduction:
                cut.finish()


def _span(cuts: Sequence[_Cut], step: int) -> tuple[int, int]:
    """Columns that the cuts need, from and to multiples of `step`."""
    left = min((cut.box[0] for cut in cuts), default=0)
    right = max((cut.box[2] for cut in cuts), default=0)
    return left // step * step, -(-right // step) * step


class _Cut:
    """One tile in the making: its part of the picture, shrunk by a power of two, and at last filtered to `px`.

    Args:
        size: width and height of the picture; beyond its edges they are repeated.
    """

    def __init__(self, box: Box, px: int, size: tuple[int, int]) -> None:
        left, top, right, bottom = box
        if left >= right or top >= bottom or px < 1:
            raise ValueError(f"no pixels in box {box} at {px} px")
        self.box, self._px, self._size = box, px, size
        scale = min(right - left, bottom - top) / px
        self.shrink = min(_MOST_SHRINK, 1 << max(0, math.floor(math.log2(scale)) - 1))  # leaves 2 to 4 to the filter
        self._canvas: NDArray[np.uint8] | None = None
        self._tile: NDArray[np.uint8] | None = None

    @property
    def tile(self) -> NDArray[np.uint8]:
        if self._tile is None:
            self.finish()
        assert self._tile is not None
        return self._tile

    def overlaps(self, top: int, bottom: int) -> bool:
        return self.box[1] < bottom and self.box[3] > top

    def feed(self, left: int, top: int, band: NDArray[np.uint8]) -> None:
        """Take what belongs here from a band of the picture at this cut's shrink; `left` and `top` are its place."""
        canvas, (x0, y0, x1, y1) = self._begun(), self._grid()
        bottom, right = top + band.shape[0], left + band.shape[1]
        first, last, west, east = max(top, y0), min(bottom, y1), max(left, x0), min(right, x1)
        if first < last and west < east:
            canvas[first - y0 : last - y0, west - x0 : east - x0] = band[
                first - top : last - top, west - left : east - left
            ]

    def finish(self) -> None:
        canvas, (x0, y0, _, _) = self._begun(), self._grid()
        self._canvas = None
        left, top, right, bottom = self.box
        if left >= self._size[0] or top >= self._size[1] or right <= 0 or bottom <= 0:
            self._tile = np.full((self._px, self._px, 3), FILL, np.uint8)
            return
        inner, shown = within(self.box, self._px, self._size)
        if self.shrink == 1 and canvas.shape[:2] == (self._px, self._px):
            tile = canvas[inner[1] : inner[3], inner[0] : inner[2]]
        else:
            x1, y1 = (-(-length // self.shrink) for length in self._size)
            canvas = canvas[max(0, -y0) : y1 - y0, max(0, -x0) : x1 - x0]  # the filter must not see beyond the picture
            x0, y0 = max(0, x0), max(0, y0)
            west, north, east, south = (edge / self.shrink for edge in shown)
            place = (west - x0, north - y0, east - x0, south - y0)
            size = inner[2] - inner[0], inner[3] - inner[1]
            tile = np.array(Image.fromarray(canvas).resize(size, Image.Resampling.BILINEAR, place))
        self._tile = edges_repeated(tile, inner, self._px)

    def _grid(self) -> Box:
        """The box in shrunk pixels, rounded outwards."""
        left, top, right, bottom = self.box
        return left // self.shrink, top // self.shrink, -(-right // self.shrink), -(-bottom // self.shrink)

    def _begun(self) -> NDArray[np.uint8]:
        if self._canvas is None:
            x0, y0, x1, y1 = self._grid()
            self._canvas = np.full((y1 - y0, x1 - x0, 3), FILL, np.uint8)
        return self._canvas


def within(box: Box, px: int, size: tuple[int, int]) -> tuple[Box, tuple[float, float, float, float]]:
    """Which pixels of a tile of `px` x `px` that shows a box lie within a picture, and what they show of it; at least one."""
    (west, east), (left, right) = _within(box[0], box[2], px, size[0])
    (north, south), (top, bottom) = _within(box[1], box[3], px, size[1])
    return (west, north, east, south), (left, top, right, bottom)


def _within(first: int, last: int, px: int, length: int) -> tuple[tuple[int, int], tuple[float, float]]:
    scale = (last - first) / px
    begin = min(px - 1, max(0, math.ceil(-first / scale)))
    end = max(begin + 1, min(px, math.floor((length - first) / scale + 1e-9)))
    return (begin, end), (max(0.0, first + begin * scale), min(float(length), first + end * scale))


def edges_repeated(tile: NDArray[np.uint8], inner: Box, px: int) -> NDArray[np.uint8]:
    """A tile of `px` x `px` of which the inner part is there. Shape: (h, w, C) -> (px, px, C)."""
    west, north, east, south = inner
    if inner == (0, 0, px, px):
        return tile
    return np.pad(tile, ((north, px - south), (west, px - east), (0, 0)), "edge")


def shrunk_bands(reader: Reader, shrink: int) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """The whole picture in bands, each pixel the mean of `shrink` x `shrink`. Yields: top and (h, w, 3), shrunk."""
    rows = band_rows(reader.width, shrink)
    for top in range(0, reader.height, rows):
        band = reader.fetch(0, top, reader.width, min(rows, reader.height - top))
        yield top // shrink, box_shrink(band, shrink)


def band_rows(width: int, step: int) -> int:
    """How many rows to decode at a time: a multiple of `step`."""
    return step * max(1, BAND_PIXELS // (width * step))


def box_shrink(pixels: NDArray[np.uint8], shrink: int) -> NDArray[np.uint8]:
    """Means of `shrink` x `shrink` pixels, of fewer at the right and the bottom. Shape: (h, w, 3) -> (ceil, ceil, 3)."""
    return pixels if shrink == 1 else np.asarray(Image.fromarray(pixels).reduce(shrink))
