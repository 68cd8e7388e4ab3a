from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nasty import (
    STORED_AS,
    bad_files,
    encoded,
    exif,
    good_pictures,
    grey_pictures,
    mutants,
    noise,
    non_files,
    png,
    png_chunk,
    png_rows,
)
from numpy.typing import NDArray
from PIL import Image
from tiffs import Directory, strips, tiff, tiles

from mvcr_cli.data import cuts, huge, images, turning, vips
from mvcr_cli.data.cuts import FILL
from mvcr_cli.data.decoders import WholeDecoder, read_header
from mvcr_cli.data.huge import HugePicture, open_huge
from mvcr_cli.data.images import load_picture, load_rgb, read_size
from mvcr_cli.errors import BadImage, MvcrError, WriteFailed

Pixels = NDArray[np.uint8]
JPEG_LEVELS = 2  # that two decoders of JPEG may differ by


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every picture is read as a huge one is, some rows at a time."""
    monkeypatch.setattr(huge, "HUGE_ABOVE", 0)
    monkeypatch.setattr(images, "HUGE_ABOVE", 0)
    monkeypatch.setattr(cuts, "BAND_PIXELS", 1000)


@pytest.fixture
def no_vips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vips, "_pyvips", lambda: None)


def whole(path: Path) -> Pixels:
    """The ordinary reader's pixels."""
    return np.asarray(load_rgb(path))


