"""Any file as safe, upright RGB pixels: only this module and `huge` open pictures.

One policy, the same for every command:

    formats       JPEG PNG WEBP TIFF BMP GIF AVIF PPM JPEG2000, told by content and never by name
    orientation   EXIF is applied; an EXIF block that is broken or illegal is ignored
    frames        the first one of an animation or of several pages
    transparency  laid over white (not for grey of 16 bits and more)
    16-bit grey   divided by 257
    32-bit grey   0..255 as it is when no value is above 255, else divided by 257
    float grey    [0, 1] and [0, 255] keep their range, anything else is stretched from its minimum to its maximum
    limits        2 GiB a file, 16 GiB of JPEG, PNG and TIFF; 100,000 px a side, 1,000 megapixels, 2,000 where a reduced
                  picture is enough; 450 megapixels that must be decoded in full, and 128 by all threads together

A file that is no such picture raises `BadImage`. It never hangs, crashes, writes to the terminal or gives other
pixels. Everything here may run in several threads at once.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader

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

from mvcr_cli.data.colour import to_rgb
from mvcr_cli.data.in_flight import in_flight
from mvcr_cli.data.quiet import mute_pillow, quiet_stderr
from mvcr_cli.data.structure import check_structure
from mvcr_cli.errors import BadImage, MvcrError, WorkerFailed, lacked_memory
from mvcr_cli.paths import display_name

# Never EPS (starts Ghostscript), PSD, FITS, WMF...; "MPO" in this list raises KeyError, such files come in as JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "PPM", "JPEG2000")
IMAGE_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif",
    ".avifs", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx",
})  # fmt: skip
_STREAMED_FORMATS = ("JPEG", "PNG", "TIFF")  # Pillow reads other files into memory before it looks at them
HEIC_ADVICE = "HEIC picture: convert it to JPEG or PNG"

MAX_BYTES = 16 << 30
MAX_UNSTREAMED_BYTES = 2 << 30
MAX_SIDE = 100_000
MAX_PIXELS = 1_000_000_000
FULL_DECODE_PIXELS = 450_000_000
HUGE_ABOVE = 16_000_000  # a larger picture is read piece by piece where its format allows
MAX_HUGE_PIXELS = 2_000_000_000  # where Pillow itself would stop: twice its MAX_IMAGE_PIXELS

# Pillow warns above its limit, which is muted, and raises above twice that; `_check_header` refuses before.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS

_ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = frozenset({5, 6, 7, 8})
_HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"})
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

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


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded picture: `image` is upright RGB; `width` and `height` are the upright full picture in pixels.

    `image` is smaller than `width` x `height` when a reduced picture was asked for.
    """

    image: Image.Image
    width: int
    height: int


