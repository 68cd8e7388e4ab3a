"""The same batches whatever reads them: any number of threads, with a cache or without, bad files among them."""

from __future__ import annotations

import _thread
import itertools
import os
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mvcr_cli.config import MEBIBYTE, AugmentConfig
from mvcr_cli.data import loader
from mvcr_cli.data.folder import Sample, scan
from mvcr_cli.data.loader import (
    PixelCache,
    Step,
    TrainingReader,
    epoch_order,
    evaluation_batches,
    ordered,
    stable_seed,
)
from mvcr_cli.data.preprocess import Preprocess
from mvcr_cli.data.reader_thread import ReaderThread
from mvcr_cli.errors import WorkerFailed


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sample, ...]:
    """Twelve pictures of several sizes and formats, two of them broken, two grey, two equal."""
    root = tmp_path_factory.mktemp("pictures")
    chance = np.random.default_rng(0)
    for number in range(9):
        folder = root / f"class{number % 3}"
        folder.mkdir(exist_ok=True)
        shape = (30 + 7 * number, 90 - 5 * number)
        pixels = chance.integers(0, 256, (*shape, 3), dtype=np.uint8)
        if number in (2, 3):
            pixels = pixels[..., :1].repeat(3, axis=2)
        suffix = "jpg" if number == 5 else "png"
        Image.fromarray(pixels).save(folder / f"{number}.{suffix}")
    (root / "class0" / "copy.png").write_bytes((root / "class0" / "0.png").read_bytes())
    (root / "class1" / "text.png").write_text("no picture")
    whole = (root / "class2" / "8.png").read_bytes()
    (root / "class2" / "cut.png").write_bytes(whole[: len(whole) // 2])
    return scan(root).samples


BAD = ["text.png", "cut.png"]


def steps(samples: tuple[Sample, ...], batch: int = 4) -> Iterator[Step]:
    for epoch in range(2):
        order = epoch_order(len(samples), 3, epoch)
        for start in range(0, len(samples), batch):
            chosen = tuple(samples[index] for index in order[start : start + batch])
            yield Step(epoch, 32 if epoch else 24, chosen)


def read(samples: tuple[Sample, ...], *, workers: int, cache_mb: int, ahead: int = 8) -> tuple[list[tuple], PixelCache]:
    cache = PixelCache(cache_mb)
    config = AugmentConfig(rotate=30, erase=0.5)
    reader = TrainingReader(cache, Preprocess(size=32), config, 48, 3, workers, ahead)
    found = []
    for step, batch in reader.batches(steps(samples)):
        assert batch is not None
        found.append((step, batch.images.numpy().tobytes(), batch.labels.tolist(), batch.paths))
        assert batch.images.shape == (len(batch.paths), step.size, step.size, 3)
    return found, cache


@pytest.fixture(scope="module")
def expected(samples):
    return read(samples, workers=0, cache_mb=0)[0]


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("cache_mb", [0, 16])
@pytest.mark.parametrize("ahead", [0, 8, 1000])
def test_batches_do_not_depend_on_threads_or_cache(samples, expected, workers, cache_mb, ahead):
    found, cache = read(samples, workers=workers, cache_mb=cache_mb, ahead=ahead)
    assert found == expected
    assert sorted(Path(path).name for path in cache.problems) == sorted(BAD)


def test_bad_pictures_are_in_no_batch_and_no_other_takes_their_name(samples, expected):
    labels = {sample.path: sample.label for sample in samples}
    for epoch in range(2):
        paths = [path for step, _, _, paths in expected if step.epoch == epoch for path in paths]
        assert sorted(paths) == sorted(path for path in labels if Path(path).name not in BAD)
    for _, _, batch_labels, paths in expected:
        assert batch_labels == [labels[path] for path in paths]


def test_an_epoch_is_another_one(expected):
    per_epoch = len(expected) // 2
    first = [paths for _, _, _, paths in expected[:per_epoch]]
    assert first != [paths for _, _, _, paths in expected[per_epoch:]]


def test_one_good_picture_is_no_batch(samples):
    good = next(sample for sample in samples if Path(sample.path).name not in BAD)
    bad = [sample for sample in samples if Path(sample.path).name in BAD]
    for workers in (0, 2):
        reader = TrainingReader(PixelCache(1), Preprocess(size=32), AugmentConfig(), 48, 0, workers)
        assert [b for _, b in reader.batches(iter([Step(0, 32, (good, *bad)), Step(0, 32, tuple(bad))]))] == [
            None,
            None,
        ]


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("cache_mb", [0, 16])
@pytest.mark.parametrize("batch", [1, 4, 100])
def test_evaluation_sees_every_good_picture_once_in_order(samples, workers, cache_mb, batch):
    preprocess, cache = Preprocess(size=32), PixelCache(cache_mb)
    for _ in range(2):
        kept: list[Sample] = []
        for chosen, x in evaluation_batches(samples, preprocess, batch, workers, cache):
            assert len(chosen) == len(x) <= batch
            kept += chosen
            for sample, row in zip(chosen, x, strict=True):
                if sample.path.endswith(".png"):
                    assert torch.equal(row, preprocess.tensor(Image.open(sample.path).convert("RGB")))
        assert kept == [sample for sample in samples if Path(sample.path).name not in BAD]
    assert sorted(Path(path).name for path in cache.problems) == sorted(BAD)


def test_a_bad_file_is_opened_once(samples, monkeypatch):
    from mvcr_cli.data import loader

    opened: list[str] = []
    original = loader.load_picture
    monkeypatch.setattr(loader, "load_picture", lambda path, side: (opened.append(path), original(path, side))[1])
    read(samples, workers=0, cache_mb=0)
    assert [Path(path).name for path in opened].count("text.png") == 1
    opened.clear()
    read(samples, workers=0, cache_mb=16)
    assert len(opened) == len({sample.digest for sample in samples})  # the copy comes out of the cache


@pytest.mark.parametrize("workers", [0, 4])
def test_the_cache_never_exceeds_its_cap(tmp_path, workers):
    chance = np.random.default_rng(0)
    many = []
    for number in range(12):
        Image.fromarray(chance.integers(0, 256, (300, 300, 3), dtype=np.uint8)).save(tmp_path / f"{number}.bmp")
        many.append(Sample(str(tmp_path / f"{number}.bmp"), 0, str(number)))
    cache = PixelCache(1)
    list(ordered(lambda sample: cache.picture(sample, 300, shrink=True), many, max(1, workers), 6))
    held = sum(entry.width * entry.height * len(entry.getbands()) for entry in cache._entries.values())
    assert cache.used == held
    assert MEBIBYTE - 300 * 300 * 3 < held <= MEBIBYTE


def test_a_grey_picture_costs_a_third_with_a_cache_and_without(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "grey.png")
    sample = Sample(str(tmp_path / "grey.png"), 0, "x")
    for cache, used in ((PixelCache(1), 20 * 30), (PixelCache(0), 0)):
        first, second = (cache.picture(sample, 30, shrink=True) for _ in range(2))
        assert cache.used == used
        assert first.mode == second.mode == "L"
        assert np.array_equal(first, pixels)
        assert np.array_equal(second, pixels)


@pytest.mark.parametrize("count", [1, 2, 10, 257])
def test_the_order_of_an_epoch_is_a_permutation_and_a_function_of_seed_and_epoch(count):
    orders = {(seed, epoch): epoch_order(count, seed, epoch) for seed in range(3) for epoch in range(3)}
    for (seed, epoch), order in orders.items():
        assert sorted(order) == list(range(count))
        assert order == epoch_order(count, seed, epoch)
    if count > 5:
        assert len(set(map(tuple, orders.values()))) == 9


def test_seeds_are_those_of_every_process():
    """`hash()` differs from process to process; these numbers may never change, or resumed runs would."""
    assert stable_seed(0, 1, "order") == 64760347282913085
    assert stable_seed(0, 1) != stable_seed(0, "1") != stable_seed("0", 1)


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("ahead", [0, 1, 5])
def test_ordered_keeps_the_order_and_runs_no_further_ahead_than_told(workers, ahead):
    taken, done = [], []
    lock = threading.Lock()

    def items() -> Iterator[int]:
        for item in range(30):
            taken.append(item)
            yield item

    def work(item: int) -> int:
        time.sleep(0.002 * (item % 3))
        with lock:
            done.append(item)
        return item * item

    received = 0
    for item, result in ordered(work, items(), workers, ahead):
        assert (item, result) == (received, received**2)
        assert len(taken) <= received + 1 + ahead
        received += 1
    assert received == len(done) == 30


def test_ordered_passes_an_error_on_in_its_place_and_ends_its_threads():
    def work(item: int) -> int:
        if item == 3:
            raise ValueError("three")
        return item

    before = _thread._count()
    results = ordered(work, range(10), 2, 4)
    assert [next(results)[1] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)
    until = time.monotonic() + 60
    while _thread._count() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert _thread._count() == before


@pytest.mark.parametrize(("step", "most"), [(1.0, 60.0), (0.0, 60.0), (1.0, 0.0)])
def test_a_picture_that_takes_long_to_decode_is_waited_for(step, most, monkeypatch):
    """As long as the readers compute: a dead disk gives nothing to compute, a picture of a gigapixel a lot."""
    worked, done = itertools.count(0, step), threading.Event()
    monkeypatch.setattr(loader, "READ_SECONDS", 0.02)
    monkeypatch.setattr(loader, "MOST_READ_SECONDS", most)

    def count(readers: Sequence[ReaderThread]) -> float:
        now = next(worked)
        if now > 3 or not step:
            done.set()
        return now

    monkeypatch.setattr(loader, "processor_seconds", count)
    if step and most:
        assert list(ordered(lambda item: done.wait(60), [1], 1, 0)) == [(1, True)]
        return
    with pytest.raises(WorkerFailed, match="longer than"):
        list(ordered(lambda item: time.sleep(0.3), [1], 1, 0))


def test_what_readers_compute_is_counted():
    go_on, end = threading.Event(), threading.Event()

    def compute() -> None:
        until = time.thread_time() + 0.05
        while time.thread_time() < until:
            pass
        go_on.set()
        end.wait(60)

    reader = ReaderThread(compute)
    go_on.wait(60)
    assert loader.processor_seconds([reader]) >= 0.05
    end.set()
    reader.join(60)
    assert not reader.is_alive()
    assert loader.processor_seconds([reader]) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_does_not_wait_for_threads_that_it_does_not_have():
    end = threading.Event()
    reader = ReaderThread(partial(end.wait, 60))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads, from Python 3.12 on
        child = os.fork()
    if child == 0:
        began = time.monotonic()
        reader.join(30)
        os._exit(0 if time.monotonic() - began < 15 and not reader.is_alive() else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert reader.is_alive()
    end.set()
    reader.join(60)


def test_a_thread_that_cannot_begin_is_not_waited_for_for_ever(monkeypatch):
    """As when its first lines lack memory: Python says so on stderr, and the one who started it hears nothing."""
    monkeypatch.setattr("mvcr_cli.data.reader_thread.BEGIN_SECONDS", 0.05)
    monkeypatch.setattr("_thread.start_new_thread", lambda *_: 1)
    with pytest.raises(WorkerFailed, match="out of memory"):
        list(ordered(str, range(10), 2, 4))


def test_ordered_ends_its_threads_when_it_is_left_early():
    before = _thread._count()
    results = ordered(lambda item: item, iter(int, 1), 3, 10)  # endless
    next(results)
    results.close()
    until = time.monotonic() + 60
    while _thread._count() > before and time.monotonic() < until:
        time.sleep(0.01)
    assert _thread._count() == before
