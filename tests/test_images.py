from __future__ import annotations

import errno
import io
import os
import re
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from nasty import (
    HEIGHT,
    WIDTH,
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
    reference,
    reference_grey,
)
from PIL import Image, ImageFile, TiffImagePlugin

import mvcr_cli
from mvcr_cli.data import images
from mvcr_cli.data.images import IMAGE_SUFFIXES, Picture, load_picture, load_rgb, read_size
from mvcr_cli.errors import BadImage, WorkerFailed


def pixels(path: Path) -> np.ndarray:
    return np.asarray(load_rgb(path)).astype(int)


def code_of(path: str | Path) -> str:
    with pytest.raises(BadImage) as caught:
        load_picture(path)
    return caught.value.code


def size_or_code(path: Path) -> tuple[int, int] | str:
    try:
        return read_size(path)
    except BadImage as error:
        return error.code


def test_every_format_and_orientation_shows_the_reference(tmp_path: Path) -> None:
    for path, tolerance in good_pictures(tmp_path).items():
        shown = pixels(path)
        assert shown.shape == reference().shape, path.name
        centres = np.ix_([12, 36], [16, 48])
        assert np.abs(shown - reference())[centres].max() <= tolerance, path.name


def test_every_depth_of_grey_shows_the_reference(tmp_path: Path) -> None:
    for path in grey_pictures(tmp_path):
        assert np.abs(pixels(path) - reference_grey()[..., None]).max() <= 1, path.name


def test_pictures_are_rgb_and_sizes_agree_with_the_header(tmp_path: Path) -> None:
    for path in [*good_pictures(tmp_path), *grey_pictures(tmp_path)]:
        picture = load_picture(path)
        assert picture.image.mode == "RGB"
        assert (picture.width, picture.height) == picture.image.size == read_size(path), path.name


def test_bad_files_are_refused_fast_with_their_code(tmp_path: Path) -> None:
    expected = bad_files(tmp_path) | non_files(tmp_path)
    before = {path: path.read_bytes() for path in expected if path.is_file()}
    started = time.monotonic()
    assert {path.name: code_of(path) for path in expected} == {path.name: code for path, code in expected.items()}
    assert time.monotonic() - started < 5
    assert before == {path: path.read_bytes() for path in before}


def test_the_size_of_a_bad_file_is_refused_with_the_same_code_or_positive(tmp_path: Path) -> None:
    expected = bad_files(tmp_path) | non_files(tmp_path)
    expected[tmp_path / "claims_1.5g.png"] = "corrupt"  # small enough to be read reduced, if it were true
    for path, code in expected.items():
        outcome = size_or_code(path)
        assert outcome == code or min(outcome) > 0, path.name


def test_heic_is_told_to_be_converted(tmp_path: Path) -> None:
    bad_files(tmp_path)
    with pytest.raises(BadImage, match="convert it to JPEG or PNG"):
        load_picture(tmp_path / "photo.heic")


def test_details_are_one_printable_line(tmp_path: Path) -> None:
    for path in bad_files(tmp_path):
        with pytest.raises(BadImage) as caught:
            load_picture(path)
        assert caught.value.detail.isprintable(), path.name
        assert caught.value.detail


def test_names_that_no_file_can_have_are_missing() -> None:
    assert code_of("a\0b.png") == "missing"
    assert code_of("\ud800.png") == "missing"
    assert code_of("n" * 5000) == "not_a_file"


