"""TIFF and BigTIFF files written by hand, so that any of their directories can lie."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

DEFLATE = 8
_FORMS = {1: "B", 3: "H", 4: "I", 16: "Q"}


@dataclass
class Directory:
    """One page: chunks are its strips or tiles; `tags` are added last, so they may contradict the rest.

    `levels` hang on the page as sub-directories.
    """

    width: int
    height: int
    chunks: list[bytes]
    samples: int = 3
    tile: tuple[int, int] | None = None
    rows: int | None = None
    compression: int = 1
    tags: dict[int, tuple[int, tuple[int, ...]]] = field(default_factory=dict)
    levels: list[Directory] = field(default_factory=list)

    def entries(
        self, offsets: list[int], levels: list[int], offset_type: int
    ) -> dict[int, tuple[int, tuple[int, ...]]]:
        sizes = tuple(map(len, self.chunks))
        found: dict[int, tuple[int, tuple[int, ...]]] = {
            256: (4, (self.width,)), 257: (4, (self.height,)), 258: (3, (8,) * self.samples), 259: (3, (self.compression,)),
            262: (3, (2 if self.samples > 2 else 1,)), 277: (3, (self.samples,)),
        }  # fmt: skip
        if self.tile:
            found |= {322: (4, (self.tile[0],)), 323: (4, (self.tile[1],))}
            found |= {324: (offset_type, tuple(offsets)), 325: (4, sizes)}
        else:
            found |= {278: (4, (self.rows or self.height,)), 273: (offset_type, tuple(offsets)), 279: (4, sizes)}
        if levels:
            found[330] = offset_type, tuple(levels)
        return found | self.tags


def tiff(*pages: Directory, big: bool = False, order: str = "<", then: int | None = None) -> bytes:
    """A file of these pages; behind the last one comes page number `then` once more, when given: a circle."""
    mark = b"II" if order == "<" else b"MM"
    out = bytearray(mark + struct.pack(order + ("HHH" if big else "H"), *((43, 8, 0) if big else (42,))))
    links = [len(out)]
    form, offset_type = ("Q", 16) if big else ("I", 4)
    out += bytes(struct.calcsize(form))
    starts = []

    def chunks(page: Directory) -> list[int]:
        offsets = []
        for chunk in page.chunks:
            offsets.append(len(out))
            out.extend(chunk)
        return offsets

    def directory(page: Directory, levels: list[int]) -> int:
        packed = []
        for tag, (kind, values) in sorted(page.entries(chunks(page), levels, offset_type).items()):
            data = struct.pack(f"{order}{len(values)}{_FORMS[kind]}", *values)
            if len(data) > struct.calcsize(form):
                place = len(out)
                out.extend(data)
                data = struct.pack(order + form, place)
            packed.append(
                struct.pack(f"{order}HH{form}", tag, kind, len(values)) + data.ljust(struct.calcsize(form), b"\0")
            )
        start = len(out)
        out.extend(struct.pack(order + ("Q" if big else "H"), len(packed)) + b"".join(packed))
        links.append(len(out))
        out.extend(bytes(struct.calcsize(form)))
        return start

    for page in pages:
        levels = [directory(level, []) for level in page.levels]
        del links[len(links) - len(levels) :]  # they stand alone
        starts.append(directory(page, levels))
    for link, start in zip(links, starts if then is None else [*starts, starts[then]], strict=False):
        struct.pack_into(order + form, out, link, start)
    return bytes(out)


def strips(pixels: NDArray[np.generic], rows: int, **changes: object) -> Directory:
    """A page in deflated strips. Shape: (H, W, C)."""
    chunks = [zlib.compress(pixels[top : top + rows].tobytes()) for top in range(0, len(pixels), rows)]
    return _page(pixels, chunks, {"rows": rows} | changes)


def tiles(pixels: NDArray[np.generic], side: int, **changes: object) -> Directory:
    """A page in deflated square tiles. Shape: (H, W, C)."""
    height, width = pixels.shape[:2]
    padded = np.pad(pixels, ((0, -height % side), (0, -width % side), (0, 0)))
    chunks = [
        zlib.compress(padded[top : top + side, left : left + side].tobytes())
        for top in range(0, height, side)
        for left in range(0, width, side)
    ]
    return _page(pixels, chunks, {"tile": (side, side)} | changes)


def _page(pixels: NDArray[np.generic], chunks: list[bytes], changes: dict[str, object]) -> Directory:
    height, width, samples = pixels.shape
    page = Directory(width, height, chunks, samples, compression=DEFLATE)
    bits = {258: (3, (8 * pixels.dtype.itemsize,) * samples)}
    tags = changes.pop("tags", {})
    for name, value in changes.items():
        setattr(page, name, value)
    page.tags = bits | tags  # type: ignore[operator]
    return page
