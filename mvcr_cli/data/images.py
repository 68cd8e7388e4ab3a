"""Any file as safe, upright RGB pixels: the only module that opens pictures.

One policy, the same for every command:

    formats       JPEG PNG WEBP TIFF BMP GIF AVIF PPM JPEG2000, told by content and never by name
    orientation   EXIF is applied; an EXIF block that is broken or illegal is ignored
    frames        the first one of an animation or of several pages
    transparency  laid over white (not for grey of 16 bits and more)
    16-bit grey   divided by 257
    32-bit grey   0..255 as it is when no value is above 255, else divided by 257
    float grey    [0, 1] and [0, 255] keep their range, anything else is stretched from its minimum to its maximum
    limits        2 GiB a file, 100,000 px a side, 1,000 megapixels; 450 megapixels that must be decoded in full

A file that is no such picture raises `BadImage`. It never hangs, crashes, writes to the terminal or gives other
pixels. Everything here may run in several threads at once.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import (  # imported here so that Pillow never loads plugins later, from several threads at once
    AvifImagePlugin,  # noqa: F401
    BmpImagePlugin,  # noqa: F401
    GifImagePlugin,  # noqa: F401
    Image,
    ImageFile,
    Jpeg2KImagePlugin,  # noqa: F401
    JpegImagePlugin,
    MpoImagePlugin,  # noqa: F401
    PngImagePlugin,
    PpmImagePlugin,  # noqa: F401
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401
)

from mvcr_cli.data.quiet import mute_pillow, quiet_stderr
from mvcr_cli.data.structure import check_structure
from mvcr_cli.errors import BadImage, MvcrError, WorkerFailed
from mvcr_cli.paths import display_name

# Never EPS (starts Ghostscript), PSD, FITS, WMF...; "MPO" in this list raises KeyError, such files come in as JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "PPM", "JPEG2000")
IMAGE_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif",
    ".avifs", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx",
})  # fmt: skip
HEIC_ADVICE = "HEIC picture: convert it to JPEG or PNG"

MAX_BYTES = 2 << 30
MAX_SIDE = 100_000
MAX_PIXELS = 1_000_000_000
FULL_DECODE_PIXELS = 450_000_000
WHITE = (255, 255, 255)

# Pillow warns above its limit and raises above twice that; `_check_header` refuses all that it warns about.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = frozenset({5, 6, 7, 8})
_HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"})
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"II*\0", b"MM\0*")

# Deflate cannot expand more than 1,032 times, so a header that claims more is a lie that would cost gigabytes.
_MAX_EXPANSION = 1100
_BOUNDED_FORMATS = frozenset({"PNG", "BMP", "PPM"})
_BOUNDED_TIFF = frozenset({"raw", "packbits", "tiff_deflate", "tiff_adobe_deflate"})
# Other codecs are told by pixels: a Huffman-coded JPEG needs a bit for every 8 x 8 block, LZW a code for each 3,838 bytes.
# Codecs without such a bound get one that only blank pictures of many megapixels exceed.
_FREE_PIXELS = 8 << 20
_PIXELS_A_BYTE = {"JPEG": 512, "GIF": 3000, "jpeg": 512, "tiff_jpeg": 512}
_PIXELS_A_BYTE_OTHERS = 10_000
_FAX = frozenset({"group3", "group4", "tiff_ccitt", "tiff_raw_16"})  # a bit a row is enough for blank pages
_ANIMATED_WEBP_COST = 4  # of memory a pixel, next to other formats
_LEAST_BITS = {"1": 1, "P": 1, "L": 1, "LA": 16, "I;16": 12, "I;16B": 12, "RGB": 24, "RGBA": 32, "CMYK": 32}

_BAND_PIXELS = 1 << 22  # grey is stretched in bands, so that float64 copies of a large picture never exist


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded picture: `image` is upright RGB; `width` and `height` are the upright full picture in pixels.

    `image` is smaller than `width` x `height` when a reduced decode was asked for.
    """

    image: Image.Image
    width: int
    height: int


