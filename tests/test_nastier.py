"""Pictures that break decoders: what each must become, in bounded time and memory, for every reader of the program."""

from __future__ import annotations

import contextlib
import os
import re
import struct
import threading
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import nastier
import numpy as np
import pytest
from decoding import Outcome, decode, tally
from nasty import (
    bad_files,
    good_pictures,
    grey_pictures,
    mutants,
    non_files,
    png_chunk,
    png_rows,
    reference,
    reference_grey,
)
from small_run import shapes

import mvcr_cli
from mvcr_cli.config import AugmentConfig
from mvcr_cli.data import structure
from mvcr_cli.data.duplicates import read_fingerprints
from mvcr_cli.data.folder import Sample
from mvcr_cli.data.images import FORMATS, PNG_SIGNATURE, load_picture, read_size
from mvcr_cli.data.loader import PixelCache, Step, TrainingReader, evaluation_batches
from mvcr_cli.data.preprocess import Preprocess
from mvcr_cli.errors import BadImage
from mvcr_cli.records import Problem

BOMB_MEGABYTES = 200
REFUSALS = {"missing", "permission", "not_a_file", "empty", "too_large", "too_many_pixels", "unknown_format", "corrupt",
            "nonfinite", "out_of_memory"}  # fmt: skip


def seeds_in(folder: Path) -> list[Path]:
    """One small file of every format and kind."""
    right = {name: data for name, (data, _) in nastier.right_pictures().items() if len(data) < 200_000}
    others = nastier.write_all(folder, right | nastier.right_grey_pictures())
    return [*good_pictures(folder), *grey_pictures(folder), *others.values()]


@pytest.mark.parametrize("name", nastier.right_pictures())
def test_unusual_but_legal_files_show_the_reference(name: str, tmp_path: Path) -> None:
    data, tolerance = nastier.right_pictures()[name]
    (tmp_path / name).write_bytes(data)
    picture = load_picture(tmp_path / name)
    shown = np.asarray(picture.image).astype(int)
    assert shown.shape == reference().shape
    assert np.abs(shown - reference())[np.ix_([12, 36], [16, 48])].max() <= tolerance
    assert (picture.width, picture.height) == read_size(tmp_path / name)


@pytest.mark.parametrize("name", nastier.right_grey_pictures())
def test_unusual_grey_files_show_the_reference(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(nastier.right_grey_pictures()[name])
    assert np.abs(np.asarray(load_picture(tmp_path / name).image).astype(int) - reference_grey()[..., None]).max() <= 1


def test_bombs_and_lies_are_refused_in_little_time_and_memory(tmp_path: Path, figure: Callable[[str], None]) -> None:
    files = nastier.wrong_files()
    paths = nastier.write_all(tmp_path, {name: data for name, (data, _) in files.items()})
    expected = {paths[name]: code for name, (_, code) in files.items()}
    expected |= bad_files(tmp_path) | non_files(tmp_path) | nastier.odd_links(tmp_path)
    # As a whole it has too many pixels; reduced, up to twice as many are allowed, and these are a lie.
    expected |= {tmp_path / "claims_1.5g.png": "disagree: ['corrupt', 'too_many_pixels']"}
    expected |= {nastier.sparse(tmp_path / "huge.jpg", 3 << 30): "too_large"}
    expected |= {nastier.sparse(tmp_path / "zeros.png", 1 << 30): "unknown_format"}
    outcomes = decode("files", *expected)
    verdicts = {path.name: outcome.verdict for path, outcome in zip(expected, outcomes, strict=True)}
    assert verdicts == {path.name: code for path, code in expected.items()}
    slowest, largest = max(one.cpu_seconds for one in outcomes), max(one.megabytes for one in outcomes)
    figure(f"{len(outcomes)} files refused, at most {slowest:.2f} s of CPU and {largest:.0f} MiB each")
    assert largest < BOMB_MEGABYTES


def check_mutants(outcomes: list[Outcome], figure: Callable[[str], None]) -> None:
    found = tally(outcomes)
    largest = max(outcome.megabytes for outcome in outcomes)
    decoded = found.pop("pixels")
    figure(f"{len(outcomes)} mutants: {decoded} decode, others {dict(found)}; peak {largest:.0f} MiB")
    assert set(found) <= REFUSALS
    assert 0.1 < decoded / len(outcomes) < 0.9
    assert largest < 1500


def test_a_png_may_have_as_many_chunks_as_its_size_explains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """libpng writes one for every 8 KiB, so a gigabyte has more than a hundred thousand."""
    monkeypatch.setattr(structure, "MAX_CHUNKS", 10)
    pixels = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    raw = zlib.compress(png_rows(pixels), 1)
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 300, 200, 8, 2, 0, 0, 0))
    pieces = [png_chunk(b"IDAT", raw[start : start + 8192]) for start in range(0, len(raw), 8192)]
    assert len(pieces) > 20
    (tmp_path / "long.png").write_bytes(PNG_SIGNATURE + header + b"".join(pieces) + png_chunk(b"IEND", b""))
    assert np.array_equal(np.asarray(load_picture(tmp_path / "long.png").image), pixels)
    (tmp_path / "empty.png").write_bytes(nastier.many_chunks(20))
    with pytest.raises(BadImage, match="chunks"):
        load_picture(tmp_path / "empty.png")


