"""What the directories of a TIFF or BigTIFF say: enough to know how its pixels are kept and which pages are reductions.

Only counted, bounded reads: a directory that is damaged, endless or in a circle ends the list, or raises one of UNREADABLE.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO

UNREADABLE = (ValueError, OverflowError, OSError, struct.error)  # OSError: an offset that no file can have
MAX_PAGES = 64  # that are looked at for reductions of the first one
_MAX_ENTRIES = 4096
_MAX_VALUES = 64
_SIZES = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}  # BYTE, SHORT, LONG, IFD, LONG8, IFD8
_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 254, 256, 257, 258, 259, 262, 266
_SAMPLES, _ROWS_PER_STRIP, _PLANAR, _TILE_WIDTH, _TILE_HEIGHT, _SUB_DIRECTORIES = 277, 278, 284, 322, 323, 330
_EXTRA_SAMPLES, _SAMPLE_FORMAT, _ORIENTATION, _RESOLUTION_UNIT = 338, 339, 274, 296


@dataclass(frozen=True, slots=True)
class Page:
    """One picture of the file, as its directory describes it; lengths in pixels.

    Args:
        tile: width and height of its tiles; those of a strip when it has no tiles.
        tags_are_legal: libtiff, and with it libvips, refuses a file whose orientation or unit does not exist.
        number: which page of the file it is, or -1 - n for the n-th reduction that hangs on the first page.
    """

    number: int
    width: int
    height: int
    bits: tuple[int, ...]
    sample_format: int
    extra: tuple[int, ...]
    photometric: int
    compression: int
    planar: int
    fill_order: int
    tiled: bool
    tile: tuple[int, int]
    reduced: bool
    tags_are_legal: bool

    @property
    def tile_bytes(self) -> int:
        return self.tile[0] * self.tile[1] * sum(self.bits) // 8

    @property
    def tile_row_bytes(self) -> int:
        """Bytes of all tiles side by side."""
        return -(-self.width // self.tile[0]) * self.tile_bytes

    def kind(self) -> tuple[object, ...]:
        """What all reductions of one picture have in common."""
        return self.bits, self.sample_format, self.extra, self.photometric, self.planar, self.fill_order


def read_pages(file: IO[bytes]) -> list[Page]:
    """The first page of a file, its reductions, and up to 63 pages behind it.

    Raises: one of UNREADABLE when the first directory cannot be read.
    """
    layout = _Layout.of(file)
    first, after = layout.directory(file, layout.first(file))
    pages = [_page(first, 0)]
    for number, offset in enumerate(first.get(_SUB_DIRECTORIES, ())):
        pages += _other(layout, file, offset, -1 - number)[0]
    seen = {0}
    for number in range(1, MAX_PAGES):
        if after in seen:
            break
        seen.add(after)
        found, after = _other(layout, file, after, number)
        pages += found
    return pages


def reductions(pages: list[Page]) -> dict[int, Page]:
    """The reductions of the first page by their factor, as far as their sizes and kinds agree with it."""
    whole = pages[0]
    found: dict[int, Page] = {}
    for page in pages[1:]:
        factor = round(whole.width / page.width) if whole.width >= whole.height else round(whole.height / page.height)
        sizes = ((whole.width, page.width), (whole.height, page.height))
        fits = factor > 1 and all(abs(long - factor * short) < max(2, factor) or short == 1 for long, short in sizes)
        if page.reduced and fits and page.kind() == whole.kind():
            found.setdefault(factor, page)
    return found


def _other(layout: _Layout, file: IO[bytes], offset: int, number: int) -> tuple[list[Page], int]:
    """A page that nobody depends on, and the offset of the next; no page when it cannot be read."""
    try:
        tags, after = layout.directory(file, offset)
        return [_page(tags, number)], after
    except UNREADABLE:
        return [], 0


def _page(tags: Mapping[int, tuple[int, ...]], number: int) -> Page:
    def one(tag: int, default: int) -> int:
        return tags.get(tag, (default,))[0]

    width, height = one(_WIDTH, 0), one(_HEIGHT, 0)
    samples = one(_SAMPLES, 1)
    bits = tags.get(_BITS, (1,))
    tiled = _TILE_WIDTH in tags
    tile = (one(_TILE_WIDTH, 0), one(_TILE_HEIGHT, 0)) if tiled else (width, min(height, one(_ROWS_PER_STRIP, height)))
    if min(width, height, samples, *tile) < 1 or samples > _MAX_VALUES:
        raise ValueError(f"a page of {width}x{height} pixels in tiles of {tile[0]}x{tile[1]}, {samples} samples each")
    return Page(
        number=number,
        width=width,
        height=height,
        bits=bits * samples if len(bits) == 1 else bits,
        sample_format=one(_SAMPLE_FORMAT, 1),
        extra=tags.get(_EXTRA_SAMPLES, ()),
        photometric=one(_PHOTOMETRIC, 0),
        compression=one(_COMPRESSION, 1),
        planar=one(_PLANAR, 1),
        fill_order=one(_FILL_ORDER, 1),
        tiled=tiled,
        tile=tile,
        reduced=bool(one(_SUBFILE, 0) & 1),
        tags_are_legal=one(_ORIENTATION, 1) in range(1, 9) and one(_RESOLUTION_UNIT, 1) in (1, 2, 3),
    )


@dataclass(frozen=True, slots=True)
class _Layout:
    """Byte order, and the sizes that differ between TIFF and BigTIFF."""

    order: str
    big: bool

    @classmethod
    def of(cls, file: IO[bytes]) -> _Layout:
        file.seek(0)
        head = file.read(4)
        order = {b"II": "<", b"MM": ">"}.get(head[:2])
        version = head[2:][:: 1 if order == ">" else -1]
        if order is None or version not in (b"\0\x2a", b"\0\x2b"):
            raise ValueError("no TIFF")
        return cls(order, version == b"\0\x2b")

    def first(self, file: IO[bytes]) -> int:
        file.seek(8 if self.big else 4)
        return self._read(file, "Q" if self.big else "I")[0]

    def directory(self, file: IO[bytes], offset: int) -> tuple[dict[int, tuple[int, ...]], int]:
        """The whole-number tags of at most 64 values each, and where the next directory begins."""
        file.seek(offset)
        count = self._read(file, "Q" if self.big else "H")[0]
        if not 0 < count <= _MAX_ENTRIES:
            raise ValueError(f"a directory of {count} entries")
        size = 20 if self.big else 12
        entries = file.read(count * size)
        if len(entries) < count * size:
            raise ValueError("the file ends in a directory")
        (after,) = self._read(file, "Q" if self.big else "I")
        return dict(self._tags(file, entries, size)), after

    def _tags(self, file: IO[bytes], entries: bytes, size: int) -> Iterator[tuple[int, tuple[int, ...]]]:
        room, number = (8, "Q") if self.big else (4, "I")
        for start in range(0, len(entries), size):
            tag, kind, count = struct.unpack_from(f"{self.order}HH{number}", entries, start)
            if kind not in _SIZES or not 0 < count <= _MAX_VALUES:
                continue
            form = f"{self.order}{count}{_SIZES[kind]}"
            place = start + size - room
            if struct.calcsize(form) <= room:
                yield tag, struct.unpack_from(form, entries, place)
            else:
                file.seek(struct.unpack_from(self.order + number, entries, place)[0])
                yield tag, self._read(file, form[1:])

    def _read(self, file: IO[bytes], form: str) -> tuple[int, ...]:
        form = self.order + form
        data = file.read(struct.calcsize(form))
        return struct.unpack(form, data)
