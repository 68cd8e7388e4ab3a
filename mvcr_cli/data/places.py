"""Places in a picture that its size alone decides: spread evenly, or side by side without a gap."""

from __future__ import annotations

import math

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


def covering_scale(size: tuple[int, int], zoom: ZoomConfig) -> float:
    """Pixels of a picture to a pixel of its tiles when they cover it as finely as their number allows; at least 1."""
    return _covering(size, zoom)[2] / zoom.tile_px


def side_by_side(size: tuple[int, int], zoom: ZoomConfig) -> NDArray[np.int32]:
    """Boxes that cover a picture, row by row; those that are left over lie spread over it. Shape: (zoom.tiles, 4)."""
    columns, rows, side = _covering(size, zoom)
    lefts, tops = _starts(size[0], columns, side), _starts(size[1], rows, side)
    corners = [(left, top) for top in tops for left in lefts]
    for x, y, _ in spread(size, zoom.tiles - len(corners), 1):
        corners.append((_inside(x, side, size[0]), _inside(y, side, size[1])))
    first = np.array(corners, np.int32)
    return np.concatenate((first, first + side), 1)


def _covering(size: tuple[int, int], zoom: ZoomConfig) -> tuple[int, int, int]:
    """Columns and rows of the smallest square tiles that cover a picture, and their side in its pixels."""
    width, height = size

    def side(columns: int) -> int:
        return max(math.ceil(width / columns), math.ceil(height / (zoom.tiles // columns)), zoom.tile_px)

    def uneven(columns: int) -> int:  # how far tiles to spare are from lying as densely across as down
        return abs(columns * height - zoom.tiles // columns * width)

    columns = min(range(1, zoom.tiles + 1), key=lambda columns: (side(columns), uneven(columns)))
    return columns, zoom.tiles // columns, side(columns)


def _starts(length: int, count: int, side: int) -> list[int]:
    """Where so many tiles begin that lie evenly over a length; longer ones stand in the middle."""
    if count == 1 or length < side:
        return [(length - side) // 2] * count
    return [round(number * (length - side) / (count - 1)) for number in range(count)]


def _inside(centre: float, side: int, length: int) -> int:
    """Where a tile around a centre begins, moved into the picture."""
    return (length - side) // 2 if length < side else min(max(0, round(centre - side / 2)), length - side)