def load_picture(path: str | os.PathLike[str], at_least: int | None = None) -> Picture:
    """Decode one file.

    Args:
        at_least: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as the longer side of the decoded picture
            is still at least this many pixels. A picture that is smaller than that is decoded in full, never enlarged.

    Raises:
        BadImage: the file is no usable picture.
        WorkerFailed: this process may not open any more files.
    """
    with _opened(path) as image:
        width, height = image.size
        if at_least is not None and isinstance(image, JpegImagePlugin.JpegImageFile):
            # Only the longer side asks for anything: draft() takes the largest reduction that both sides allow.
            image.draft(None, (max(1, at_least), 1) if width >= height else (1, max(1, at_least)))
        _load(image, (width, height))
        if isinstance(image, TiffImagePlugin.TiffImageFile):  # Pillow has turned it already
            return Picture(_to_rgb(image), *image.size)
        orientation = _orientation(image)
        upright = _to_rgb(image)
        if orientation in _UPRIGHT:
            upright = upright.transpose(_UPRIGHT[orientation])
        if orientation in _SIDEWAYS:
            width, height = height, width
        return Picture(upright, width, height)


def load_rgb(path: str | os.PathLike[str]) -> Image.Image:
    """The whole picture as upright RGB. Raises: see `load_picture`."""
    return load_picture(path).image


