"""Pictures and names that have broken image tools before, made on the spot.

The reference picture is 64 x 48: red, green over blue, white. A wrong orientation, colour order or range shows at once.
"""

from __future__ import annotations

import io
import os
import random
import socket
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

WIDTH, HEIGHT = 64, 48
EXACT, LOSSY, PALE = 2, 40, 60  # tolerances in grey levels: lossless, JPEG, and CMYK or poor JPEG

# How a picture must be stored so that each EXIF orientation shows it upright.
STORED_AS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}

HOSTILE_NAMES = tuple(
    name.encode("utf-8", "surrogateescape") if isinstance(name, str) else name
    for name in (
        *("a b", "-rf", "--help", 'it\'s "q"', "two\nlines", "a\tb", "safe.png\rEVIL", "abc\b\b\bxyz", "%s%n%(x)s{0}"),
        *(
            "\x1b[31mred\x1b[0m\x1b]0;title\x07",
            "\x1b]8;;http:\x1b\\click",
            "[red]x[bold",
            "[link=http:]x",
            ":warning:",
        ),
        *("=cmd|'C calc'!A0", "+1+1", "@SUM(1)", "a,b;c", "<img src=x onerror=alert(1)>", '"><script>alert(1)'),
        *(
            "photo_\u202egnp.exe",
            "a\u200bb",
            "a\u2028b",
            "caf\u00e9",
            "cafe\u0301",
            "猫",
            "🐈",
            "..a",
            ".hidden",
            "~",
            "$HOME",
            "*?[a]",
        ),
        *("\\0", "CON", "x.", "n" * 240, "007", "None", "true", "1e5", "http:", '{"a":1}', "Dog", "dog"),
        *(b"caf\xe9", b"\xed\xa0\x80"),
    )
)


def reference() -> NDArray[np.uint8]:
    """Shape: (48, 64, 3)."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[: HEIGHT // 2, : WIDTH // 2] = (255, 0, 0)
    pixels[: HEIGHT // 2, WIDTH // 2 :] = (0, 255, 0)
    pixels[HEIGHT // 2 :, : WIDTH // 2] = (0, 0, 255)
    pixels[HEIGHT // 2 :, WIDTH // 2 :] = 255
    return pixels


def reference_grey() -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(reference()).convert("L"))


def encoded(image: Image.Image, format_: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format_, **options)
    return out.getvalue()


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    return block


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, raw: bytes, before: bytes = b"", after: bytes = b"") -> bytes:
    """A PNG written by hand; `raw` are the filtered rows, `before` and `after` are chunks around the pixels."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(raw, 9))
    return b"\x89PNG\r\n\x1a\n" + header + before + pixels + after + png_chunk(b"IEND", b"")


def png_rows(values: NDArray[np.generic]) -> bytes:
    """Rows with filter byte 0, big-endian. Shape: (H, W) or (H, W, C)."""
    return b"".join(b"\0" + row.tobytes() for row in values.astype(values.dtype.newbyteorder(">")))


def tiff_header(width: int, height: int) -> bytes:
    """An uncompressed grey TIFF that claims any size and has no pixels."""
    tags = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, height), (279, 16)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0\0\0\0"


def noise(side: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8))