def load_picture(path: str | os.PathLike[str], at_least: int | None = None) -> Picture:
    """Decode one file.

    Args:
        at_least: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as the longer side of the decoded picture
            is still at least this many pixels; above 16 megapixels, every picture may be reduced in this way, by whole
            numbers. A picture that is smaller than that is decoded in full, never enlarged.

    Raises:
        BadImage: the file is no usable picture.
        WorkerFailed: this process may not open any more files.
    """
    with opened(path, MAX_PIXELS if at_least is None else MAX_HUGE_PIXELS) as image:
        if at_least is None or image.width * image.height <= HUGE_ABOVE:
            return _decoded(image, at_least)
        if isinstance(image, JpegImagePlugin.JpegImageFile):
            picture = _decoded(image, at_least)
            reduced = picture.image.reduce(max(1, max(picture.image.size) // max(1, at_least)))
            return Picture(reduced, picture.width, picture.height)
    from mvcr_cli.data.huge import open_huge  # which builds on this module

    with open_huge(path) as huge:
        return Picture(huge.glance(at_least), *huge.size)


def _decoded(image: ImageFile.ImageFile, at_least: int | None) -> Picture:
    width, height = image.size
    if at_least is not None and isinstance(image, JpegImagePlugin.JpegImageFile):
        # Only the longer side asks for anything: draft() takes the largest reduction that both sides allow.
        image.draft(None, (max(1, at_least), 1) if width >= height else (1, max(1, at_least)))
    with in_flight.holding(decoding_cost(image, (width, height))):
        load_pixels(image)
        if isinstance(image, TiffImagePlugin.TiffImageFile):  # Pillow has turned it already
            return Picture(to_rgb(image), *image.size)
        orientation = _orientation(image)
        upright = to_rgb(image)
        if orientation in UPRIGHT:
            upright = upright.transpose(UPRIGHT[orientation])
    if orientation in SIDEWAYS:
        width, height = height, width
    return Picture(upright, width, height)


def load_rgb(path: str | os.PathLike[str]) -> Image.Image:
    """The whole picture as upright RGB. Raises: see `load_picture`."""
    return load_picture(path).image


def read_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Width and height of the upright picture in pixels, from the header alone. Raises: see `load_picture`.

    A PNG that keeps metadata behind its pixels is searched for it, because its orientation may be there.
    """
    with opened(path, MAX_HUGE_PIXELS) as image:
        width, height = stored_size(image)
        return (height, width) if orientation_of(image) in SIDEWAYS else (width, height)


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
        raw = io.FileIO(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    try:
        return BufferedReader(raw)
    except BaseException:  # no memory for its buffer; from here on the descriptor is closed by its owner, and once
        raw.close()
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
def opened(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> Iterator[ImageFile.ImageFile]:
    """The picture with its header read and checked; whatever goes wrong inside becomes a `BadImage`."""
    with open_regular(path) as file:
        try:
            mute_pillow()
            file_bytes = os.fstat(file.fileno()).st_size
            check_structure(file, file_bytes)
            image = Image.open(file, formats=FORMATS if file_bytes <= MAX_UNSTREAMED_BYTES else _STREAMED_FORMATS)
            _check_header(image, file_bytes, max_pixels)
            yield image
        except MvcrError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise BadImage("too_many_pixels", f"more than {max_pixels:,}") from error
        except UnidentifiedImageError as error:
            raise _unidentified(file) from error
        except Exception as error:  # decoders raise SyntaxError, ValueError, struct.error, zlib.error, IndexError, ...
            if lacked_memory(error):
                raise BadImage("out_of_memory", "not enough memory to decode it") from error
            raise BadImage("corrupt", display_name(f"{type(error).__name__}: {error}")) from error


def _unidentified(file: BufferedReader) -> BadImage:
    file.seek(0)
    head = file.read(12)
    if head[4:8] == b"ftyp" and head[8:12] in _HEIC_BRANDS:
        return BadImage("unknown_format", HEIC_ADVICE)
    if (file_bytes := os.fstat(file.fileno()).st_size) > MAX_UNSTREAMED_BYTES:
        known = ", ".join(_STREAMED_FORMATS)
        return BadImage("too_large", f"{file_bytes:,} bytes, limit {MAX_UNSTREAMED_BYTES:,} for all but {known}")
    if head.startswith(_SIGNATURES):
        return BadImage("corrupt", "the header cannot be read")
    return BadImage("unknown_format", f"not one of {', '.join(FORMATS)}")


def _check_header(image: ImageFile.ImageFile, file_bytes: int, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise BadImage("corrupt", f"{width}x{height} pixels")
    if max(width, height) > MAX_SIDE or width * height > max_pixels:
        raise BadImage("too_many_pixels", f"{width}x{height}; limits: {MAX_SIDE:,} a side, {max_pixels:,} in all")
    bounded = image.format in _BOUNDED_FORMATS or image.info.get("compression") in _BOUNDED_TIFF
    claimed = width * height * _LEAST_BITS.get(image.mode, 8) // 8
    too_much = bounded and claimed > _MAX_EXPANSION * file_bytes + (1 << 16)
    if too_much or width * height > _FREE_PIXELS + _pixels_a_byte(image) * file_bytes:
        raise BadImage("corrupt", f"claims {width}x{height} pixels, more than {file_bytes:,} bytes can hold")


def _pixels_a_byte(image: ImageFile.ImageFile) -> int:
    """How many pixels a byte of the file can stand for at most."""
    codec = image.info.get("compression") if image.format == "TIFF" else image.format
    return 8 * image.width if codec in _FAX else _PIXELS_A_BYTE.get(str(codec), _PIXELS_A_BYTE_OTHERS)


def decoding_cost(image: ImageFile.ImageFile, full: tuple[int, int]) -> int:
    """How many pixels are in memory while the picture is decoded.

    Args:
        full: the size in the header. A progressive JPEG needs memory for that, however small it is decoded.

    Raises: BadImage for more than may be decoded in full.
    """
    width, height = full if image.info.get("progressive") else image.size
    times = _ANIMATED_WEBP_COST if image.format == "WEBP" and getattr(image, "is_animated", False) else 1
    if times * width * height > FULL_DECODE_PIXELS:
        raise BadImage("too_many_pixels", f"{width}x{height} to decode in full; limit {FULL_DECODE_PIXELS:,}")
    return times * width * height


def load_pixels(image: ImageFile.ImageFile) -> None:
    """Decode the pixels. To be called once: after a failed load(), a second one gives black without an error."""
    with quiet_stderr if isinstance(image, TiffImagePlugin.TiffImageFile) else contextlib.nullcontext():
        image.load()


def stored_size(image: ImageFile.ImageFile) -> tuple[int, int]:
    """Width and height in pixels as the file has them, before any turning."""
    width, height = image.size
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(_ORIENTATION) in SIDEWAYS:
        return height, width  # Pillow has exchanged them in `size` already
    return width, height


def orientation_of(image: ImageFile.ImageFile) -> int:
    """The EXIF orientation, 1 to 8, of a picture whose pixels are not decoded; 1 is upright or unreadable."""
    if isinstance(image, PngImagePlugin.PngImageFile) and (chunks := _metadata(image)):
        header = _chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
        small = PNG_SIGNATURE + header + chunks + _chunk(b"IDAT", zlib.compress(b"\0\0")) + _chunk(b"IEND", b"")
        return _orientation(Image.open(io.BytesIO(small), formats=("PNG",)))
    return _orientation(image)


def _orientation(image: Image.Image) -> int:
    try:
        # Not image.getexif(): that of a PNG decodes the pixels behind our back.
        value = Image.Image.getexif(image).get(_ORIENTATION, 1)
        return int(value) if value in UPRIGHT else 1
    except Exception:
        return 1


def _metadata(image: PngImagePlugin.PngImageFile) -> bytes:
    """The chunks that can hold an orientation; empty when none follows the pixels, where the header reader stops."""
    file = image.fp
    assert file is not None
    position = file.tell()
    file.seek(len(PNG_SIGNATURE))
    found, in_pixels, late = b"", False, False
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        in_pixels |= kind == b"IDAT"
        if kind == b"IEND" or (kind == b"fcTL" and in_pixels and image.is_animated):  # Pillow reads no further either
            break
        if kind in (b"eXIf", b"iTXt", b"zTXt", b"tEXt") and length <= PngImagePlugin.MAX_TEXT_MEMORY:
            found += _chunk(kind, file.read(length))
            late |= in_pixels
            length = 0
        file.seek(length + 4, os.SEEK_CUR)
    file.seek(position)
    return found if late else b""


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