@pytest.mark.parametrize(
    ("number", "error", "code"),
    [
        (errno.EACCES, BadImage, "permission"),
        (errno.ENOMEM, BadImage, "out_of_memory"),
        (errno.EMFILE, WorkerFailed, None),
    ],
)
def test_what_a_failed_open_means(
    number: int, error: type[Exception], code: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(error) as caught:
        load_picture("x.png")
    assert getattr(caught.value, "code", None) == code


@pytest.mark.parametrize("error", [MemoryError(), OSError("out of memory when reading image file")], ids=repr)
def test_running_out_of_memory_is_a_bad_image(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    noise(9).save(path)

    def exhaust(_: object) -> None:
        raise error

    monkeypatch.setattr(images, "to_rgb", exhaust)
    assert code_of(path) == "out_of_memory"


def test_what_fails_while_memory_is_short_is_not_blamed_on_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """zlib and libjpeg say of a lack of memory what they say of damage."""
    path = tmp_path / "a.png"
    noise(9).save(path)
    path.write_bytes(path.read_bytes()[:-40])
    assert code_of(path) == "corrupt"

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr("mmap.mmap", refuse)
    assert code_of(path) == "out_of_memory"


def test_a_file_without_memory_for_a_buffer_is_closed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second close would hit whatever another thread has opened under that number."""
    path = tmp_path / "a.png"
    noise(9).save(path)
    taken: list[int] = []

    def exhaust(raw: io.FileIO) -> None:
        taken.append(raw.fileno())
        raw.close()
        taken.append(os.open(path, os.O_RDONLY))  # the number is free, and goes to somebody else
        raise MemoryError

    monkeypatch.setattr(images, "BufferedReader", exhaust)
    with pytest.raises(MemoryError):
        images.open_regular(path)
    assert taken[0] == taken[1]
    os.close(taken[1])  # it is still open


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    for alpha, expected in ((0, 255), (255, 10), (128, 132)):
        Image.new("RGBA", (4, 4), (10, 10, 10, alpha)).save(path)
        assert np.abs(pixels(path) - expected).max() <= 1


@pytest.mark.parametrize("depth", [8, 16])
def test_a_transparent_colour_becomes_white(depth: int, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    values = np.array([[[9, 9, 9], [200, 0, 0]]], np.uint16) * (257 if depth == 16 else 1)
    rows = png_rows(values if depth == 16 else values.astype(np.uint8))
    path.write_bytes(png(2, 1, depth, 2, rows, png_chunk(b"tRNS", png_rows(values[0, :1])[1:])))
    assert pixels(path).tolist() == [[[255, 255, 255], [200, 0, 0]]]


def test_sixteen_bit_grey_is_divided_by_257(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    values = np.arange(0, 65536, dtype=np.uint16).reshape(256, 256)
    path.write_bytes(png(256, 256, 16, 0, png_rows(values)))
    assert np.array_equal(pixels(path)[..., 0], np.floor(values / 257 + 0.5))


def test_float_grey_beyond_any_range_keeps_its_order(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    values = np.array([[-3e38, -1, 0, 1e30, 3e38]], np.float32)
    Image.fromarray(values).save(path)
    assert pixels(path)[0, :, 0].tolist() == [0, 128, 128, 128, 255]
    Image.fromarray(np.full((1, 3), 1234.5, np.float32)).save(path)
    assert pixels(path).max() == 0


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("size", [(1000, 700), (700, 1000), (999, 64), (1, 800)])
def test_a_reduced_jpeg_is_as_small_as_allowed(size: tuple[int, int], orientation: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.new("RGB", size).save(path, exif=exif(orientation))
    upright = size[::-1] if orientation == 6 else size
    for side in (1, 90, 125, 126, 250, 400, 999, 1000, 4000):
        picture = load_picture(path, at_least=side)
        assert (picture.width, picture.height) == upright
        long, longest = max(picture.image.size), max(size)
        assert min(side, longest) <= long <= longest
        scale = round(longest / long)
        assert scale in (1, 2, 4, 8)
        assert picture.image.size == tuple(-(-length // scale) for length in upright)
        assert scale == 8 or longest // (2 * scale) < side or min(size) < 2 * scale  # one step more would be too small


def test_only_jpeg_is_reduced(tmp_path: Path) -> None:
    noise(64).save(tmp_path / "a.png")
    assert load_picture(tmp_path / "a.png", at_least=1).image.size == (64, 64)


def test_the_header_is_enough_for_the_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[Image.Image] = []
    turned = exif(6)
    files = {
        "a.jpg": encoded(Image.new("RGB", (512, 300)), "JPEG", exif=turned),
        "b.png": encoded(noise(512).crop((0, 0, 512, 300)), "PNG", exif=turned),
        "c.png": encoded(Image.new("RGB", (300, 512)), "PNG"),
        "d.tif": encoded(Image.new("RGB", (512, 300)), "TIFF", tiffinfo={0x0112: 6}, compression="tiff_lzw"),
    }
    for plugin in (ImageFile.ImageFile, TiffImagePlugin.TiffImageFile):
        monkeypatch.setattr(plugin, "load", lambda image: decoded.append(image))
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        assert read_size(tmp_path / name) == (300, 512), name
    assert not decoded


def test_the_size_of_a_picture_that_ends_early(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(noise(512), "JPEG")[:3000])
    assert read_size(path) == (512, 512)
    assert code_of(path) == "corrupt"


@pytest.mark.parametrize("name", ["claims_400m.png", "claims_400m.tif"])
def test_headers_that_promise_too_much_are_refused_before_decoding(name: str, tmp_path: Path) -> None:
    bad_files(tmp_path)
    with pytest.raises(BadImage, match="claims 20000x20000 pixels"):
        read_size(tmp_path / name)


def test_full_decodes_are_bounded_but_reduced_ones_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "FULL_DECODE_PIXELS", 128 * 128)
    for progressive, reduced_code in ((False, None), (True, "too_many_pixels")):
        path = tmp_path / "a.jpg"
        noise(512).save(path, progressive=progressive)
        assert code_of(path) == "too_many_pixels"
        if reduced_code is None:
            assert load_picture(path, at_least=100).image.size == (128, 128)
        else:
            with pytest.raises(BadImage, match=reduced_code):
                load_picture(path, at_least=100)


def test_a_black_picture_in_few_bytes_is_no_lie(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    for mode in ("1", "L", "P", "RGB", "RGBA", "I;16"):
        Image.new(mode, (2000, 2000)).save(path)
        assert load_picture(path).width == 2000


def test_warnings_as_errors_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(reference()).save(path, tiffinfo={270: "x" * 40})
    data = path.read_bytes()
    entry = data.index(b"\x0e\x01\x02\x00")  # the description, made longer than the file
    path.write_bytes(data[: entry + 4] + b"\xff\xff\xff\x00" + data[entry + 8 :])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="larger than file"), Image.open(path):
            pass
        assert np.array_equal(pixels(path), reference())
        warnings.simplefilter("error")
        assert np.array_equal(pixels(path), reference())


def test_libtiff_stays_off_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bad_files(tmp_path)
    for name in ("half.tif", "bad_deflate.tif"):
        assert code_of(tmp_path / name) == "corrupt"
    os.write(2, b"back")
    assert capfd.readouterr().err == "back"


def test_threads_decode_the_same_and_give_stderr_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    paths = [*good_pictures(tmp_path), *bad_files(tmp_path)] * 4
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None

    def outcome(path: Path) -> tuple[str, bytes]:
        try:
            return "pixels", load_rgb(path).tobytes()
        except BadImage as error:
            return error.code, b""

    alone = list(map(outcome, paths))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(outcome, paths)) == alone
    os.write(2, b"back")
    assert capfd.readouterr().err == "back"
    if descriptors is not None:
        assert len(os.listdir("/proc/self/fd")) == descriptors


def test_mutants_decode_or_are_refused(tmp_path: Path) -> None:
    seeds = [path.read_bytes() for path in [*good_pictures(tmp_path), *grey_pictures(tmp_path)]]
    path = tmp_path / "mutant"
    outcomes = set()
    for data in mutants(seeds, 400, seed=1):
        path.write_bytes(data)
        try:
            picture: Picture | None = load_picture(path)
        except BadImage as error:
            picture = None
            outcomes.add(error.code)
        if picture is not None:
            outcomes.add("pixels")
            assert picture.image.mode == "RGB"
            assert read_size(path) == (picture.width, picture.height) == picture.image.size
    assert {"pixels", "corrupt"} <= outcomes


def test_only_one_module_opens_pictures() -> None:
    package = Path(mvcr_cli.__file__).parent
    opens = [
        path.name
        for path in package.rglob("*.py")
        if re.search(r"Image\.open\(|torchvision\.io|imread", path.read_text())
    ]
    assert opens == ["images.py"]


def test_suffixes_are_lower_case_with_a_dot() -> None:
    assert all(suffix.startswith(".") and suffix == suffix.lower() for suffix in IMAGE_SUFFIXES)
    assert not {".heic", ".svg", ".pdf", ".eps", ".txt"} & IMAGE_SUFFIXES


def test_the_reference_is_not_symmetric() -> None:
    turned = {
        reference().tobytes(),
        *(np.asarray(Image.fromarray(reference()).transpose(t)).tobytes() for t in range(7)),
    }
    assert len(turned) == 8
    assert reference().shape == (HEIGHT, WIDTH, 3)
