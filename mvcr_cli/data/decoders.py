"""A picture as its file stores it, before any turning, in pieces: what a decoder is, and the one that needs no pyvips."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import BufferedReader
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mvcr_cli.data.colour import extremes, grey_range, is_deep_grey, to_rgb
from mvcr_cli.data.images import (
    MAX_HUGE_PIXELS,
    decoding_cost,
    load_pixels,
    open_regular,
    opened,
    orientation_of,
    stored_size,
)
from mvcr_cli.data.in_flight import in_flight
from mvcr_cli.errors import BadImage

Fetch = Callable[[int, int, int, int], NDArray[np.uint8]]  # left, top, width, height -> (height, width, 3)


@dataclass(frozen=True, slots=True)
class Stored:
    """What the header of a file says; width and height in pixels, before any turning.

    Args:
        mode: Pillow's.
        whole: the decoder must keep all of it (progressive JPEG, interlaced PNG).
        transparency: of a PNG: the colour, palette entry or entries that are not opaque.
        identity: device, inode, size and time of the file, to notice that it has changed.
    """

    path: str | os.PathLike[str]
    format: str
    mode: str
    width: int
    height: int
    orientation: int
    whole: bool
    transparency: Any
    identity: tuple[int, ...]

    @property
    def pixels(self) -> int:
        return self.width * self.height


def read_header(path: str | os.PathLike[str]) -> Stored:
    """Raises: BadImage, WorkerFailed; see `images.load_picture`."""
    with opened(path, MAX_HUGE_PIXELS) as image:
        assert image.fp is not None and image.format is not None
        width, height = stored_size(image)
        return Stored(
            path=path,
            format=image.format if image.format != "MPO" else "JPEG",
            mode=image.mode,
            width=width,
            height=height,
            orientation=orientation_of(image),
            whole=bool(image.info.get("progressive") or image.info.get("interlace")),
            transparency=image.info.get("transparency"),
            identity=_identity(image.fp.fileno()),
        )


def reopened(stored: Stored) -> BufferedReader:
    """The same file again, from its beginning. Raises: BadImage when another one has taken its place."""
    file = open_regular(stored.path)
    if _identity(file.fileno()) != stored.identity:
        file.close()
        raise BadImage("corrupt", "the file changed while it was read")
    return file


def _identity(descriptor: int) -> tuple[int, ...]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(frozen=True, slots=True)
class Reader:
    """An open picture, `width` x `height` pixels; `fetch` gives any part of it as RGB, or only parts further down."""

    width: int
    height: int
    fetch: Fetch


class Decoder(Protocol):
    """Reads a stored picture by parts.

    `width`, `height` and `orientation` are those of the pixels that it gives; `random_access` says whether parts may be
    fetched in any order. `reductions` are the whole numbers, 1 first, by which it can shrink while decoding. A reduced
    picture has ceil(width / reduction) columns when `exact`, else about as many.
    """

    width: int
    height: int
    orientation: int
    random_access: bool
    reductions: tuple[int, ...]
    exact: bool

    def reader(self, reduction: int) -> AbstractContextManager[Reader]:
        """Raises: BadImage, then and while fetching."""


class WholeDecoder:
    """Pillow's: the picture is decoded at the first use and kept until `close`, 4 bytes a pixel."""

    random_access = True
    reductions: tuple[int, ...] = (1,)
    exact = True

    def __init__(self, stored: Stored) -> None:
        self._stored = stored
        self.width, self.height, self.orientation = stored.width, stored.height, stored.orientation
        if stored.format == "TIFF":  # Pillow turns it while decoding
            self.orientation = 1
            if stored.orientation > 4:
                self.width, self.height = stored.height, stored.width
        self._image: Image.Image | None = None
        self._holding = contextlib.ExitStack()
        self._grey: tuple[float, float] | None = None

    @contextlib.contextmanager
    def reader(self, reduction: int) -> Iterator[Reader]:
        if self._image is None:
            self._load()
        yield Reader(self.width, self.height, self._fetch)

    def _load(self) -> None:
        with opened(self._stored.path, MAX_HUGE_PIXELS) as image:
            self._holding.enter_context(in_flight.holding(decoding_cost(image, image.size)))
            load_pixels(image)
            if image.size != (self.width, self.height):
                raise BadImage("corrupt", "the file changed while it was read")
            if is_deep_grey(image.mode):
                self._grey = grey_range(image.mode, *extremes(np.asarray(image)))
            self._image = image

    def close(self) -> None:
        """Let go of the picture."""
        self._image = None
        self._holding.close()

    def _fetch(self, left: int, top: int, width: int, height: int) -> NDArray[np.uint8]:
        assert self._image is not None
        return np.asarray(to_rgb(self._image.crop((left, top, left + width, top + height)), self._grey))
