"""From the way a file stores a picture to the upright one, for arrays, boxes and strips.

Orientations are those of EXIF: to be shown as stored (1), mirrored (2), turned by 180 degrees (3), mirrored top to bottom
(4), transposed (5), turned clockwise (6), transposed across the other diagonal (7) or turned counterclockwise (8).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO

import numpy as np
from numpy.typing import NDArray

from mvcr_cli.data.images import SIDEWAYS
from mvcr_cli.errors import WriteFailed

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels
Pixels = NDArray[np.uint8]
Bands = Iterable[tuple[int, Pixels]]  # (top, h x W x 3), from top to bottom

_IN_MEMORY = 64 << 20  # bytes of a turned picture that are not worth a file


def turn(stored: Pixels, orientation: int) -> Pixels:
    """The upright pixels. Shape: (h, w, 3) -> (h, w, 3), or (w, h, 3) from 5 on; a view."""
    across = stored.transpose(1, 0, 2) if orientation in SIDEWAYS else stored
    rows = slice(None, None, -1 if orientation in (3, 4, 7, 8) else 1)
    columns = slice(None, None, -1 if orientation in (2, 3, 6, 7) else 1)
    return across[rows, columns]


def stored_box(box: Box, orientation: int, width: int, height: int) -> Box:
    """Where a box of the upright picture lies in the stored one; `width` and `height` are the upright ones."""
    left, top, right, bottom = box
    if orientation in (2, 3, 6, 7):
        left, right = width - right, width - left
    if orientation in (3, 4, 7, 8):
        top, bottom = height - bottom, height - top
    return (top, left, bottom, right) if orientation in SIDEWAYS else (left, top, right, bottom)


def turned_strips(bands: Bands, orientation: int, width: int, height: int, rows: int) -> Bands:
    """The stored bands of a picture as upright strips of `rows` rows; `width` and `height` are the upright ones.

    A mirrored picture needs no memory. All others come with their last row or column first, so they are kept until the
    end: above 64 MiB in an unnamed temporary file of 3 bytes a pixel, which does not count as memory of the process.

    Raises: WriteFailed when there is no room for that file.
    """
    if orientation < 3:
        yield from regrouped(((top, turn(band, orientation)) for top, band in bands), rows, height)
        return
    with tempfile.SpooledTemporaryFile(_IN_MEMORY, prefix="mvcr-") as file:
        spool = _Spool(file)
        try:
            for top, band in bands:
                bottom = top + len(band)
                if orientation in SIDEWAYS:
                    place = (width - bottom if orientation in (6, 7) else top), 0
                else:
                    place = 0, height - bottom
                spool.add(*place, turn(band, orientation))
        except OSError as error:
            needed = f"{3 * width * height:,} bytes in {tempfile.gettempdir()}"
            raise WriteFailed(
                f"no room to turn a picture: {error.strerror or error}",
                f"it needs {needed}; name another place with TMPDIR",
            ) from error
        for top in range(0, height, rows):
            yield top, spool.rows(top, min(top + rows, height), width)


def regrouped(bands: Bands, rows: int, height: int) -> Iterator[tuple[int, Pixels]]:
    """Bands of any heights as strips of exactly `rows` rows, the last one shorter."""
    strip: Pixels | None = None
    for top, band in bands:
        if top % rows == 0 and len(band) == min(rows, height - top):
            yield top, band
            continue
        taken = 0
        while taken < len(band):
            row = top + taken
            start = row // rows * rows
            if strip is None:
                strip = np.empty((min(rows, height - start), *band.shape[1:]), np.uint8)
            count = min(len(band) - taken, start + len(strip) - row)
            strip[row - start : row - start + count] = band[taken : taken + count]
            taken += count
            if row + count == start + len(strip):
                yield start, strip
                strip = None


@dataclass
class _Spool:
    """Pieces of a picture in a file, each a block of rows: left, top, and where it begins in the file."""

    file: IO[bytes]
    pieces: list[tuple[int, int, tuple[int, ...], int]] = field(default_factory=list)

    def add(self, left: int, top: int, piece: Pixels) -> None:
        self.pieces.append((left, top, piece.shape, self.file.tell()))
        self.file.write(piece.tobytes())

    def rows(self, top: int, bottom: int, width: int) -> Pixels:
        """Shape: (bottom - top, width, 3)."""
        out = np.empty((bottom - top, width, 3), np.uint8)
        for left, start, (height, across, _), offset in self.pieces:
            first, last = max(top, start), min(bottom, start + height)
            if first < last:
                self.file.seek(offset + (first - start) * across * 3)
                piece = np.frombuffer(self.file.read((last - first) * across * 3), np.uint8)
                out[first - top : last - top, left : left + across] = piece.reshape(last - first, across, 3)
        return out
