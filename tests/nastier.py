"""More pictures, names and folders that break image tools: each found by trying, and each with what must become of it."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from nasty import HEIGHT, WIDTH, encoded, noise, png, png_chunk, png_rows, reference, reference_grey
from numpy.typing import NDArray
from PIL import Image

JPEG_LIES = 21_000  # pixels a side: 441 megapixels, just below the limit


def _image() -> Image.Image:
    return Image.fromarray(reference())


def _jpeg(**options: object) -> bytes:
    return encoded(_image(), "JPEG", quality=95, **options)


def _after_soi(segments: bytes, jpeg: bytes) -> bytes:
    return jpeg[:2] + segments + jpeg[2:]


def _segment(marker: int, payload: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload


def with_size(jpeg: bytes, width: int, height: int) -> bytes:
    """The JPEG with another size in its header."""
    data = bytearray(jpeg)
    place = next(data.index(marker) for marker in (b"\xff\xc0", b"\xff\xc2") if marker in data)
    struct.pack_into(">HH", data, place + 5, height, width)
    return bytes(data)


def many_scans(count: int) -> bytes:
    """A grey progressive JPEG of 6 megapixels whose last scan comes again and again."""
    jpeg = encoded(Image.new("L", (2400, 2400), 128), "JPEG", progressive=True)
    last = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    return jpeg[:-2] + last * count + b"\xff\xd9"


def many_chunks(count: int) -> bytes:
    return png(WIDTH, HEIGHT, 8, 2, png_rows(reference()), before=png_chunk(b"teSt", b"") * count)


def adam7(values: NDArray[np.uint8]) -> bytes:
    """An interlaced PNG. Shape: (H, W, 3)."""
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    parts = [values[top::down, left::right] for top, left, down, right in passes]
    raw = b"".join(png_rows(part) for part in parts if part.size)
    height, width = values.shape[:2]
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 1))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(raw)) + png_chunk(b"IEND", b"")


def tiff(tags: list[tuple[int, int, list[int]]], pixels: bytes, *, big: bool = False, order: str = "<") -> bytes:
    """A TIFF with one directory. `tags` are (tag, type, values); offsets of pixels are counted from their beginning.

    Types: 3 short, 4 long, 16 long of 64 bits. Tags 273 and 324 hold offsets.
    """
    head = 16 if big else 8
    sizes = {3: (2, "H"), 4: (4, "I"), 16: (8, "Q")}
    start = head + len(pixels)
    room, extra = (8, b"") if big else (4, b"")
    count_format, entry_format = ("Q", "HHQ") if big else ("H", "HHI")
    after = start + struct.calcsize("<" + count_format) + len(tags) * (20 if big else 12) + room
    entries = b""
    for tag, kind, values in sorted(tags):
        shifted = [value + head for value in values] if tag in (273, 324) else values
        packed = b"".join(struct.pack(order + sizes[kind][1], value) for value in shifted)
        entries += struct.pack(order + entry_format, tag, kind, len(values))
        if len(packed) > room:
            entries += struct.pack(order + ("Q" if big else "I"), after + len(extra))
            extra += packed
        else:
            entries += packed.ljust(room, b"\0")
    mark = b"II" if order == "<" else b"MM"
    header = struct.pack(order + "HHHQ", 43, 8, 0, start) if big else struct.pack(order + "HI", 42, start)
    directory = struct.pack(order + count_format, len(tags)) + entries + bytes(room)
    return mark + header + pixels + directory + extra


def _strips(**more: int) -> list[tuple[int, int, list[int]]]:
    """The tags of an uncompressed RGB picture in one strip."""
    size = WIDTH * HEIGHT * 3
    return [(256, 4, [WIDTH]), (257, 4, [HEIGHT]), (258, 3, [8, 8, 8]), (259, 3, [1]), (262, 3, [2]), (273, 4, [0]),
            (277, 3, [3]), (278, 4, [HEIGHT]), (279, 4, [size])]  # fmt: skip


def _replaced(
    tags: list[tuple[int, int, list[int]]], *new: tuple[int, int, list[int]]
) -> list[tuple[int, int, list[int]]]:
    numbers = {tag for tag, _, _ in new}
    return [entry for entry in tags if entry[0] not in numbers] + list(new)


def _tiled() -> bytes:
    """Two tiles beside each other, 32 x 48 each."""
    left, right = (reference()[:, side : side + 32].tobytes() for side in (0, 32))
    tags = [entry for entry in _strips() if entry[0] not in (273, 278, 279)]
    tags += [(322, 4, [32]), (323, 4, [48]), (324, 4, [0, len(left)]), (325, 4, [len(left), len(right)])]
    return tiff(tags, left + right)


def _planar() -> bytes:
    planes = [reference()[..., channel].tobytes() for channel in range(3)]
    size = WIDTH * HEIGHT
    tags = _replaced(_strips(), (273, 4, [0, size, 2 * size]), (279, 4, [size] * 3), (284, 3, [2]))
    return tiff(tags, b"".join(planes))


def _deep_cmyk() -> bytes:
    """Four channels of 16 bits; black is not used."""
    ink = np.dstack([255 - reference(), np.zeros((HEIGHT, WIDTH), np.uint8)]).astype("<u2") * 257
    tags = _replaced(_strips(), (258, 3, [16] * 4), (262, 3, [5]), (277, 3, [4]), (279, 4, [ink.nbytes]))
    return tiff(tags, ink.tobytes())


def _opaque(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """With a further channel that is 255 everywhere."""
    return np.dstack([values, np.full((HEIGHT, WIDTH), 255, np.uint8)])


def _white_is_zero() -> bytes:
    grey = 255 - reference_grey()
    tags = _replaced(_strips(), (258, 3, [8]), (262, 3, [0]), (277, 3, [1]), (279, 4, [grey.size]))
    return tiff(tags, grey.tobytes())


def _gps() -> bytes:
    block = Image.Exif()
    block[0x0112] = 1
    gps = block.get_ifd(0x8825)
    gps[1], gps[2], gps[3], gps[4] = "N", (48.0, 51.0, 24.0), "E", (2.0, 21.0, 3.0)
    block[0x8825] = gps
    block[0x9286] = b"comment" * 9000  # almost all of the 64 kB that a segment may have
    return _jpeg(exif=block)


def _orientation(kind: int, count: int, value: bytes) -> bytes:
    """A JPEG whose EXIF gives the orientation in another type, or with other values, than the standard says."""
    entry = struct.pack("<HHI", 0x0112, kind, count) + value.ljust(4, b"\0")
    block = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 1) + entry + bytes(4)
    return _after_soi(_segment(0xE1, block), _jpeg())


def _mpo() -> bytes:
    out = io.BytesIO()
    _image().save(out, "MPO", save_all=True, append_images=[_image().rotate(180)], quality=95)
    return out.getvalue()


def _pixels_then_fill(split: int) -> bytes:
    """A PNG with its pixels in chunks of few bytes."""
    raw = zlib.compress(png_rows(reference()), 9)
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 2, 0, 0, 0))
    pieces = b"".join(png_chunk(b"IDAT", raw[start : start + split]) for start in range(0, len(raw), split))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", b"") + pieces + png_chunk(b"IEND", b"")


def _ppm(maximum: int) -> bytes:
    values = (reference().astype(np.uint32) * maximum // 255).astype(">u2" if maximum > 255 else "u1")
    return b"P6\n# \x1b[31mcomment\n%d %d\n%d\n" % (WIDTH, HEIGHT, maximum) + values.tobytes()


def _bmp_top_down() -> bytes:
    bgr = reference()[..., ::-1].tobytes()
    info = struct.pack("<IiiHHIIiiII", 40, WIDTH, -HEIGHT, 1, 24, 0, len(bgr), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(bgr), 0, 0, 54) + info + bgr


def _bmp_565() -> bytes:
    red, green, blue = (reference()[..., channel].astype(np.uint16) for channel in range(3))
    packed = ((red >> 3) << 11 | (green >> 2) << 5 | blue >> 3).astype("<u2")[::-1].tobytes()
    info = struct.pack("<IiiHHIIiiII", 40, WIDTH, HEIGHT, 1, 16, 3, len(packed), 0, 0, 0, 0)
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    return b"BM" + struct.pack("<IHHI", 66 + len(packed), 0, 0, 66) + info + masks + packed


EXACT, LOSSY = 2, 40


def right_pictures() -> dict[str, tuple[bytes, int]]:
    """Files that must show the reference picture, with the tolerance in grey levels at the middle of each quarter."""
    jpeg = _jpeg()
    film = np.random.default_rng(0).bytes(1 << 24).replace(b"\xff\xd9", b"\xff\xda")  # about 500 marks of scans
    return {
        "bigtiff.tif": (tiff(_strips(), reference().tobytes(), big=True), EXACT),
        "motorola.tif": (tiff(_strips(), reference().tobytes(), order=">"), EXACT),
        "tiled.tif": (_tiled(), EXACT),
        "planar.tif": (_planar(), EXACT),
        "interlaced.png": (adam7(reference()), EXACT),
        "deep_alpha.png": (png(WIDTH, HEIGHT, 16, 6, png_rows(_opaque(reference()).astype(np.uint16) * 257)), EXACT),
        "sixteen_bit_cmyk.tif": (_deep_cmyk(), EXACT),
        "texts.png": (
            png(WIDTH, HEIGHT, 8, 2, png_rows(reference()), before=png_chunk(b"tEXt", b"key\0value") * 10_000),
            EXACT,
        ),
        "crumbs.png": (_pixels_then_fill(3), EXACT),
        "two_pictures.mpo": (_mpo(), LOSSY),
        "motion.jpg": (jpeg + film, LOSSY),
        "gps.jpg": (_gps(), LOSSY),
        "no_subsampling_rgb.jpg": (_jpeg(keep_rgb=True), LOSSY),
        "orientation_text.jpg": (_orientation(2, 2, b"6\0"), LOSSY),
        "orientation_zero.jpg": (_orientation(3, 1, b"\0\0"), LOSSY),
        "orientation_many.jpg": (_orientation(3, 2, b"\x01\0\x06\0"), LOSSY),
        "orientation_endless.jpg": (_orientation(3, 0xFFFFFFFF, b"\x10\0\0\0"), LOSSY),
        "comments.jpg": (_after_soi(_segment(0xFE, b"x") * 20_000, jpeg), LOSSY),
        "filled.jpg": (jpeg[:2] + b"\xff" * 500 + jpeg[2:], LOSSY),
        "zip_behind.png": (encoded(_image(), "PNG") + b"PK\x03\x04" * 99, EXACT),
        "ten_bits.ppm": (_ppm(1023), EXACT),
        "sixteen_bits.ppm": (_ppm(65535), EXACT),
        "top_down.bmp": (_bmp_top_down(), EXACT),
        "565.bmp": (_bmp_565(), 8),
    }  # fmt: skip


def right_grey_pictures() -> dict[str, bytes]:
    """Files that must show the reference picture in grey."""
    return {
        "white_is_zero.tif": _white_is_zero(),
        "deep_grey_alpha.png": png(WIDTH, HEIGHT, 16, 4, png_rows(_opaque(reference_grey()).astype(np.uint16) * 257)),
    }  # fmt: skip


def wrong_files() -> dict[str, tuple[bytes, str]]:
    """Files that must be refused, fast and in little memory, with the code."""
    canvas = bytearray(encoded(_image(), "WEBP", lossless=True, save_all=True, append_images=[_image().rotate(180)]))
    place = canvas.index(b"VP8X")
    canvas[place + 12 : place + 18] = (16_382).to_bytes(3, "little") * 2
    screen = bytearray(encoded(Image.new("P", (8, 8)), "GIF"))
    struct.pack_into("<HH", screen, 6, 20_000, 20_000)
    side = [(256, 4, [20_000]), (257, 4, [20_000]), (278, 4, [20_000])]
    codecs = {"lzw": 5, "jpeg": 7, "zstd": 50_000, "lzma": 34_925}
    claims = {
        f"claims_{name}.tif": (tiff(_replaced(_strips(), *side, (259, 3, [code])), bytes(99)), "corrupt")
        for name, code in codecs.items()
    }
    fax = [(258, 3, [1]), (259, 3, [4]), (262, 3, [0]), (277, 3, [1]), (279, 4, [99])]
    return claims | {
        "claims_fax.tif": (tiff(_replaced(_strips(), *side, *fax), bytes(99)), "corrupt"),
        "claims.jpg": (with_size(_jpeg(), JPEG_LIES, JPEG_LIES), "corrupt"),
        "claims_progressive.jpg": (with_size(_jpeg(progressive=True), JPEG_LIES, JPEG_LIES), "corrupt"),
        "screen.gif": (bytes(screen), "corrupt"),
        "canvas.webp": (bytes(canvas), "corrupt"),
        "scans.jpg": (many_scans(20_000), "corrupt"),
        "metadata.jpg": (_after_soi(_segment(0xE1, b"Exif\0\0" + bytes(65_000)) * 300, _jpeg()), "corrupt"),
        "chunks.png": (many_chunks(200_000), "corrupt"),
        "no_height.jpg": (with_size(_jpeg(), WIDTH, 0), "corrupt"),
        "icon.bmp": (encoded(_image(), "ICO"), "unknown_format"),
        "program.jpg": (b"\x7fELF" + bytes(999), "unknown_format"),
        "document.png": (b"%PDF-1.7\n" + _jpeg(), "unknown_format"),
        "archive.jpg": (b"PK\x03\x04" + encoded(_image(), "PNG"), "unknown_format"),
        "array.png": (b"\x93NUMPY\x01\0v\0{'descr': '|O', 'fortran_order': False, 'shape': (1,)}\n", "unknown_format"),
    }  # fmt: skip


def write_all(folder: Path, files: dict[str, bytes]) -> dict[str, Path]:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return {name: folder / name for name in files}


def sparse(path: Path, size: int) -> Path:
    """A file of that many zero bytes that takes no room."""
    path.touch()
    os.truncate(path, size)
    return path


def odd_links(folder: Path) -> dict[Path, str]:
    """Links to what is no regular file, or is one that has no size, with the code."""
    targets = {"tty.png": "/dev/tty", "random.jpg": "/dev/urandom", "full.png": "/dev/full", "memory.png": "/proc/self/mem",
               "status.jpg": "/proc/self/status"}  # fmt: skip
    codes = dict.fromkeys(targets, "not_a_file") | {"memory.png": "empty", "status.jpg": "empty"}
    for name, target in targets.items():
        (folder / name).symlink_to(target)
    return {folder / name: code for name, code in codes.items() if os.path.exists(targets[name])}


def changing() -> dict[str, Callable[[Path], None]]:
    """What may happen to a file between the moment it is indexed and the moment it is read."""

    def replace_by_pipe(path: Path) -> None:
        path.unlink()
        os.mkfifo(path)

    def replace_by_folder(path: Path) -> None:
        path.unlink()
        path.mkdir()

    def replace_by_loop(path: Path) -> None:
        path.unlink()
        path.symlink_to(path.name)

    return {
        "missing": Path.unlink,
        "not_a_file": replace_by_pipe,
        "not_a_file ": replace_by_folder,
        "not_a_file  ": replace_by_loop,
        "empty": lambda path: path.write_bytes(b"") and None,
        "corrupt": lambda path: path.write_bytes(path.read_bytes()[:100]) and None,
        "too_many_pixels": lambda path: path.write_bytes(png(2**31 - 1, 2**31 - 1, 8, 2, bytes(99))) and None,
        "unknown_format": lambda path: path.write_bytes(b"text") and None,
    }


def noise_jpeg(side: int) -> bytes:
    return encoded(noise(side), "JPEG")
