"""Threads together decode a bounded number of pixels at once, and no picture waits for ever."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvcr_cli.data import decoders, huge, images, vips
from mvcr_cli.data.huge import open_huge
from mvcr_cli.data.images import load_picture
from mvcr_cli.data.in_flight import PixelsInFlight
from mvcr_cli.errors import BadImage

SIDE = 60


class Counting(PixelsInFlight):
    """Remembers the most pixels that were held at once, and by how many."""

    def __init__(self, most: int) -> None:
        super().__init__(most)
        self.now: list[int] = []
        self.peak, self.crowd = 0, 0

    @contextmanager
    def holding(self, pixels: int) -> Iterator[None]:
        with super().holding(pixels):
            self.now.append(pixels)
            self.peak, self.crowd = max(self.peak, sum(self.now)), max(self.crowd, len(self.now))
            time.sleep(0.01)
            try:
                yield
            finally:
                self.now.remove(pixels)


def held(budget: PixelsInFlight, sizes: list[int]) -> None:
    """Every size is held for a moment, each in a thread of its own."""

    def hold(pixels: int) -> None:
        with budget.holding(pixels):
            pass

    with ThreadPoolExecutor(len(sizes)) as threads:
        done, waiting = wait([threads.submit(hold, pixels) for pixels in sizes], timeout=30)
    assert not waiting
    assert [future.exception() for future in done] == [None] * len(sizes)


def test_no_more_are_held_than_allowed_and_not_one_by_one_either():
    budget = Counting(10)
    held(budget, [3, 4, 5, 1, 2, 6, 7, 3, 3, 4])
    assert budget.peak <= 10
    assert budget.crowd > 1


def test_what_is_larger_than_allowed_passes_alone():
    budget = Counting(10)
    held(budget, [3, 50, 4, 20, 2])
    assert budget.peak == 50


def test_a_thread_that_holds_some_does_not_wait_for_itself():
    budget = PixelsInFlight(10)
    with budget.holding(8), budget.holding(8), budget.holding(50):
        pass
    held(budget, [10])  # all was given back


def test_an_error_gives_back_what_was_held():
    budget = PixelsInFlight(10)
    with pytest.raises(ValueError, match="no"), budget.holding(10):
        raise ValueError("no")
    held(budget, [10])


def test_a_thread_waits_until_there_is_room():
    budget, entered = PixelsInFlight(10), threading.Event()

    def second() -> None:
        with budget.holding(5):
            entered.set()

    thread = threading.Thread(target=second)
    with budget.holding(6):
        thread.start()
        assert not entered.wait(0.1)
    assert entered.wait(30)
    thread.join()


@pytest.fixture
def one_picture(monkeypatch: pytest.MonkeyPatch) -> Counting:
    """Room for one picture of `SIDE`, which is a huge one."""
    budget = Counting(SIDE * SIDE)
    for module in (images, decoders, vips):
        monkeypatch.setattr(module, "in_flight", budget)
    monkeypatch.setattr(huge, "HUGE_ABOVE", 0)
    return budget


def pictures(folder: Path, suffix: str) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = [folder / f"{number}{suffix}" for number in range(4)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(path)
    return paths


def in_pieces(path: Path) -> None:
    with open_huge(path) as picture:
        picture.glance(8)
        list(picture.strips(10))
        picture.tiles([(0, 0, 9, 9)], 9)


@pytest.mark.parametrize("read", [load_picture, in_pieces])
@pytest.mark.parametrize("suffix", [".bmp", ".webp", ".png"])
def test_pictures_that_are_decoded_whole_take_turns(
    read: Callable[[Path], object], suffix: str, one_picture: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vips, "_pyvips", lambda: None)
    paths = pictures(tmp_path, suffix)
    with ThreadPoolExecutor(4) as threads:
        reading: list[Future[object]] = [threads.submit(read, path) for path in paths]
        assert not wait(reading, timeout=60).not_done
    assert [future.exception() for future in reading] == [None] * 4
    assert (one_picture.peak, one_picture.now) == (SIDE * SIDE, [])


def test_a_progressive_jpeg_costs_all_its_pixels_however_it_is_read(one_picture: Counting, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(np.zeros((SIDE, SIDE, 3), np.uint8)).save(path, progressive=True)
    load_picture(path, 8)
    assert one_picture.peak == SIDE * SIDE
    one_picture.peak = 0
    in_pieces(path)
    assert one_picture.peak == SIDE * SIDE
    assert one_picture.now == []


def test_what_fails_or_is_left_open_gives_back_its_pixels(one_picture: Counting, tmp_path: Path) -> None:
    path = pictures(tmp_path, ".bmp")[0]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadImage), open_huge(path) as picture:
        picture.glance(8)
    with pytest.raises(BadImage):
        load_picture(path)
    assert one_picture.now == []
    forgotten = open_huge(pictures(tmp_path, ".bmp")[1])
    forgotten.glance(8)
    assert one_picture.now == [SIDE * SIDE]
    del forgotten
    gc.collect()
    assert one_picture.now == []
