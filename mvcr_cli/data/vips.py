"""JPEG, PNG and TIFF by libvips, some rows at a time. The package `pyvips` is loaded at the first use, and may be missing.

Only files whose header `images` has checked come here, only with the loader of their own format, and only kinds of
pixels that are known to come out as Pillow gives them; `decoder_for` returns None for everything else.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mvcr_cli.data.colour import extremes, grey_range, is_deep_grey, to_rgb
from mvcr_cli.data.decoders import Decoder, Reader, Stored, reopened
from mvcr_cli.data.images import FULL_DECODE_PIXELS
from mvcr_cli.data.in_flight import in_flight
from mvcr_cli.data.quiet import quiet_stderr
from mvcr_cli.data.tiff import UNREADABLE, Page, read_pages, reductions
from mvcr_cli.errors import BadImage, MvcrError, lacked_memory
from mvcr_cli.paths import display_name

MAX_TILE_ROW_BYTES = 256 << 20  # libvips keeps two rows of a TIFF's tiles, but reads a large strip line by line
_MEASURED_PIXELS = 1 << 22  # at a time

# Samples and types of the pixels as libvips gives them, by Pillow's mode; a PNG with a transparent colour has one more.
_SAMPLES: dict[str, dict[str, tuple[int, ...]]] = {
    "JPEG": {"L": (1,), "RGB": (3,), "CMYK": (4,)},
    "PNG": {"1": (1, 2), "L": (1, 2), "I;16": (1, 2), "LA": (2,), "P": (3, 4), "RGB": (3, 4), "RGBA": (2, 4)},
    "TIFF": {
        "1": (1,), "L": (1,), "I;16": (1,), "I;16B": (1,), "I": (1,), "F": (1,), "P": (3,), "LA": (2,), "RGB": (3, 4),
        "RGBA": (4,), "CMYK": (4,),
    },
}  # fmt: skip
_TYPES = {"uchar": np.uint8, "ushort": np.uint16, "int": np.int32, "float": np.float32}
_TYPES_OF_MODE = {"I;16": ("ushort",), "I;16B": ("ushort",), "I": ("int",), "F": ("float",)}

# Of a TIFF: photometric interpretation, sample format, bits, extra samples.
_TIFF_KINDS = frozenset({
    *((white, 1, (bits,), ()) for white in (0, 1) for bits in (1, 2, 4, 8)),
    (1, 1, (16,), ()), (1, 2, (32,), ()), (1, 3, (32,), ()), (1, 1, (8, 8), (2,)), (3, 1, (4,), ()), (3, 1, (8,), ()),
    (2, 1, (8, 8, 8), ()), (2, 1, (16, 16, 16), ()), (2, 1, (16, 16, 16, 16), (2,)),
    *((2, 1, (8, 8, 8, 8), extra) for extra in ((), (0,), (1,), (2,))),
    (5, 1, (8, 8, 8, 8), ()), (6, 1, (8, 8, 8), ()),
})  # fmt: skip
_JPEG_IN_TIFF = 7
_TIFF_COMPRESSIONS = frozenset({1, 2, 3, 4, 5, _JPEG_IN_TIFF, 8, 32773, 32946})  # none, fax, LZW, deflate, PackBits
_YCBCR = 6
_PLANES = 2


def decoder_for(stored: Stored) -> Decoder | None:
    """A decoder that reads this file in pieces, or None when it is of no kind that pyvips is trusted with here.

    Raises: BadImage.
    """
    if stored.mode not in _SAMPLES.get(stored.format, {}):
        return None
    if stored.whole and stored.pixels > FULL_DECODE_PIXELS:
        kind = "progressive JPEG" if stored.format == "JPEG" else "interlaced PNG"
        detail = f"{kind} of {stored.width}x{stored.height}, limit {FULL_DECODE_PIXELS:,}"
        raise BadImage("too_many_pixels", detail)
    if stored.format == "TIFF":
        return _tiff_decoder(stored)
    if stored.format == "JPEG":
        # The other libraries read on over damaged data as well, but not over a missing end.
        options = {n: {"shrink": n} for n in (1, 2, 4, 8) if n <= min(stored.width, stored.height)}
        return VipsDecoder(stored, "jpegload_source", options, fail_on="truncated")
    return VipsDecoder(stored, "pngload_source", {1: {}}, fail_on="error")


def _tiff_decoder(stored: Stored) -> Decoder | None:
    with reopened(stored) as file:
        try:
            pages = read_pages(file)
        except UNREADABLE as error:
            raise BadImage("corrupt", display_name(f"TIFF directory: {error}")) from error
    whole = pages[0]
    if (whole.width, whole.height) != (stored.width, stored.height) or not _is_known(whole):
        return None
    levels = {factor: page for factor, page in reductions(pages).items() if _is_known(page)}
    options = {1: {"page": 0}} | {
        factor: {"page": page.number} if page.number > 0 else {"page": 0, "subifd": -1 - page.number}
        for factor, page in sorted(levels.items())
    }
    if whole.tiled:  # at "error", libvips gives black for a tile that cannot be decoded
        return VipsDecoder(stored, "tiffload_source", options, exact=False, fail_on="warning", access="random")
    return VipsDecoder(stored, "tiffload_source", options, exact=False, fail_on="error")


def _is_known(page: Page) -> bool:
    """Whether libvips gives the pixels of this page as Pillow does, and in bounded memory."""
    return (
        (page.photometric, page.sample_format, page.bits, page.extra) in _TIFF_KINDS
        and page.compression in _TIFF_COMPRESSIONS
        and (page.photometric == _YCBCR) <= (page.compression == _JPEG_IN_TIFF)
        and page.fill_order == 1
        and page.tags_are_legal
        and (page.tile_row_bytes <= MAX_TILE_ROW_BYTES or not (page.tiled or page.planar == _PLANES))
    )


class VipsDecoder:
    """One file; every reader opens it anew.

    Args:
        loader: of pyvips.
        options: what the loader takes for every possible reduction.
    """

    def __init__(self, stored: Stored, loader: str, options: dict[int, dict[str, Any]], *, exact: bool = True,
                 fail_on: str, access: str = "sequential") -> None:  # fmt: skip
        self._stored, self._loader, self._options = stored, loader, options
        self._always = {"fail_on": fail_on, "access": access}
        self._grey: tuple[float, float] | None = None
        self.width, self.height, self.orientation = stored.width, stored.height, stored.orientation
        self.random_access = access == "random"
        self.reductions, self.exact = tuple(options), exact

    @contextlib.contextmanager
    def reader(self, reduction: int) -> Iterator[Reader]:
        """Of a picture in grey of 32 bits, the first use reads all of it once more, for its extremes."""
        with in_flight.holding(self._stored.pixels if self._stored.whole else 0):
            if self._grey is None and is_deep_grey(self._stored.mode):
                self._grey = self._measure()
            source = self._open(reduction)
            if not self.exact:
                yield Reader(source.width, source.height, lambda *box: self._rgb(source.fetch(*box)))
                return
            width, height = (-(-length // reduction) for length in (self.width, self.height))
            yield Reader(width, height, lambda *box: self._rgb(source.padded(*box)))

    def _open(self, reduction: int) -> _Source:
        pyvips = _pyvips()
        with _translated(), reopened(self._stored) as file:
            descriptor = pyvips.Source.new_from_descriptor(file.fileno())  # which duplicates it
            load = getattr(pyvips.Image, self._loader)
            image = load(descriptor, **self._always, **self._options[reduction])
            source = _Source(image, pyvips.Region.new(image))
        self._check(image, reduction)
        return source

    def _check(self, image: Any, reduction: int) -> None:
        stored = self._stored
        exact = reduction == 1 or self.exact
        sizes = stored.width // reduction, stored.height // reduction  # libvips rounds down
        types = _TYPES_OF_MODE.get(stored.mode, ("uchar", "ushort"))
        if (exact and (image.width, image.height) != sizes) or image.format not in types:
            raise BadImage(
                "corrupt", f"{image.width}x{image.height} pixels of type {image.format}, not as its header says"
            )
        if image.bands not in _SAMPLES[stored.format][stored.mode]:
            raise BadImage("corrupt", f"{image.bands} samples a pixel, not as its header says")

    def _measure(self) -> tuple[float, float]:
        if self._stored.mode.startswith("I;16"):
            return grey_range(self._stored.mode, 0, 0)
        source = self._open(1)
        rows = max(1, _MEASURED_PIXELS // source.width)
        found = [
            extremes(source.fetch(0, top, source.width, min(rows, source.height - top)))
            for top in range(0, source.height, rows)
        ]
        return grey_range(self._stored.mode, *extremes(np.array(found)))

    def _rgb(self, values: NDArray[Any]) -> NDArray[np.uint8]:
        """Shape: (h, w, samples) -> (h, w, 3)."""
        mode = self._stored.mode
        if is_deep_grey(mode):
            return np.asarray(to_rgb(Image.fromarray(np.ascontiguousarray(values[..., 0])), self._grey))
        if values.dtype == np.uint16:
            values = (values >> 8).astype(np.uint8)
        transparency = self._stored.transparency if mode in ("1", "L", "RGB") else None
        if transparency is not None or (mode == "RGB" and values.shape[-1] == 4):
            values = values[..., :-1]  # libvips made it of the transparent colour, or a TIFF says that it means nothing
        if values.shape[-1] == 3 and transparency is None:
            return values
        image = _image(values, mode)
        if transparency is not None:
            image.info["transparency"] = transparency
        return np.asarray(to_rgb(image))


@dataclass(frozen=True, slots=True)
class _Source:
    """An image of pyvips, read through one region, so in the thread that asks."""

    image: Any
    region: Any

    @property
    def width(self) -> int:
        return int(self.image.width)

    @property
    def height(self) -> int:
        return int(self.image.height)

    def padded(self, left: int, top: int, width: int, height: int) -> NDArray[Any]:
        """Like `fetch`, but beyond the last row and column these are repeated."""
        inside_x, inside_y = min(left, self.width - 1), min(top, self.height - 1)
        right, bottom = min(left + width, self.width), min(top + height, self.height)
        found = self.fetch(inside_x, inside_y, right - inside_x, bottom - inside_y)
        more = (0, height - len(found)), (0, width - found.shape[1]), (0, 0)
        return np.pad(found, more, "edge") if any(map(any, more)) else found

    def fetch(self, left: int, top: int, width: int, height: int) -> NDArray[Any]:
        """Shape: (height, width, samples)."""
        with _translated():
            data = self.region.fetch(left, top, width, height)
        return np.frombuffer(data, _TYPES[self.image.format]).reshape(height, width, self.image.bands)


def _image(values: NDArray[np.uint8], mode: str) -> Image.Image:
    values = np.ascontiguousarray(values)
    if values.shape[-1] == 1:
        return Image.fromarray(values[..., 0])
    name = {2: "LA", 3: "RGB", 4: "CMYK" if mode == "CMYK" else "RGBA"}[values.shape[-1]]
    height, width = values.shape[:2]
    return Image.frombuffer(name, (width, height), values, "raw", name, 0, 1)


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """What goes wrong in libvips becomes a BadImage, and it says nothing by itself."""
    try:
        with quiet_stderr:
            yield
    except MvcrError:
        raise
    except Exception as error:  # pyvips.Error is no name that exists without pyvips
        if lacked_memory(error):
            raise BadImage("out_of_memory", "not enough memory to decode it") from error
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise BadImage("corrupt", display_name(lines[-1] if lines else type(error).__name__)) from error


def is_installed() -> bool:
    return _pyvips() is not None


@functools.cache
def _pyvips() -> Any:
    try:
        import pyvips
    except (ImportError, OSError):  # the package, or the library that it loads
        return None
    pyvips.block_untrusted_set(True)
    pyvips.cache_set_max(0)  # it would keep files open and their pixels in memory
    return pyvips