def test_mutated_pictures_decode_or_are_refused(tmp_path: Path, figure: Callable[[str], None]) -> None:
    check_mutants(decode("mutants", "2000", "1", *seeds_in(tmp_path)), figure)


@pytest.mark.slow
def test_many_mutated_pictures_decode_or_are_refused(tmp_path: Path, figure: Callable[[str], None]) -> None:
    check_mutants(decode("mutants", "20000", "2", *seeds_in(tmp_path)), figure)


def agree_on(count: int, seed: int, folder: Path) -> tuple[int, int]:
    """Verdicts of a dry run, of training and of evaluation on mutants. Returns: good, bad."""
    data = mutants([path.read_bytes() for path in seeds_in(folder)], count, seed)
    paths = [folder / f"{number}.mutant" for number in range(count)]
    for path, content in zip(paths, data, strict=True):
        path.write_bytes(content)
    samples = [Sample(str(path), 0, str(number)) for number, path in enumerate(paths)]
    checked = {found.path for found in read_fingerprints(list(map(str, paths)), 1) if isinstance(found, Problem)}
    training, evaluation = PixelCache(0), PixelCache(0)
    reader = TrainingReader(training, Preprocess(size=32), AugmentConfig(), 64, 0, 1)
    for _ in reader.batches(iter([Step(0, 32, tuple(samples))])):
        pass
    for _ in evaluation_batches(samples, Preprocess(size=32), 64, 1, evaluation):
        pass
    assert checked == set(training.problems) == set(evaluation.problems)
    return count - len(checked), len(checked)


def test_a_dry_run_judges_as_training_and_evaluation_do(tmp_path: Path) -> None:
    good, bad = agree_on(400, 3, tmp_path)
    assert min(good, bad) > 40


@pytest.mark.slow
def test_a_dry_run_judges_thousands_as_training_does(tmp_path: Path, figure: Callable[[str], None]) -> None:
    good, bad = agree_on(5000, 4, tmp_path)
    figure(f"5000 mutants: {good} good, {bad} bad, verdicts of dry run, training and evaluation equal")
    assert min(good, bad) > 500


@pytest.mark.parametrize("kind", nastier.changing())
def test_a_file_that_changes_after_it_was_indexed_is_reported_once(kind: str, tmp_path: Path) -> None:
    data = shapes(tmp_path / "data", classes=("circle",), images=6)
    samples = tuple(Sample(str(path), 0, path.name) for path in sorted((data / "circle").iterdir()))
    nastier.changing()[kind](Path(samples[2].path))
    cache = PixelCache(0)
    reader = TrainingReader(cache, Preprocess(size=32), AugmentConfig(), 64, 0, 2)
    batches = [batch for _, batch in reader.batches(iter([Step(epoch, 32, samples) for epoch in range(3)]))]
    others = tuple(sample.path for sample in samples if sample != samples[2])
    assert [batch and batch.paths for batch in batches] == [others] * 3
    assert {path: problem.code for path, problem in cache.problems.items()} == {samples[2].path: kind.strip()}


