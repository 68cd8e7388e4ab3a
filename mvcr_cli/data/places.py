"""Places in a picture that its size alone decides: spread evenly, or side by side without a gap."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mvcr_cli.config import ZoomConfig

_R2 = (0.7548776662466927, 0.5698402909980532)  # the two-dimensional golden ratio: any first n points spread evenly


def spread(size: tuple[int, int], count: int, octaves: int) -> list[tuple[float, float, int]]:
    """Centres spread evenly over the picture, octave by turns, coarsest first: x, y in pixels, and the octave."""
    return [
        ((0.5 + (number + 1) * _R2[0]) % 1 * size[0], (0.5 + (number + 1) * _R2[1]) % 1 * size[1],
         octaves - 1 - number % octaves)
        for number in range(count)
    ]  # fmt: skip


def covering_octave(size: tuple[int, int], zoom: ZoomConfig) -> int:
    """The finest octave in which `zoom.tiles` tiles cover a picture."""
    octave = 0
    while np.prod(_needed(size, zoom.tile_px << octave)) > zoom.tiles:
        octave += 1
    return octave


def side_by_side(size: tuple[int, int], zoom: ZoomConfig) -> NDArray[np.int32]:
    """Boxes that cover a picture, row by row; those that are left over lie spread over it, an octave finer if there is one.

    Shape: (zoom.tiles, 4).
    """
    octave = covering_octave(size, zoom)
    side = zoom.tile_px << octave
    columns, rows = (_starts(length, side) for length in size)
    boxes = [(left, top, left + side, top + side) for top in rows for left in columns]
    side = zoom.tile_px << max(0, octave - 1)
    for x, y, _ in spread(size, zoom.tiles - len(boxes), 1):
        left, top = _inside(x, side, size[0]), _inside(y, side, size[1])
        boxes.append((left, top, left + side, top + side))
    return np.array(boxes, np.int32)


def _needed(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Columns and rows of tiles of a side that cover a picture."""
    return -(-size[0] // side), -(-size[1] // side)


def _starts(length: int, side: int) -> list[int]:
    """Where tiles begin that cover a length evenly; one that is longer stands in the middle."""
    count = -(-length // side)
    if count == 1:
        return [(length - side) // 2]
    return [round(number * (length - side) / (count - 1)) for number in range(count)]


def _inside(centre: float, side: int, length: int) -> int:
    """Where a tile around a centre begins, moved into the picture."""
    return (length - side) // 2 if length < side else min(max(0, round(centre - side / 2)), length - side)
