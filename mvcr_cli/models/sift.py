"""SIFT's detector as a proposal stage: where in a large picture something small stands out.

    E = | h - up(down_4(h)) |      h: luma at half size and, octave by octave, at a quarter, an eighth, ...
    S = E averaged over cells of 5 x 5 and smoothed by a triangular window of cells
    salience = S / (mean of E over 9 x 9 cells + 0.01)      peaks are maxima of 5 x 5 cells

The difference between a picture and its own low-pass is a difference of Gaussians with boxes for Gaussians. A single box
as window leaves flat tops on which one object gives several peaks; two of them (a triangle) do not.

What stands out is what has more energy than its surroundings: on photographs the energy alone ranks texture above objects.

Everything is aligned to blocks of `alignment(octaves)` pixels, so that strips of a picture give the same cells as the
whole.

Sources: Lowe 2004, scale-space extrema of differences of Gaussians; here with the energy summed over a window the size
of an object instead of its extremum, and one response an octave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

CELL = 5  # pixels of a cell at its octave; 10 pixels of the picture in the first one
_DOWN = 4
FLAT = 1e-4  # energy, of 1, below which nothing stands out
SURROUNDINGS = 9  # cells
CALM = 0.01  # energy of surroundings that are quiet enough
_TIES = 32  # maxima looked at for each that is wanted
_ROWS_AT_ONCE = 128  # of a map


def cell_px(octave: int) -> int:
    """Side of a cell in pixels of the picture."""
    return CELL << (octave + 1)


def alignment(octaves: int) -> int:
    """Pixels of the picture to which strips are aligned."""
    return CELL * _DOWN << octaves


def cell_energies(half: Tensor, octaves: int) -> list[Tensor]:
    """Energy of every cell of every octave, not yet smoothed.

    Args:
        half: luma in [0, 1] at half the picture's size.

    Shape: (H/2, W/2) -> `octaves` times (ceil(H / cell_px), ceil(W / cell_px)).
    """
    h, energies = half, []
    for octave in range(octaves):
        if octave:
            h = block_means(h, 2)
        low = F.interpolate(block_means(h, _DOWN)[None, None], scale_factor=_DOWN, mode="nearest")[0, 0]
        energies.append(block_means((h - low[: h.shape[0], : h.shape[1]]).abs_(), CELL))
    return energies


def salience(energy: Tensor) -> Tensor:
    """Energy in the window around every cell over that of its surroundings; 0 where all is flat. Shape: (H, W) -> (H, W)."""
    found = torch.empty_like(energy)
    for first, own, rows in _in_parts(energy, SURROUNDINGS // 2):
        window, around = _box(_box(rows, 3), 3), _box(rows, SURROUNDINGS)
        found[first : first + _ROWS_AT_ONCE] = (window / (around + CALM) * (window > FLAT))[own]
    return found


def find_peaks(energy: Tensor, salient: Tensor, most: int) -> list[tuple[float, float]]:
    """Row and column, in cells, of what stands out most, most salient first; `salient` is the energy's `salience`.

    A place is the centre of gravity of the energy around the peak, finer than the cells.

    Shape: (H, W), (H, W) -> at most `most` pairs; (0.5, 0.5) is the middle of the first cell.
    """
    peaks = local_maxima(salient, most, floor=0.0)
    padded = F.pad(energy[None, None], (2, 2, 2, 2))[0, 0]
    around = torch.arange(5, dtype=energy.dtype) - 2
    places = []
    for row, column in peaks:
        window = padded[row : row + 5, column : column + 5]
        mass = float(window.sum())
        down, across = float((window.sum(1) * around).sum()) / mass, float((window.sum(0) * around).sum()) / mass
        places.append((row + 0.5 + down, column + 0.5 + across))
    return places


def local_maxima(values: Tensor, most: int, *, floor: float) -> list[tuple[int, int]]:
    """Row and column of the highest cells, highest first, none within two cells of another.

    Shape: (H, W) -> at most `most` pairs.
    """
    if not values.numel():
        return []
    places = torch.cat(list(_highest(values, most, floor))).sort().values
    places = places[values.flatten()[places].argsort(descending=True, stable=True)]
    kept: dict[tuple[int, int], None] = {}
    for place in places.tolist():  # cells of equal height may be neighbours
        row, column = divmod(place, values.shape[1])
        if not any((row + down, column + across) in kept for down in range(-2, 3) for across in range(-2, 3)):
            kept[row, column] = None
        if len(kept) == most:
            break
    return list(kept)


def _highest(values: Tensor, most: int, floor: float) -> Iterator[Tensor]:
    """Flat indices of the highest local maxima of each part of a map; no more than can matter."""
    for first, own, rows in _in_parts(values, 2):
        around = F.pad(rows, (2, 2, 2, 2), value=-torch.inf)
        top = _combined(_combined(around, 5, 0, torch.maximum), 5, 1, torch.maximum)[own]
        peaks = rows[own].where((rows[own] == top) & (rows[own] > floor), -torch.inf).flatten()
        heights, places = peaks.topk(min(_TIES * most, len(peaks)))  # where nothing is, all cells are equal, and many
        yield places[heights > -torch.inf] + first * values.shape[1]


def _in_parts(values: Tensor, halo: int) -> Iterator[tuple[int, slice, Tensor]]:
    """A map, which may be of many megabytes, some rows at a time with `halo` rows of its neighbours on either side.

    Yields: the first row, where the own rows are, and all of them.
    """
    for first in range(0, len(values), _ROWS_AT_ONCE):
        above = max(0, first - halo)
        own = slice(first - above, first - above + _ROWS_AT_ONCE)
        yield first, own, values[above : first + _ROWS_AT_ONCE + halo]


def block_means(x: Tensor, size: int) -> Tensor:
    """Means of blocks of `size` x `size`, of fewer at the edge; several times as fast as `avg_pool2d` on a processor.

    Shape: (..., H, W) -> (..., ceil(H / size), ceil(W / size)).
    """
    below, beyond = -x.shape[-2] % size, -x.shape[-1] % size
    if below or beyond:
        x = F.pad(x, (0, beyond, 0, below))
    rows = x[..., ::size, :] + x[..., 1::size, :]
    for row in range(2, size):
        rows += x[..., row::size, :]
    means = rows[..., ::size] + rows[..., 1::size]
    for column in range(2, size):
        means += rows[..., column::size]
    means /= size * size
    means[..., -1, :] *= size / (size - below)
    means[..., -1] *= size / (size - beyond)
    return means


def _box(x: Tensor, cells: int) -> Tensor:
    """Means of `cells` x `cells`, an odd number, of fewer at the edges. Shape: (H, W) -> (H, W)."""
    around = F.pad(x, [cells // 2] * 4)
    sums = _combined(_combined(around, cells, 0, torch.add), cells, 1, torch.add)
    inside = [_combined(F.pad(torch.ones(side), [cells // 2] * 2), cells, 0, torch.add) for side in x.shape]
    return sums.div_(inside[0][:, None]).div_(inside[1])


def _combined(x: Tensor, count: int, dim: int, pair: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Every `count` neighbours along a dimension combined, from pairs of pairs: several times as fast as pooling.

    Args:
        count: a power of two, or one more.
    """
    found, width = x, 1
    while 2 * width <= count:
        found, width = _paired(found, found, width, dim, pair), 2 * width
    assert count - width in (0, 1)
    return found if width == count else _paired(found, x, width, dim, pair)


def _paired(x: Tensor, y: Tensor, ahead: int, dim: int, pair: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Every value of `x` with the one of `y` that is so many places further."""
    length = y.shape[dim] - ahead
    return pair(x.narrow(dim, 0, length), y.narrow(dim, ahead, length))