def test_a_file_that_grows_while_it_is_read_is_decoded_or_reported(tmp_path: Path) -> None:
    data, path, done = nastier.noise_jpeg(256), tmp_path / "growing.jpg", threading.Event()

    def grow() -> None:
        while not done.is_set():
            with open(path, "wb") as file:
                for start in range(0, len(data), 4096):
                    file.write(data[start : start + 4096])
                    file.flush()

    writer = threading.Thread(target=grow)
    path.write_bytes(data)
    writer.start()
    outcomes = set()
    try:
        for _ in range(300):
            try:
                outcomes.add(load_picture(path).image.size)
            except BadImage as bad:
                outcomes.add(bad.code)
    finally:
        done.set()
        writer.join()
    assert outcomes <= {(256, 256), "corrupt", "empty", "unknown_format"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_what_may_not_be_read_has_its_code(tmp_path: Path) -> None:
    locked = shapes(tmp_path / "data", classes=("circle",), images=1) / "circle" / "000.png"
    locked.chmod(0)
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(folder.stat().st_mode | 0o055)
    before = os.geteuid()
    os.seteuid(65534)
    try:
        with pytest.raises(BadImage) as caught:
            load_picture(locked)
    finally:
        os.seteuid(before)
    assert caught.value.code == "permission"


def test_the_decoders_are_those_of_the_list(tmp_path: Path) -> None:
    """No decoder outside of the list is reached, whatever the name of the file; Pillow knows many more."""
    from PIL import Image

    Image.init()
    image, verdicts = Image.fromarray(reference()), dict[str, str]()
    for format_ in sorted(
        set(Image.SAVE) - {"PDF", "EPS", "HDF5", "BUFR", "GRIB", "WMF", "MPEG", "PALM", "XBM", "SPIDER"}
    ):
        path = tmp_path / f"{format_}.jpg"
        try:
            image.save(path, format_)
        except (OSError, ValueError, KeyError):
            continue
        try:
            load_picture(path)
            verdicts[format_] = "pixels"
        except BadImage as bad:
            verdicts[format_] = bad.code
    assert set(verdicts.values()) == {"pixels", "unknown_format"}
    reached = {format_ for format_, verdict in verdicts.items() if verdict == "pixels"}
    assert reached - {"MPO"} <= set(FORMATS)
    assert {"JPEG", "PNG", "TIFF"} <= reached
    assert {"ICO", "PCX", "TGA", "SGI", "ICNS"} <= set(verdicts) - reached


def test_no_other_program_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name in ("gs", "gswin64c", "pip", "uv", "djpeg", "ppmtogif"):
        (stubs / name).write_text(f"#!/bin/sh\necho {name} >> {tmp_path}/started\n")
        (stubs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(stubs))
    for path in [*bad_files(tmp_path), *good_pictures(tmp_path)]:
        with contextlib.suppress(BadImage):
            load_picture(path)
    assert not (tmp_path / "started").exists()


def sources() -> Iterable[tuple[str, str]]:
    for path in sorted(Path(mvcr_cli.__file__).parent.rglob("*.py")):
        yield path.name, path.read_text("utf-8")


def test_there_is_one_decoder_in_the_package() -> None:
    calls = [name for name, text in sources() for _ in re.findall(r"\bImage\.open\(", text)]
    assert set(calls) == {"images.py"}
    others = r"torchvision\.io|decode_image\(|read_image\(|\bimread|cv2|imageio|ImageFolder|verify\(\)|LOAD_TRUNCATED"
    assert [name for name, text in sources() if re.search(others, text)] == []
    assert [name for name, text in sources() if re.search(r"MAX_IMAGE_PIXELS\s*=\s*None", text)] == []