def good_pictures(folder: Path) -> dict[Path, int]:
    """Files that all show the reference picture, with the tolerance in grey levels."""
    image = Image.fromarray(reference())
    pages = {"save_all": True, "append_images": [image.rotate(180)]}
    files: dict[str, tuple[bytes, int]] = {
        "plain.png": (encoded(image, "PNG"), EXACT),
        "plain.jpg": (encoded(image, "JPEG", quality=95), LOSSY),
        "UPPER.JPG": (encoded(image, "JPEG", quality=95), LOSSY),
        "progressive.jpg": (encoded(image, "JPEG", quality=95, progressive=True), LOSSY),
        "trailing.jpg": (encoded(image, "JPEG", quality=95) + b"<script>" * 99, LOSSY),
        "png_inside.jpg": (encoded(image, "PNG"), EXACT),
        "cmyk.jpg": (encoded(image.convert("CMYK"), "JPEG", quality=95), PALE),
        "cmyk.tif": (encoded(image.convert("CMYK"), "TIFF"), 20),
        "deep.png": (png(WIDTH, HEIGHT, 16, 2, png_rows(reference().astype(np.uint16) * 257)), EXACT),
        "palette.png": (encoded(image.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"), EXACT),
        "palette_alpha.png": (
            encoded(image.convert("P", palette=Image.Palette.ADAPTIVE), "PNG", transparency=b"\xff" * 4),
            EXACT,
        ),
        "opaque.png": (encoded(image.convert("RGBA"), "PNG"), EXACT),
        "lossless.webp": (encoded(image, "WEBP", lossless=True), EXACT),
        "plain.bmp": (encoded(image, "BMP"), EXACT),
        "plain.ppm": (encoded(image, "PPM"), EXACT),
        "plain.jp2": (encoded(image, "JPEG2000"), 10),
        "pages.gif": (encoded(image, "GIF", **pages), PALE),
        "pages.png": (encoded(image, "PNG", **pages), EXACT),
        "pages.webp": (encoded(image, "WEBP", lossless=True, **pages), 10),
        "pages.tif": (encoded(image, "TIFF", **pages), EXACT),
    }
    for codec, tolerance in (("tiff_lzw", EXACT), ("tiff_deflate", EXACT), ("packbits", EXACT), ("jpeg", PALE)):
        files[f"{codec}.tif"] = encoded(image, "TIFF", compression=codec), tolerance
    for orientation in range(1, 9):
        turned = image.transpose(STORED_AS[orientation]) if orientation > 1 else image
        block = exif(orientation)
        files[f"exif{orientation}.jpg"] = encoded(turned, "JPEG", quality=95, exif=block), LOSSY
        files[f"exif{orientation}.png"] = encoded(turned, "PNG", exif=block), EXACT
        files[f"exif{orientation}.webp"] = encoded(turned, "WEBP", lossless=True, exif=block), EXACT
        files[f"exif{orientation}.tif"] = encoded(turned, "TIFF", tiffinfo={0x0112: orientation}), EXACT
        late = png_chunk(b"eXIf", block.tobytes()[6:])
        height, width = np.asarray(turned).shape[:2]
        files[f"late{orientation}.png"] = png(width, height, 8, 2, png_rows(np.asarray(turned)), after=late), EXACT
    turned, xmp = image.transpose(STORED_AS[6]), b'<x tiff:Orientation="6"/>'
    files["xmp6.jpg"] = encoded(turned, "JPEG", quality=95, xmp=xmp), LOSSY
    files["xmp6.tif"] = encoded(turned, "TIFF", tiffinfo={700: xmp}), EXACT
    files["exif99.jpg"] = encoded(image, "JPEG", quality=95, exif=exif(99)), LOSSY
    files["exif_broken.jpg"] = (
        encoded(image, "JPEG", quality=95, exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\xff" * 40),
        LOSSY,
    )
    return {_write(folder / name, data): tolerance for name, (data, tolerance) in files.items()}


def grey_pictures(folder: Path) -> list[Path]:
    """Files that all show the reference picture in grey."""
    grey = reference_grey()
    files = {
        "grey8.png": encoded(Image.fromarray(grey), "PNG"),
        "grey8_alpha.png": encoded(Image.fromarray(np.dstack([grey, np.full_like(grey, 255)])), "PNG"),
        "grey16.png": png(WIDTH, HEIGHT, 16, 0, png_rows(grey.astype(np.uint16) * 257)),
        "grey16.tif": encoded(Image.fromarray(grey.astype(np.uint16) * 257), "TIFF"),
        "int32.tif": encoded(Image.fromarray(grey.astype(np.int32) * 257), "TIFF"),
        "int32_small.tif": encoded(Image.fromarray(grey.astype(np.int32)), "TIFF"),
        "float_unit.tif": encoded(Image.fromarray((grey / 255).astype(np.float32)), "TIFF"),
        "float_bytes.tif": encoded(Image.fromarray(grey.astype(np.float32)), "TIFF"),
    }
    return [_write(folder / name, data) for name, data in files.items()]


def bad_files(folder: Path) -> dict[Path, str]:
    """Files that are no pictures, with the code they must be refused with."""
    big = noise(512)
    small = png(WIDTH, HEIGHT, 8, 2, png_rows(reference()))
    nan = np.full((9, 9), np.nan, np.float32)
    files = {
        "zero.jpg": (b"", "empty"),
        "one.png": (b"\x89", "unknown_format"),
        "half.jpg": (encoded(big, "JPEG")[:3000], "corrupt"),
        "half.png": (encoded(big, "PNG")[:9000], "corrupt"),
        "half.webp": (encoded(big, "WEBP")[:9000], "corrupt"),
        "half.tif": (encoded(big, "TIFF", compression="tiff_lzw")[:3000], "corrupt"),
        "half.gif": (encoded(big, "GIF")[:3000], "corrupt"),
        "half.bmp": (encoded(big, "BMP")[:3000], "corrupt"),
        "bad_deflate.tif": (_without_codec_data(encoded(big, "TIFF", compression="tiff_deflate")), "corrupt"),
        "text.jpg": (b"hello\n" * 50, "unknown_format"),
        "page.png": (b"<html><body>404</body></html>", "unknown_format"),
        "drawing.png": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "unknown_format"),
        "script.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "unknown_format"),
        "photo.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "unknown_format"),
        "bad_crc.png": (small[:40] + bytes([small[40] ^ 255]) + small[41:], "corrupt"),
        "no_zlib.png": (small.replace(b"IDAT\x78\xda", b"IDAT\xff\xff"), "corrupt"),
        "no_pixels.png": (small[:33] + png_chunk(b"IEND", b""), "corrupt"),
        "no_size.png": (png(0, 0, 8, 2, b""), "corrupt"),
        "text_bomb.png": (
            png(9, 9, 8, 0, bytes(90), png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 22)))),
            "corrupt",
        ),
        "claims_2g.png": (png(2**31 - 1, 2**31 - 1, 8, 2, bytes(99)), "too_many_pixels"),
        "claims_3g.png": (png(60_000, 60_000, 1, 0, bytes(1 << 20)), "too_many_pixels"),
        "claims_1.5g.png": (png(30_000, 50_000, 1, 0, bytes(1 << 20)), "too_many_pixels"),
        "claims_row.png": (png(100_001, 1, 8, 0, bytes(100_002)), "too_many_pixels"),
        "claims_400m.png": (png(20_000, 20_000, 8, 2, bytes(99)), "corrupt"),
        "claims_400m.tif": (tiff_header(20_000, 20_000), "corrupt"),
        "claims_10g.tif": (tiff_header(100_000, 100_000), "too_many_pixels"),
        "nan.tif": (encoded(Image.fromarray(nan), "TIFF"), "nonfinite"),
    }
    return {_write(folder / name, data): code for name, (data, code) in files.items()}


