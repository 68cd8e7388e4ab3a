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

import torch
import torch.nn.functional as F
from torch import Tensor

CELL = 5  # pixels of a cell at its octave; 10 pixels of the picture in the first one
_DOWN = 4
FLAT = 1e-4  # energy, of 1, below which nothing stands out
SURROUNDINGS = 9  # cells
CALM = 0.01  # energy of surroundings that are quiet enough
_TIES = 32  # maxima looked at for each that is wanted


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
    h = half[None, None]
    energies = []
    for octave in range(octaves):
        if octave:
            h = _average(h, 2)
        low = _average(h, _DOWN)
        low = F.interpolate(low, scale_factor=_DOWN, mode="nearest")[..., : h.shape[-2], : h.shape[-1]]
        energies.append(_average((h - low).abs_(), CELL)[0, 0])
    return energies


def salience(energy: Tensor) -> Tensor:
    """Energy in the window around every cell over that of its surroundings; 0 where all is flat. Shape: (H, W) -> (H, W)."""
    e = energy[None, None]
    window, around = _box(_box(e, 3), 3), _box(e, SURROUNDINGS)
    return (window / (around + CALM) * (window > FLAT))[0, 0]


def find_peaks(energy: Tensor, most: int) -> list[tuple[float, float]]:
    """Row and column, in cells, of what stands out most, most salient first.

    A place is the centre of gravity of the energy around the peak, finer than the cells.

    Shape: (H, W) -> at most `most` pairs; (0.5, 0.5) is the middle of the first cell.
    """
    peaks = local_maxima(salience(energy), most, floor=0.0)
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
    top = F.max_pool2d(values[None, None], 5, 1, 2)[0, 0]
    peaks = values.where((values == top) & (values > floor), -torch.inf).flatten()
    heights, places = peaks.topk(min(_TIES * most, len(peaks)))  # where nothing is, all cells are equal, and many
    places = places[heights > -torch.inf].sort().values
    places = places[values.flatten()[places].argsort(descending=True, stable=True)]
    kept: dict[tuple[int, int], None] = {}
    for place in places.tolist():  # cells of equal height may be neighbours
        row, column = divmod(place, values.shape[1])
        if not any((row + down, column + across) in kept for down in range(-2, 3) for across in range(-2, 3)):
            kept[row, column] = None
        if len(kept) == most:
            break
    return list(kept)


def _average(x: Tensor, size: int) -> Tensor:
    return F.avg_pool2d(x, size, ceil_mode=True, count_include_pad=False)


def _box(x: Tensor, cells: int) -> Tensor:
    return F.avg_pool2d(x, cells, 1, cells // 2, count_include_pad=False)