def by_strips(path: Path, rows: int = 17, shrink: int = 1) -> Pixels:
    with open_huge(path) as picture:
        found = list(picture.strips(rows, shrink))
        height = -(-picture.size[1] // shrink)
    assert [top for top, _ in found] == list(range(0, height, rows))
    assert all(len(strip) == rows for _, strip in found[:-1])
    return np.concatenate([strip for _, strip in found])


def some_tiles(path: Path, boxes: list[tuple[int, int, int, int]], px: int) -> list[Pixels]:
    with open_huge(path) as picture:
        return picture.tiles(boxes, px)


def is_in_pieces(path: Path) -> bool:
    with open_huge(path) as picture:
        return not isinstance(picture._decoder(10**10), WholeDecoder)


def differ(left: NDArray[np.generic], right: NDArray[np.generic]) -> int:
    assert left.shape == right.shape
    return int(np.abs(left.astype(int) - right.astype(int)).max())


def photo(width: int, height: int, seed: int = 0) -> Pixels:
    """Smooth shapes with a little noise. Shape: (height, width, 3)."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return (smooth + np.random.default_rng(seed + 1).integers(-9, 10, smooth.shape)).clip(0, 255).astype(np.uint8)


def modes(folder: Path) -> Iterator[Path]:
    """Pictures in every mode that Pillow writes, with transparent colours and partial alpha."""
    picture = noise(100)
    alpha = noise(100, seed=1).getchannel(0)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK"):
        image = picture.convert(mode)
        if mode in ("LA", "RGBA"):
            image.putalpha(alpha)
        for name, options in (("png", {}), ("tif", {}), ("tif", {"compression": "tiff_lzw"})):
            if (mode, name) != ("CMYK", "png"):
                path = folder / f"{mode}{len(options)}.{name}"
                image.save(path, **options)
                yield path
    see_through: dict[str, object] = {"1": 1, "L": 5, "RGB": (9, 9, 9), "P": bytes(range(256))}
    picture.paste((9, 9, 9), (0, 0, 30, 30))
    for mode, transparency in see_through.items():
        path = folder / f"see_through_{mode}.png"
        picture.convert(mode).save(path, transparency=transparency)
        yield path


def deep(folder: Path) -> Iterator[Path]:
    """Pictures of 16 bits and more."""
    values = np.random.default_rng(0).integers(0, 65536, (60, 50, 4), np.uint16)
    colour = struct.pack(">3H", *values[0, 0, :3])
    for name, kind, bands, before in (
        ("grey", 0, 1, b""), ("grey_see_through", 0, 1, png_chunk(b"tRNS", colour[:2])), ("grey_alpha", 4, 2, b""),
        ("rgb", 2, 3, b""), ("rgb_see_through", 2, 3, png_chunk(b"tRNS", colour)), ("rgba", 6, 4, b""),
    ):  # fmt: skip
        path = folder / f"deep_{name}.png"
        path.write_bytes(png(50, 60, 16, kind, png_rows(values[..., :bands]), before))
        yield path
    alpha = {338: (3, (2,))}
    floats = np.random.default_rng(0).normal(size=(60, 50, 1)).astype(np.float32)
    for name, page in {
        "grey": strips(values[..., :1], 8), "rgb": strips(values[..., :3], 8), "rgba": tiles(values, 16, tags=alpha),
        "int": strips(values[..., :1].astype(np.int32), 8, tags={339: (3, (2,))}),
        "float": tiles(floats, 16, tags={339: (3, (3,))}),
    }.items():  # fmt: skip
        path = folder / f"deep_{name}.tif"
        path.write_bytes(tiff(page))
        yield path


def tiff_kinds(folder: Path) -> Iterator[Path]:
    """TIFFs as other programs write them."""
    rgba = np.asarray(noise(100).convert("RGBA")).copy()
    rgba[..., 3] = np.asarray(noise(100, seed=1).getchannel(0))
    rgb, grey = rgba[..., :3], rgba[..., :1]
    colours = tuple(np.random.default_rng(2).integers(0, 65536, 768).tolist())
    planes = strips(rgb, 100, tags={284: (3, (2,))})
    planes.chunks = [zlib.compress(rgb[..., band].tobytes()) for band in range(3)]
    nibbles = Directory(100, 100, [grey[:, :50].tobytes()], 1, tags={258: (3, (4,))})
    pages = {
        "strips": strips(rgb, 7), "one_strip": strips(rgb, 100), "tiles": tiles(rgb, 32), "planes": planes,
        "white_is_0": strips(grey, 7, tags={262: (3, (0,))}), "nibbles": nibbles,
        "palette": strips(grey, 7, tags={262: (3, (3,)), 320: (3, colours)}),
        **{f"extra{kind}": strips(rgba, 7, tags={338: (3, (kind,))}) for kind in (0, 1, 2)}, "no_extra": strips(rgba, 7),
    }  # fmt: skip
    for name, page in pages.items():
        for big, order in ((False, "<"), (False, ">"), (True, "<")):  # Pillow reads no BigTIFF of the other order
            path = folder / f"{name}_{big:d}{order == '>':d}.tif"
            path.write_bytes(tiff(page, big=big, order=order))
            yield path
    for codec in ("jpeg", "packbits", "group3", "group4"):
        path = folder / f"{codec}.tif"
        noise(100).convert("1" if codec[0] == "g" else "RGB").save(path, compression=codec)
        yield path


KINDS: dict[str, Callable[[Path], Iterator[Path]]] = {
    "good": lambda folder: iter(good_pictures(folder)), "grey": lambda folder: iter(grey_pictures(folder)),
    "modes": modes, "deep": deep, "tiff": tiff_kinds,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_give_the_ordinary_pixels(kind: str, tmp_path: Path, pieces: None) -> None:
    for path in KINDS[kind](tmp_path):
        expected = whole(path)
        height, width = expected.shape[:2]
        shown = by_strips(path)
        tolerance = JPEG_LEVELS if path.suffix == ".jpg" or path.stem == "jpeg" else int("extra1" in path.stem)
        assert differ(shown, expected) <= tolerance, path.name
        (tile,) = some_tiles(path, [(20, 15, 44, 39)], 24)
        assert differ(tile, expected[15:39, 20:44]) <= tolerance, path.name
        with open_huge(path) as picture:
            assert picture.size == (width, height) == read_size(path)
        with path.open("rb") as file:
            by_vips = file.read(4).startswith((b"\xff\xd8", b"\x89PNG", b"II*", b"MM\0*", b"II+", b"MM\0+"))
        assert is_in_pieces(path) == by_vips, path.name


@pytest.mark.parametrize("kind", KINDS)
def test_without_pyvips_the_pixels_are_the_same(kind: str, tmp_path: Path, pieces: None, no_vips: None) -> None:
    for path in KINDS[kind](tmp_path):
        assert differ(by_strips(path), whole(path)) == 0, path.name


def test_libvips_must_see_what_the_header_says(tmp_path: Path, pieces: None) -> None:
    path = tmp_path / "a.png"
    noise(64).save(path)
    lies: tuple[dict[str, Any], ...] = ({"width": 65}, {"height": 63}, {"mode": "L"}, {"mode": "I;16"})
    for lie in lies:
        with (
            HugePicture(replace(read_header(path), **lie)) as picture,
            pytest.raises(BadImage, match="its header says"),
        ):
            next(picture.strips(10))


def test_other_kinds_of_tiff_are_decoded_whole(tmp_path: Path, pieces: None) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (60, 50, 1), np.uint16)
    path = tmp_path / "a.tif"
    for page in (
        strips(values, 60, tags={262: (3, (0,))}),  # libvips takes white for 0 here, Pillow does not
        strips(values, 60, tags={274: (3, (99,))}),
        strips(values, 60, tags={296: (3, (77,))}),
        strips(values.astype(np.uint32), 60),
        strips(values.astype(np.int16), 60, tags={339: (3, (2,))}),
    ):
        path.write_bytes(tiff(page))
        assert not is_in_pieces(path)
        assert differ(by_strips(path), whole(path)) == 0


@pytest.mark.parametrize("name", ["a.png", "a.tif", "tiles.tif", "a.bmp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiles_are_cut_from_the_upright_picture(name: str, orientation: int, tmp_path: Path, pieces: None) -> None:
    upright = photo(130, 90)
    stored = Image.fromarray(upright)
    stored = stored if orientation == 1 else stored.transpose(STORED_AS[orientation])
    path = tmp_path / name
    if name == "tiles.tif":
        path.write_bytes(tiff(tiles(np.asarray(stored), 16, tags={274: (3, (orientation,))})))
    elif name == "a.bmp":  # has no orientation
        Image.fromarray(upright).save(path)
    else:
        kept = {"tiffinfo": {274: orientation}} if name == "a.tif" else {"exif": exif(orientation)}
        stored.save(path, **kept)
    boxes = [
        (70, 60, 90, 80),
        (0, 0, 20, 20),
        (-5, -7, 15, 13),
        (120, 80, 140, 100),
        (500, 0, 520, 20),
        (30, 5, 50, 25),
    ]
    padded = np.full((300, 800, 3), FILL, np.uint8)
    padded[:, :600] = np.pad(upright, ((100, 110), (100, 370), (0, 0)), "edge")
    expected = [padded[top + 100 : bottom + 100, left + 100 : right + 100] for left, top, right, bottom in boxes]
    for tile, part in zip(some_tiles(path, boxes, 20), expected, strict=True):
        assert differ(tile, part) == 0
    alone = [some_tiles(path, [box], 20)[0] for box in boxes]
    assert np.array_equal(alone, expected)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "tiles.tif"])
def test_larger_boxes_are_shrunk_without_aliasing(name: str, tmp_path: Path, pieces: None) -> None:
    path = tmp_path / name
    pixels = photo(700, 500)
    if name == "tiles.tif":
        path.write_bytes(tiff(tiles(pixels, 64)))
    else:
        Image.fromarray(pixels).save(path, quality=95)
    shown = Image.fromarray(whole(path))
    boxes = [(0, 0, 500, 500), (3, 5, 147, 149), (101, 33, 501, 433), (300, 200, 316, 216), (13, 13, 290, 201)]
    for px in (16, 40, 250):
        for box, tile in zip(boxes, some_tiles(path, boxes, px), strict=True):
            exact = shown.resize((px, px), Image.Resampling.BILINEAR, box)
            assert np.abs(tile.astype(int) - np.asarray(exact)).mean() < 1.5, (px, box)
    checks = np.zeros((512, 512, 3), np.uint8)
    checks[::2, ::2] = checks[1::2, 1::2] = 255
    path.write_bytes(tiff(tiles(checks, 64))) if name == "tiles.tif" else Image.fromarray(checks).save(path, quality=95)
    for px in (8, 64, 200):
        (tile,) = some_tiles(path, [(0, 0, 512, 512)], px)
        assert differ(tile, np.full_like(tile, 128)) <= 8, px


def test_a_box_needs_pixels(tmp_path: Path) -> None:
    noise(9).save(tmp_path / "a.png")
    for box, px in (((3, 3, 3, 5), 4), ((3, 3, 5, 2), 4), ((0, 0, 4, 4), 0)):
        with pytest.raises(ValueError, match="no pixels in box"):
            some_tiles(tmp_path / "a.png", [box], px)
    assert some_tiles(tmp_path / "a.png", [], 4) == []


@pytest.mark.parametrize("shrink", [1, 2, 3, 8, 200])
def test_shrunk_strips_are_means(shrink: int, tmp_path: Path, pieces: None) -> None:
    upright = Image.fromarray(photo(131, 90))
    for orientation in (1, 6):
        path = tmp_path / f"{orientation}.png"
        stored = upright.transpose(STORED_AS[6]) if orientation == 6 else upright
        stored.save(path, exif=exif(orientation))
        means = stored.reduce(shrink)  # the grid begins where the file begins
        means = means.transpose(Image.Transpose.ROTATE_270) if orientation == 6 else means
        assert differ(by_strips(path, 7, shrink), np.asarray(means)) == 0


def test_a_jpeg_is_shrunk_while_it_is_decoded(tmp_path: Path, pieces: None) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(photo(403, 301)).save(path, quality=95, subsampling=0)
    for shrink in (2, 4, 6, 8, 16):
        shown, means = by_strips(path, 10, shrink), np.asarray(Image.fromarray(whole(path)).reduce(shrink))
        assert np.abs(shown.astype(int) - means).mean() < 2, shrink
        assert shown.shape == means.shape


def test_turned_pictures_may_need_a_file(tmp_path: Path, pieces: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turning, "_IN_MEMORY", 100)
    path = tmp_path / "a.png"
    upright = photo(130, 90)
    for orientation in range(2, 9):
        Image.fromarray(upright).transpose(STORED_AS[orientation]).save(path, exif=exif(orientation))
        assert differ(by_strips(path), upright) == 0

    class Full(tempfile.SpooledTemporaryFile):  # type: ignore[type-arg]
        def write(self, data: bytes) -> int:
            raise OSError(28, os.strerror(28))

    monkeypatch.setattr(tempfile, "SpooledTemporaryFile", Full)
    with pytest.raises(WriteFailed, match="No space left") as caught:
        by_strips(path)
    assert f"{3 * 130 * 90:,} bytes" in caught.value.hint and "TMPDIR" in caught.value.hint


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.bmp", "turned.png"])
def test_a_glance_is_as_small_as_allowed(name: str, tmp_path: Path, pieces: None) -> None:
    path = tmp_path / name
    turned = {"exif": exif(6)} if name == "turned.png" else {}
    Image.fromarray(photo(300, 200)).save(path, quality=95, subsampling=0, **turned)
    stored = Image.fromarray(whole(path))
    stored = stored.transpose(STORED_AS[6]) if turned else stored
    with open_huge(path) as picture:
        for side in (1, 30, 70, 149, 151, 299, 300, 1000):
            image = picture.glance(side)
            shrink = min(300 // min(side, 300), 64)
            means = stored.reduce(shrink)
            means = means.transpose(Image.Transpose.ROTATE_270) if turned else means
            if name == "a.jpg":  # its cosine transform knows no other factors
                assert min(side, 300) <= max(image.size) < 2 * side
            else:
                assert differ(np.asarray(image), np.asarray(means)) == 0
            loaded = load_picture(path, side)
            assert loaded.image.tobytes() == image.tobytes()
            assert (loaded.width, loaded.height) == picture.size


def test_glances_do_not_depend_on_pyvips(tmp_path: Path, pieces: None, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"a.png": {}, "a.tif": {}, "a.jpg": {"quality": 90}, "b.png": {"exif": exif(8)}}
    glances = []
    for name, options in files.items():
        Image.fromarray(photo(300, 200)).save(tmp_path / name, **options)
        glances.append(load_picture(tmp_path / name, 40).image.tobytes())
    monkeypatch.setattr(vips, "_pyvips", lambda: None)
    assert [load_picture(tmp_path / name, 40).image.tobytes() for name in files] == glances


def test_a_small_picture_is_the_ordinary_one(tmp_path: Path) -> None:
    for name in ("a.jpg", "a.png"):
        Image.fromarray(photo(300, 200)).save(tmp_path / name, quality=90)
        with open_huge(tmp_path / name) as picture:
            assert picture.glance(40).tobytes() == load_picture(tmp_path / name, 40).image.tobytes()
        assert differ(by_strips(tmp_path / name), whole(tmp_path / name)) == 0


def test_a_pyramid_is_used_where_its_sizes_fit(tmp_path: Path, pieces: None) -> None:
    """The levels are red, so that it shows which one was read."""
    picture, path = photo(257, 130), tmp_path / "a.tif"
    mark = {254: (4, (1,))}

    def red(
        width: int, height: int, tags: dict[int, tuple[int, tuple[int, ...]]] = mark, **changes: object
    ) -> Directory:
        return tiles(np.full((height, width, 3), (255, 0, 0), np.uint8), 16, tags=tags, **changes)

    grey = tiles(np.full((65, 128, 1), 80, np.uint8), 16, tags=mark)
    used = {
        "pages": tiff(tiles(picture, 16), red(128, 65), red(64, 32)),
        "sub": tiff(tiles(picture, 16, levels=[red(128, 65), red(65, 33)]), big=True),
        "behind": tiff(tiles(picture, 16), red(100, 65), red(128, 65)),
    }
    ignored = {
        "unmarked": tiff(tiles(picture, 16), red(128, 65, {})),
        "other_shape": tiff(tiles(picture, 16), red(128, 60)),
        "larger": tiff(tiles(picture, 16), red(514, 260)),
        "no_factor": tiff(tiles(picture, 16), red(100, 51)),
        "other_kind": tiff(tiles(picture, 16), grey),
        "absurd_tiles": tiff(tiles(picture, 16), red(128, 65, {**mark, 322: (4, (1 << 30,))})),
        "no_tiles": tiff(tiles(picture, 16), red(128, 65, {**mark, 322: (4, (0,))})),
    }
    for name, data in (used | ignored).items():
        path.write_bytes(data)
        with open_huge(path) as file:
            glance = np.asarray(file.glance(60))
        assert (glance == (255, 0, 0)).all() == (name in used), name
        assert differ(by_strips(path), picture) == 0  # full resolution never comes from a level


def test_directories_in_a_circle_end(tmp_path: Path, pieces: None) -> None:
    path = tmp_path / "a.tif"
    picture = photo(100, 80)
    pages = [tiles(picture, 16), *(tiles(picture[:9, :9], 16) for _ in range(3))]
    for big in (False, True):
        for then in range(4):
            path.write_bytes(tiff(*pages, big=big, then=then))
            assert differ(by_strips(path), picture) == 0
            assert differ(whole(path), picture) == 0


def broken(folder: Path) -> dict[Path, str]:
    """Files whose header can be read but whose pixels cannot all; with the code."""
    picture = photo(400, 300)
    encodings = {
        "half.jpg": encoded(Image.fromarray(picture), "JPEG", quality=95),
        "half.png": encoded(Image.fromarray(picture), "PNG"),
    }
    files = {name: (data[: len(data) // 2], "corrupt") for name, data in encodings.items()}
    files["progressive_half.jpg"] = encoded(Image.fromarray(picture), "JPEG", progressive=True)[:9000], "corrupt"
    for name, page in (("strip.tif", strips(picture, 10)), ("tile.tif", tiles(picture, 64))):
        page.chunks[7] = page.chunks[7][: len(page.chunks[7]) // 2]  # the file goes on behind it
        files[name] = tiff(page), "corrupt"
        places = {273 if page.rows else 324: (4, (1 << 30,) * len(page.chunks))}
        lost = tiff(Directory(400, 300, page.chunks, 3, page.tile, page.rows, 8, places))
        files["lost_" + name] = lost, "corrupt"
    files["wide_tile.tif"] = tiff(tiles(picture, 64, tags={322: (4, (1 << 31,)), 323: (4, (1 << 31,))})), "corrupt"
    files["no_tile.tif"] = tiff(tiles(picture, 64, tags={322: (4, (0,))})), "corrupt"
    files["odd_tile.tif"] = tiff(tiles(picture, 64, tags={322: (4, (63,))})), "corrupt"
    files["more.tif"] = tiff(strips(picture, 10, tags={257: (4, (30_000,))})), "corrupt"
    files["lie.png"] = png(400, 30_000, 8, 2, png_rows(picture)), "corrupt"
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    return {folder / name: code for name, (_, code) in files.items()}


def outcomes(path: Path) -> set[str]:
    """What reading the whole picture in every way ends with: codes, or "pixels"."""
    ways: tuple[Callable[[], object], ...] = (
        lambda: by_strips(path),
        lambda: by_strips(path, 7, 2),
        lambda: some_tiles(path, [(0, 0, *read_size(path))], 20),
        lambda: load_picture(path, 30),
    )
    found = set()
    for way in ways:
        try:
            way()
        except BadImage as error:
            found.add(error.code if error.detail and error.detail.isprintable() else f"no detail: {error.detail!r}")
        else:
            found.add("pixels")
    return found


def test_broken_files_are_refused_in_every_way(tmp_path: Path, pieces: None, capfd: pytest.CaptureFixture[str]) -> None:
    expected = broken(tmp_path) | bad_files(tmp_path) | non_files(tmp_path)
    # These are refused for their pixels by a reader of all, and are no huge pictures as such.
    expected |= {tmp_path / "claims_1.5g.png": "corrupt"}
    assert {path.name: outcomes(path) for path in expected} == {path.name: {code} for path, code in expected.items()}
    os.write(2, b"back")
    assert capfd.readouterr().err == "back"


def test_damaged_restart_markers_are_read_like_everywhere(tmp_path: Path, pieces: None) -> None:
    """Decoders go on behind them; whatever the ordinary reader makes of it, pieces make the same."""
    data = encoded(Image.fromarray(photo(400, 300)), "JPEG", quality=90, restart_marker_rows=1)
    places = [place for place in range(len(data) - 1) if data[place] == 0xFF and 0xD0 <= data[place + 1] <= 0xD7]
    assert len(places) > 10
    path = tmp_path / "a.jpg"
    chance = random.Random(0)
    for kind in ("wrong number", "gone", "twice", "noise before"):
        damaged = bytearray(data)
        for place in sorted(chance.sample(places, 4), reverse=True):
            match kind:
                case "wrong number":
                    damaged[place + 1] = 0xD0 + (damaged[place + 1] + 3) % 8
                case "gone":
                    del damaged[place : place + 2]
                case "twice":
                    damaged[place:place] = damaged[place : place + 2]
                case "noise before":
                    damaged[place - 40 : place] = chance.randbytes(40).replace(b"\xff", b"\0")
        path.write_bytes(damaged)
        assert differ(by_strips(path), whole(path)) <= JPEG_LEVELS, kind


def test_thin_pictures(tmp_path: Path, pieces: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for size in ((1, 5000), (5000, 1)):
        for name in ("a.png", "a.jpg", "a.tif"):
            path = tmp_path / name
            Image.fromarray(photo(*size)).save(path)
            expected = whole(path)
            assert differ(by_strips(path, 999), expected) <= JPEG_LEVELS
            assert by_strips(path, 9, 70).shape[:2] == tuple(-(-length // 70) for length in size[::-1])
            with open_huge(path) as picture:
                assert max(picture.glance(100).size) >= 100
                (tile,) = picture.tiles([(0, 0, *size)], 8)
            assert tile.shape == (8, 8, 3)


def test_a_file_that_changes_is_noticed(tmp_path: Path, pieces: None) -> None:
    path = tmp_path / "a.png"
    noise(64).save(path)
    with open_huge(path) as picture:
        noise(65).save(path)
        with pytest.raises(BadImage, match="changed"):
            next(picture.strips(10))


def test_without_pyvips_large_pictures_are_refused_with_the_cure(
    tmp_path: Path, pieces: None, no_vips: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huge, "WHOLE_PIXELS", 60 * 60)
    monkeypatch.setattr(huge, "FULL_DECODE_PIXELS", 80 * 80)
    for side, strips_too, glance_too in ((60, True, True), (70, False, True), (90, False, False)):
        for name in ("a.png", "a.tif"):
            noise(side).save(tmp_path / name)
            with open_huge(tmp_path / name) as picture:
                for allowed, way in (
                    (glance_too, lambda p=picture: p.glance(8)),
                    (strips_too, lambda p=picture: p.tiles([(0, 0, 9, 9)], 9)),
                ):
                    if allowed:
                        way()
                        picture.__exit__(None, None, None)
                        continue
                    with pytest.raises(BadImage, match=r"pip install 'mvcr\[large\]'") as caught:
                        way()
                    assert caught.value.code == "too_many_pixels"
    noise(90).save(tmp_path / "a.jpg")
    with open_huge(tmp_path / "a.jpg") as picture:
        assert picture.glance(8).size == (12, 12)
    noise(90).save(tmp_path / "a.bmp")
    with open_huge(tmp_path / "a.bmp") as picture, pytest.raises(BadImage, match="limit") as caught:
        picture.glance(8)
    assert "pip" not in caught.value.detail  # it would not help


def test_decoders_that_keep_everything_are_bounded(
    tmp_path: Path, pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vips, "FULL_DECODE_PIXELS", 100)
    noise(64).save(tmp_path / "a.jpg", progressive=True)
    interlaced = bytearray(encoded(noise(64), "PNG"))
    interlaced[28] = 1
    interlaced[29:33] = struct.pack(">I", zlib.crc32(interlaced[12:29]))
    (tmp_path / "a.png").write_bytes(interlaced)
    for name, kind in (("a.jpg", "progressive JPEG"), ("a.png", "interlaced PNG")):
        with open_huge(tmp_path / name) as picture, pytest.raises(BadImage, match=kind):
            next(picture.strips(10))
    noise(64).save(tmp_path / "b.jpg")
    assert differ(by_strips(tmp_path / "b.jpg"), whole(tmp_path / "b.jpg")) <= JPEG_LEVELS


def test_files_of_many_gigabytes(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    width, height = 40_000, 30_000
    rows = [b""] * height
    data = tiff(Directory(width, height, rows, 3, rows=1), big=True)
    with path.open("wb") as file:  # 3.6 GB of black, of which nothing is on the disk
        file.write(data)
        file.truncate(len(data) + 3 * width * height)
    start = len(data)
    offsets = np.arange(height, dtype="<u8") * (3 * width) + start
    page = Directory(
        width, height, [], 3, rows=1, tags={273: (16, tuple(offsets.tolist())), 279: (4, (3 * width,) * height)}
    )
    again = tiff(page, big=True)
    assert len(again) <= len(data)
    with path.open("r+b") as file:
        file.write(again)
    assert read_size(path) == (width, height)
    (tile,) = some_tiles(path, [(39_990, 0, 40_010, 20)], 20)
    assert (tile == 0).all()  # half of it beyond the edge, which is repeated
    with pytest.raises(BadImage) as caught:
        load_rgb(path)
    assert caught.value.code == "too_many_pixels"
    with (tmp_path / "a.webp").open("wb") as file:
        file.write(encoded(noise(9), "WEBP"))
        file.truncate(3 << 30)
    with pytest.raises(BadImage) as caught:
        read_size(tmp_path / "a.webp")
    assert caught.value.code == "too_large"


def test_mutants_are_read_like_everywhere_or_refused(tmp_path: Path, pieces: None) -> None:
    picture = photo(120, 90)
    seeds = [
        encoded(Image.fromarray(picture), "JPEG", quality=90),
        encoded(Image.fromarray(picture), "PNG"),
        tiff(strips(picture, 16)),
        tiff(tiles(picture, 32), tiles(picture[::2, ::2], 32, tags={254: (4, (1,))}), big=True),
    ]
    path = tmp_path / "mutant"
    found = []
    for data in mutants(seeds, 300, seed=2):
        path.write_bytes(data)
        try:
            shown: Pixels | None = by_strips(path)
        except BadImage:
            shown = None
        try:
            expected: Pixels | None = whole(path)
        except BadImage:
            expected = None
        if shown is not None and expected is not None:
            found.append(differ(shown, expected) <= JPEG_LEVELS)
        outcomes(path)
    assert sum(found) > 20 and all(found)


def test_small_pictures_never_load_pyvips(tmp_path: Path) -> None:
    noise(64).save(tmp_path / "a.png")
    code = """
import sys
from mvcr_cli.data.huge import open_huge
with open_huge(sys.argv[1]) as picture:
    picture.glance(8), list(picture.strips(9)), picture.tiles([(0, 0, 9, 9)], 9)
sys.exit("pyvips" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.png")], check=True)


def test_errors_of_the_machine_are_not_those_of_the_file(
    tmp_path: Path, pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise(64).save(tmp_path / "a.png")

    class Exhausted:
        def __getattr__(self, name: str) -> object:
            raise MemoryError

    monkeypatch.setattr(vips, "_pyvips", Exhausted)
    with pytest.raises(MvcrError) as caught:
        by_strips(tmp_path / "a.png")
    assert isinstance(caught.value, BadImage) and caught.value.code == "out_of_memory"
