"""Plain ground: columns of a strip that have one colour only, as most of a scan's do, need not be searched.

What the detector and the learned search say of plain ground is known beforehand, so they look at the other columns only,
put side by side. Between columns that were apart lies so much plain ground that no window sees both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvcr_cli.data.turning import Pixels

_WORTH = 0.75  # share of the columns up to which the others are left out; above it there is little to save
_WIDTHS = 32  # for every further width that occurs, the convolutions keep a plan and the heap grows
_SAMPLE = 8  # one of so many rows, and of so many columns, is asked for the ground's colour


@dataclass(frozen=True)
class Columns:
    """The columns of a strip that are looked at, in whole blocks.

    Args:
        runs: first block, and the one after the last, of each run from left to right; None for all columns.
        ground: the colour of all other columns, a value in [0, 1] for each channel of the strip.
    """

    runs: tuple[tuple[int, int], ...] | None = None
    ground: tuple[float, ...] = ()

    def slices(self, block: int) -> list[slice]:
        """Where they are in a map with `block` columns for every block."""
        return [slice(None)] if self.runs is None else [slice(first * block, end * block) for first, end in self.runs]

    def cut(self, strip: Pixels, block: int) -> Pixels:
        """Shape: (h, W, C) -> (h, w, C)."""
        return strip if self.runs is None else np.concatenate([strip[:, run] for run in self.slices(block)], 1)

    def narrow(self, x: Tensor, block: int) -> Tensor:
        """Shape: (C, h, W) -> (C, h, w)."""
        return x if self.runs is None else torch.cat([x[..., run] for run in self.slices(block)], -1)

    def widen(self, x: Tensor, block: int, width: int, ground: Tensor | float) -> Tensor:
        """The columns where they were, and `ground` in between; what a window cannot reach at the right end is ground too.

        Shape: (..., w) -> (..., width); `ground` can be broadcast to that.
        """
        if self.runs is None:
            return x
        wide = x.new_empty((*x.shape[:-1], width))
        wide[:] = ground
        start = 0
        for run in self.slices(block):
            target = wide[..., run]
            known = x[..., start : start + target.shape[-1]]
            target[..., : known.shape[-1]] = known
            start += run.stop - run.start
        return wide


ALL_COLUMNS = Columns()


class PlainGround:
    """Tells strip by strip, from the top of a picture, which columns to look at.

    Args:
        block: columns of a block; no window that is laid over a strip may be wider.
    """

    def __init__(self, block: int) -> None:
        self.block = block
        self._ground: Pixels | None = None
        self._busy: NDArray[np.bool_] | None = None  # blocks of the last strip

    def columns(self, strip: Pixels) -> Columns:
        """Those with anything but the ground in this strip or in the one before, whose last rows a window still reaches.

        Shape: (h, W, C).
        """
        ground = _commonest(strip[::_SAMPLE, ::_SAMPLE])
        busy = _differs(strip, ground, self.block)
        before, self._busy = self._busy, busy
        same, self._ground = self._ground is None or bool((self._ground == ground).all()), ground
        if not same:
            return ALL_COLUMNS
        looked = busy if before is None else busy | before
        looked = looked | np.append(looked[1:], False) | np.append(False, looked[:-1])  # ground on either side
        if looked.mean() > _WORTH:
            return ALL_COLUMNS
        step = -(-len(looked) // _WIDTHS)
        count = int(looked.sum())
        wanted = max(1, -(-count // step)) * step
        looked[np.flatnonzero(~looked)[: wanted - count]] = True
        edges = np.flatnonzero(np.diff(looked, prepend=False, append=False)).tolist()
        return Columns(tuple(zip(edges[::2], edges[1::2], strict=True)), tuple((ground / 255).tolist()))


def _commonest(pixels: Pixels) -> Pixels:
    """Shape: (h, w, C) -> (C,)."""
    flat = pixels.reshape(-1, pixels.shape[2])
    keys = flat.astype(np.int32) @ (1 << 8 * np.arange(flat.shape[1]))
    _, first, counts = np.unique(keys, return_index=True, return_counts=True)
    ground: Pixels = flat[first[counts.argmax()]]
    return ground


def _differs(strip: Pixels, ground: Pixels, block: int) -> NDArray[np.bool_]:
    """Which blocks have a pixel that is not the ground. Shape: (h, W, C), (C,) -> (ceil(W / block),)."""
    columns = ((strip.max(0) != ground) | (strip.min(0) != ground)).any(1)
    found: NDArray[np.bool_] = np.logical_or.reduceat(columns, np.arange(0, len(columns), block))
    return found