def read_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Width and height of the upright picture in pixels, from the header alone. Raises: see `load_picture`.

    A PNG that keeps metadata behind its pixels is decoded, because its orientation may be there.
    """
    with _opened(path) as image:
        if isinstance(image, PngImagePlugin.PngImageFile) and "exif" not in image.info and _has_late_metadata(image):
            _load(image, image.size)
        width, height = image.size
        swapped = isinstance(image, TiffImagePlugin.TiffImageFile) and _ORIENTATION in image.tag_v2
        if _orientation(image) in _SIDEWAYS and not swapped:
            width, height = height, width
        return width, height


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a file for reading; pipes, sockets, devices and folders are refused and cannot block.

    Raises:
        BadImage: missing, permission, not_a_file, empty, too_large.
        WorkerFailed: this process may not open any more files.
    """
    flags = os.O_RDONLY
    for name in ("O_NONBLOCK", "O_NOCTTY", "O_BINARY"):  # not all exist on every platform
        flags |= getattr(os, name, 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        raise open_error(error) from error
    except ValueError as error:
        raise BadImage("missing", "no file can have this name") from error
    try:
        _check_file(os.fstat(descriptor))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def open_error(error: OSError) -> MvcrError:
    """What a failed open means: nearly always a `BadImage`, unless this process is at fault."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return WorkerFailed(f"cannot open more files: {reason}", "use fewer --workers, or raise `ulimit -n`")
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return BadImage("missing", "no such file, or a link to nothing")
    if error.errno in (errno.EACCES, errno.EPERM):
        return BadImage("permission", reason)
    return BadImage("out_of_memory" if error.errno == errno.ENOMEM else "not_a_file", reason)


def _check_file(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise BadImage("not_a_file", "not a regular file")
    if status.st_size == 0:
        raise BadImage("empty", "0 bytes")
    if status.st_size > MAX_BYTES:
        raise BadImage("too_large", f"{status.st_size:,} bytes, limit {MAX_BYTES:,}")


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[ImageFile.ImageFile]:
    """The picture with its header read and checked; whatever goes wrong inside becomes a `BadImage`."""
    with open_regular(path) as file:
        try:
            mute_pillow()
            size = os.fstat(file.fileno()).st_size
            check_structure(file, size)
            image = Image.open(file, formats=FORMATS)
            _check_header(image, size)
            yield image
        except MvcrError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise BadImage("too_many_pixels", f"more than {MAX_PIXELS:,}") from error
        except UnidentifiedImageError as error:
            raise _unidentified(file) from error
        except MemoryError as error:
            raise BadImage("out_of_memory", "not enough memory to decode it") from error
        except Exception as error:  # decoders raise SyntaxError, ValueError, struct.error, zlib.error, IndexError, ...
            raise BadImage("corrupt", display_name(f"{type(error).__name__}: {error}")) from error


def _unidentified(file: BufferedReader) -> BadImage:
    file.seek(0)
    head = file.read(12)
    if head[4:8] == b"ftyp" and head[8:12] in _HEIC_BRANDS:
        return BadImage("unknown_format", HEIC_ADVICE)
    if head.startswith(_SIGNATURES):
        return BadImage("corrupt", "the header cannot be read")
    return BadImage("unknown_format", f"not one of {', '.join(FORMATS)}")


def _check_header(image: ImageFile.ImageFile, file_bytes: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise BadImage("corrupt", f"{width}x{height} pixels")
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise BadImage("too_many_pixels", f"{width}x{height}; limits: {MAX_SIDE:,} a side, {MAX_PIXELS:,} in all")
    bounded = image.format in _BOUNDED_FORMATS or image.info.get("compression") in _BOUNDED_TIFF
    claimed = width * height * _LEAST_BITS.get(image.mode, 8) // 8
    too_much = bounded and claimed > _MAX_EXPANSION * file_bytes + (1 << 16)
    if too_much or width * height > _FREE_PIXELS + _pixels_a_byte(image) * file_bytes:
        raise BadImage("corrupt", f"claims {width}x{height} pixels, more than {file_bytes:,} bytes can hold")


def _pixels_a_byte(image: ImageFile.ImageFile) -> int:
    """How many pixels a byte of the file can stand for at most."""
    codec = image.info.get("compression") if image.format == "TIFF" else image.format
    return 8 * image.width if codec in _FAX else _PIXELS_A_BYTE.get(str(codec), _PIXELS_A_BYTE_OTHERS)


def _load(image: ImageFile.ImageFile, full: tuple[int, int]) -> None:
    """Decode the pixels; `full` is the size in the header. A progressive JPEG needs memory for that, however small.

    To be called once: after a failed load(), a second one gives black without an error.
    """
    width, height = full if image.info.get("progressive") else image.size
    cost = _ANIMATED_WEBP_COST if image.format == "WEBP" and getattr(image, "is_animated", False) else 1
    if cost * width * height > FULL_DECODE_PIXELS:
        raise BadImage("too_many_pixels", f"{width}x{height} to decode in full; limit {FULL_DECODE_PIXELS:,}")
    with quiet_stderr if isinstance(image, TiffImagePlugin.TiffImageFile) else contextlib.nullcontext():
        image.load()


def _orientation(image: ImageFile.ImageFile) -> int:
    """The EXIF orientation, 1 to 8, where 1 is upright and also stands for anything unreadable."""
    try:
        # Not image.getexif(): that of a PNG decodes the pixels behind our back.
        value = Image.Image.getexif(image).get(_ORIENTATION, 1)
        return int(value) if value in _UPRIGHT else 1
    except Exception:
        return 1


def _has_late_metadata(image: PngImagePlugin.PngImageFile) -> bool:
    """Whether chunks that can hold an orientation follow the pixels, where Pillow's header reader does not look."""
    file = image.fp
    assert file is not None
    position = file.tell()
    file.seek(8)
    in_pixels = late = False
    while not late and len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        in_pixels |= kind == b"IDAT"
        late = in_pixels and kind in (b"eXIf", b"iTXt", b"zTXt")
        file.seek(length + 4, os.SEEK_CUR)
    file.seek(position)
    return late


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _grey_to_rgb(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        page = Image.new("RGB", image.size, WHITE)
        page.paste(rgba, mask=rgba)
        return page
    return image if image.mode == "RGB" else image.convert("RGB")  # convert() would copy, 1.6 GB at 400 megapixels


def _grey_to_rgb(image: Image.Image) -> Image.Image:
    values = np.asarray(image)  # (H, W)
    with np.errstate(all="ignore"):
        least, most = float(values.min()), float(values.max())
    if not (math.isfinite(least) and math.isfinite(most)):
        raise BadImage("nonfinite", "pixels that are NaN or infinite")
    if image.mode.startswith("I;16"):
        low, high = 0.0, 65535.0
    elif image.mode == "I":
        low, high = 0.0, 65535.0 if most > 255 else 255.0
    elif least >= 0 and most <= 255:
        low, high = 0.0, 1.0 if most <= 1 else 255.0
    else:
        low, high = least, most
    return Image.fromarray(_stretch(values, low, high)).convert("RGB")


def _stretch(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """`low`..`high` as 0..255, rounded half up and clipped. Shape: (H, W) -> (H, W)."""
    height, width = values.shape
    scale = 255.0 / (high - low) if high > low else 0.0
    out = np.empty((height, width), np.uint8)
    rows = max(1, _BAND_PIXELS // width)
    for top in range(0, height, rows):
        band = values[top : top + rows].astype(np.float64)
        out[top : top + rows] = ((band - low) * scale + 0.5).clip(0, 255)
    return out
