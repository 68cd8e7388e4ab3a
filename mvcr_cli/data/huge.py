"""Pictures of any size, read piece by piece: the memory needed does not grow with the picture.

    up to 16 megapixels                decoded whole by Pillow, 4 bytes a pixel
    larger JPEG, PNG and TIFF          by pyvips (`pip install 'mvcr[large]'`) from top to bottom, some rows at a time; of
                                       a tiled TIFF two rows of its tiles, and only those tiles that are needed
    progressive JPEG, interlaced PNG   likewise, but the decoder keeps 2 to 8 bytes a pixel; at most 450 megapixels
    everything else                    decoded whole by Pillow, up to 100 megapixels (450 for a glance)

A glance at a JPEG needs no pyvips. Orientation, colour, transparency and depth are those of `images`: the pixels are the
same as there, those of a JPEG within 2 levels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from types import TracebackType

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mvcr_cli.data import vips
from mvcr_cli.data.cuts import cut_tiles, shrunk_bands
from mvcr_cli.data.decoders import Decoder, Stored, WholeDecoder, read_header
from mvcr_cli.data.images import FULL_DECODE_PIXELS, HUGE_ABOVE, SIDEWAYS, load_picture
from mvcr_cli.data.turning import Box, stored_box, turn, turned_strips
from mvcr_cli.errors import BadImage

WHOLE_PIXELS = 100_000_000  # that Pillow may decode at full resolution where pyvips does not do it piece by piece
_MOST_SHRINK = 64  # of a glance, by boxes: bounds how many rows must be held together


class HugePicture:
    """One picture file, to be read in pieces; a context manager that lets go of what it keeps.

    `size` is the upright width and height in pixels. Nothing is decoded before it is asked for; whatever is asked for
    can raise BadImage then. To be used by one thread at a time; several pictures can be read at once.
    """

    def __init__(self, stored: Stored) -> None:
        self._stored = stored
        self._whole: WholeDecoder | None = None
        width, height = stored.width, stored.height
        self.size = (height, width) if stored.orientation in SIDEWAYS else (width, height)

    def __enter__(self) -> HugePicture:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._whole is not None:
            self._whole.close()
            self._whole = None

    def glance(self, side: int) -> Image.Image:
        """The whole picture, upright RGB, reduced by a whole number while it is decoded.

        The longer side is at least `side` pixels, or as long as the original's, and below 2 `side` where the original
        allows a reduction that strong.
        """
        if self._stored.pixels <= HUGE_ABOVE or self._stored.format == "JPEG":
            return load_picture(self._stored.path, side).image
        decoder = self._decoder(FULL_DECODE_PIXELS)
        shrink = max(1, max(self.size) // max(1, side))
        reduction = max(number for number in decoder.reductions if number <= shrink)
        with decoder.reader(reduction) as reader:
            shrink = min(_MOST_SHRINK, max(1, max(reader.width, reader.height) // max(1, side)))
            out = np.empty((-(-reader.height // shrink), -(-reader.width // shrink), 3), np.uint8)
            for top, band in shrunk_bands(reader, shrink):
                out[top : top + len(band)] = band
        return Image.fromarray(np.ascontiguousarray(turn(out, decoder.orientation)))

    def strips(self, rows: int, shrink: int = 1) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """The whole picture from top to bottom, upright, in one pass.

        Args:
            rows: height of each strip, of the last one at most, in pixels after the shrinking.
            shrink: every pixel is the mean of this many in each direction; a JPEG is shrunk by its cosine transform as
                far as that goes (2, 4, 8), which is faster and nearly the same. The shrunk picture has
                ceil(width / shrink) columns and ceil(height / shrink) rows.

        Yields: top in pixels after the shrinking, and (rows, W, 3).

        A picture that must be turned upright is kept in a temporary file meanwhile; see `turning.turned_strips`.
        """
        if rows < 1 or shrink < 1:
            raise ValueError(f"strips of {rows} rows, shrunk by {shrink}")
        decoder = self._decoder(WHOLE_PIXELS)
        reduction = max(number for number in decoder.reductions if shrink % number == 0) if decoder.exact else 1
        with decoder.reader(reduction) as reader:
            bands = shrunk_bands(reader, shrink // reduction)
            width, height = (-(-length // shrink) for length in self.size)
            yield from turned_strips(bands, decoder.orientation, width, height, rows)

    def tiles(self, boxes: Sequence[Box], px: int) -> list[NDArray[np.uint8]]:
        """Parts of the picture as square tiles, upright, in the order of the boxes; one pass from top to bottom.

        A box of px x px is cut out as it is. A larger one is shrunk, antialiased; a smaller one is enlarged. Memory:
        3 px x px bytes a tile, and up to 16 times that for those that the pass is just going through.

        Args:
            boxes: left, top, right, bottom in pixels of the upright picture at full resolution; they may stick out of
                the picture, where its edges are repeated; a tile that lies outside has the mean colour (124, 116, 104).

        Returns: one (px, px, 3) a box.

        Raises: ValueError for a box without pixels.
        """
        decoder = self._decoder(WHOLE_PIXELS)
        width, height = self.size
        places = [stored_box(box, decoder.orientation, width, height) for box in boxes]
        return [np.ascontiguousarray(turn(tile, decoder.orientation)) for tile in cut_tiles(decoder, places, px)]

    def _decoder(self, whole_pixels: int) -> Decoder:
        stored = self._stored
        if self._whole is not None:
            return self._whole
        if stored.pixels > HUGE_ABOVE:
            if (decoder := vips.decoder_for(stored)) is not None and vips.is_installed():
                return decoder
            if stored.pixels > whole_pixels:
                cure = "" if decoder is None else "; without this limit: pip install 'mvcr[large]'"
                detail = f"{stored.width}x{stored.height} to decode in full, limit {whole_pixels:,}{cure}"
                raise BadImage("too_many_pixels", detail)
        self._whole = WholeDecoder(stored)
        return self._whole


def open_huge(path: str | os.PathLike[str]) -> HugePicture:
    """Read the header of a file, of up to 2,000 megapixels.

    Raises:
        BadImage: the file is no usable picture.
        WorkerFailed: this process may not open any more files.
    """
    return HugePicture(read_header(path))