def non_files(folder: Path) -> dict[Path, str]:
    """Names that are no regular files, with the code they must be refused with; opening some of them would block."""
    os.mkfifo(folder / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        directory = os.getcwd()
        os.chdir(folder)  # the path of a socket may not be long
        server.bind("socket.png")
        os.chdir(directory)
    (folder / "endless.png").symlink_to("/dev/zero")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "dangling.png").symlink_to("nowhere.png")
    (folder / "folder.png").mkdir()
    codes = dict.fromkeys(("pipe.png", "socket.png", "endless.png", "loop.png", "folder.png"), "not_a_file")
    return {
        folder / name: code for name, code in (codes | {"dangling.png": "missing", "absent.png": "missing"}).items()
    }


def mutants(seeds: list[bytes], count: int, seed: int) -> Iterator[bytes]:
    """Copies of the seeds with bytes changed, cut off, inserted or removed."""
    chance = random.Random(seed)
    for _ in range(count):
        data = bytearray(chance.choice(seeds))
        place = chance.randrange(len(data))
        match chance.choice(("change", "cut", "insert", "remove", "stretch")):
            case "change":
                for _ in range(chance.choice((1, 2, 16))):
                    data[chance.randrange(len(data))] = chance.randrange(256)
            case "cut":
                del data[place:]
            case "insert":
                data[place:place] = chance.randbytes(chance.randrange(1, 100))
            case "remove":
                del data[place : place + chance.randrange(1, 100)]
            case "stretch":
                data[place : place + 4] = b"\x7f\xff\xff\xff"
        yield bytes(data)


def _without_codec_data(tiff: bytes) -> bytes:
    """The TIFF with its first strip overwritten, about which libtiff complains on descriptor 2."""
    return tiff[:8] + b"\xff" * 64 + tiff[72:]


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
