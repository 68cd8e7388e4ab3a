"""Pictures to batches: decoded on demand by a few threads, ahead of the network, in bounded memory.

Threads suffice because Pillow decodes and resizes outside the interpreter lock, and they share one bounded cache of
decoded pixels. Nothing random is state: the order of an epoch is a function of (seed, epoch), and what happens to a
picture a function of (seed, epoch, picture). So a run can go on from any step, with any number of threads.
"""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mvcr_cli.config import MOST_READ_SECONDS, READ_SECONDS, AugmentConfig
from mvcr_cli.data.augment import augment
from mvcr_cli.data.cache import ReadCache
from mvcr_cli.data.folder import Sample
from mvcr_cli.data.images import load_picture
from mvcr_cli.data.preprocess import Preprocess, grey_if_grey, image_bytes
from mvcr_cli.data.reader_thread import ReaderThread
from mvcr_cli.data.tiles import TileBatch, TileReader, Tiles, stack_tiles, turned
from mvcr_cli.errors import WorkerFailed
from mvcr_cli.models.scale_set import view_side
from mvcr_cli.paths import display_name

T = TypeVar("T")
R = TypeVar("R")
BUSY_SHARE = 0.001  # of the waiting time, in processor time of the readers, from which on they are at work
ENDING_SECONDS = 10.0  # for threads to finish what they read, when a reading ends early
Item = tuple[NDArray[np.uint8], int, str, Tiles | None]  # pixels, label, path, tiles of a large picture


def stable_seed(*parts: object) -> int:
    """A seed that is the same in every process and version, unlike `hash()`."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "big")


class PixelCache(ReadCache[tuple[str, int], Image.Image]):
    """Decoded pictures; see `ReadCache`."""

    def picture(self, sample: Sample, side: int, *, shrink: bool) -> Image.Image | None:
        """The upright picture, RGB or grey, or None when the file is bad, which is noted in `problems`.

        Args:
            side: pixels of the longer side that must be kept; a JPEG may be decoded reduced, but never below.
            shrink: resize to exactly this longer side when larger; otherwise leave the picture as decoded.
        """

        def read() -> Image.Image:
            image = load_picture(sample.path, side).image
            return grey_if_grey(_shrink(image, side) if shrink else image)

        return self.fetch((sample.digest, side if shrink else 0), sample.path, read, image_bytes)


def _shrink(image: Image.Image, side: int) -> Image.Image:
    longest = max(image.size)
    if longest <= side:
        return image
    size = tuple(max(1, math.floor(edge * side / longest + 0.5)) for edge in image.size)
    return image.resize((size[0], size[1]), Image.Resampling.BILINEAR, reducing_gap=3.0)


@dataclass(frozen=True)
class Batch:
    """Shape: images (N, H, W, 3) uint8, labels (N,) int64; `paths` for messages, `tiles` where the network zooms."""

    images: Tensor
    labels: Tensor
    paths: tuple[str, ...]
    tiles: TileBatch | None = None


@dataclass(frozen=True)
class ZoomInput:
    """Preprocessed glances and their candidates. Shape: x (N, 3, size, size)."""

    x: Tensor
    tiles: TileBatch
    preprocess: Preprocess


Input = Tensor | ZoomInput


@dataclass(frozen=True)
class Step:
    """What one training step reads: which pictures, in which epoch, at which size."""

    epoch: int
    size: int
    samples: tuple[Sample, ...]


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    return np.random.default_rng(stable_seed(seed, epoch, "order")).permutation(count).tolist()  # type: ignore[no-any-return]


@dataclass
class TrainingReader:
    """Turns steps into augmented batches, some pictures in advance.

    Args:
        base: longer side, in pixels, at which pictures are decoded and cached before augmentation.
        workers: decoding threads; 0 reads in the caller's thread.
        ahead: pictures that may be read in advance of the network.
        zoom: reads large pictures with their tiles; None for networks that do not zoom.
    """

    cache: PixelCache
    preprocess: Preprocess
    augment: AugmentConfig
    base: int
    seed: int
    workers: int
    ahead: int = 96
    zoom: TileReader | None = None

    def batches(self, steps: Iterator[Step]) -> Iterator[tuple[Step, Batch | None]]:
        """The batch of every step, in order; None where fewer than two pictures of the step could be read."""
        if not self.workers:
            for step in steps:
                yield step, _collate([_noting(lambda pair: self._read(*pair), (step, one)) for one in step.samples])
            return
        pictures = ((step, sample) for step in steps for sample in step.samples)
        items: list[Item | None] = []
        read = ordered(lambda pair: self._read(*pair), pictures, self.workers, self.ahead)
        for (step, _), item in read:
            items.append(item)
            if len(items) == len(step.samples):
                yield step, _collate(items)
                items = []

    def _read(self, step: Step, sample: Sample) -> Item | None:
        found = self._decoded(sample)
        if found is None:
            return None
        image, tiles = found
        rng = random.Random(stable_seed(self.seed, step.epoch, sample.digest))
        fill = tuple(round(255 * mean) for mean in self.preprocess.mean)
        pixels = augment(image, step.size, self.preprocess.fit, self.augment, rng, fill)  # type: ignore[arg-type]
        if tiles is not None:
            tiles = turned(tiles, self.augment, rng)
        return pixels, sample.label, sample.path, tiles

    def _decoded(self, sample: Sample) -> tuple[Image.Image, Tiles | None] | None:
        if self.zoom is not None:
            return self.zoom.read(sample)
        image = self.cache.picture(sample, self.base, shrink=True)
        return None if image is None else (image, None)


def decode_side(size: int, config: AugmentConfig) -> int:
    """Longer side in pixels at which training pictures are decoded and cached.

    Enough for the smallest crop and the strongest zoom to be sharp, and at most twice the network's size.
    """
    return math.ceil(size * min(2.0, (1 + config.zoom) / math.sqrt(config.crop)))


def _collate(items: Sequence[Item | None]) -> Batch | None:
    good = [item for item in items if item is not None]
    if len(good) < 2:  # batch norm needs two
        return None
    images = torch.from_numpy(np.stack([item[0] for item in good]))
    labels = torch.tensor([item[1] for item in good])
    tiles = [item[3] for item in good if item[3] is not None]
    return Batch(images, labels, tuple(item[2] for item in good), stack_tiles(tiles) if tiles else None)


def evaluation_batches(samples: Sequence[Sample], preprocess: Preprocess, batch: int, workers: int,
                       cache: PixelCache, factor: float = 1.0, zoom: TileReader | None = None,
                       ) -> Iterator[tuple[list[Sample], Input]]:  # fmt: skip
    """Preprocessed inputs in order, without the bad files, which `cache` or `zoom` notes in its `problems`.

    Args:
        factor: size at which the pictures are shown, see `Preprocess.tensor`.
        zoom: cuts the tiles of large pictures.

    Yields: samples, (N, 3, canvas, canvas) float32, with `zoom` together with tiles.
    """
    side = view_side(preprocess.size, factor)

    def read(sample: Sample) -> tuple[Tensor, Tiles | None] | None:
        if zoom is not None:
            found = zoom.read(sample)
            return None if found is None else (preprocess.tensor(found[0]), found[1])
        # Twice the size needed: a JPEG may be decoded reduced, and the resize that follows still filters.
        image = cache.picture(sample, 2 * side, shrink=False)
        return None if image is None else (preprocess.tensor(image, factor), None)

    ready: list[tuple[Sample, tuple[Tensor, Tiles | None]]] = []
    for sample, found in ordered(read, samples, max(1, workers), 2 * batch):
        if found is not None:
            ready.append((sample, found))
        if len(ready) == batch:
            yield [sample for sample, _ in ready], _stack([found for _, found in ready], preprocess)
            ready = []
    if ready:
        yield [sample for sample, _ in ready], _stack([found for _, found in ready], preprocess)


def _stack(found: list[tuple[Tensor, Tiles | None]], preprocess: Preprocess) -> Input:
    x = torch.stack([x for x, _ in found])
    tiles = [tiles for _, tiles in found if tiles is not None]
    return ZoomInput(x, stack_tiles(tiles), preprocess) if tiles else x


def ordered(function: Callable[[T], R], items: Iterable[T], workers: int, ahead: int) -> Iterator[tuple[T, R]]:
    """`(item, function(item))` in the items' order, computed by threads at most `ahead` items in advance.

    Raises: WorkerFailed when one item takes longer than READ_SECONDS without any arithmetic, or than
        MOST_READ_SECONDS; what `function` raises, with the item's name noted.
    """
    waiting: deque[tuple[T, Future[R]]] = deque()
    tasks: SimpleQueue[tuple[T, Future[R]] | None] = SimpleQueue()
    # Daemons, so that a read that never ends, from a dead network disk, cannot keep the program from ending.
    readers: list[ReaderThread] = []
    try:
        for _ in range(workers):
            readers.append(ReaderThread(partial(_work, function, tasks)))
        for item in items:
            waiting.append((item, Future()))
            tasks.put(waiting[-1])
            if len(waiting) > ahead:
                yield _first(waiting, readers)
        while waiting:
            yield _first(waiting, readers)
    finally:
        for _, future in waiting:
            future.cancel()
        for _ in readers:
            tasks.put(None)
        until = time.monotonic() + ENDING_SECONDS
        for reader in readers:
            reader.join(max(0.0, until - time.monotonic()))


def _work(function: Callable[[T], R], tasks: SimpleQueue[tuple[T, Future[R]] | None]) -> None:
    while (task := tasks.get()) is not None:
        item, future = task
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(_noting(function, item))
            except BaseException as error:
                future.set_exception(error)


def _noting(function: Callable[[T], R], item: T) -> R:
    try:
        return function(item)
    except Exception as error:
        error.add_note(f"while reading {_named(item)}")
        raise


def _first(waiting: deque[tuple[T, Future[R]]], readers: Sequence[ReaderThread]) -> tuple[T, R]:
    item, future = waiting[0]
    began, worked = time.monotonic(), processor_seconds(readers)
    while True:
        try:
            result = future.result(READ_SECONDS)
            break
        except TimeoutError:
            if future.done():  # its own, not that of the wait
                raise
            before, worked = worked, processor_seconds(readers)
            if worked - before > BUSY_SHARE * READ_SECONDS and time.monotonic() - began < MOST_READ_SECONDS:
                continue  # decoding a picture of a gigapixel; a dead disk gives nothing to compute
            hanging = ", ".join(_named(item) for item, future in waiting if future.running())
            raise WorkerFailed(
                f"reading takes longer than {READ_SECONDS:g} s: {hanging}",
                "is the disk or the network folder there? take these files out if they are at fault",
            ) from None
    waiting.popleft()
    return item, result


def processor_seconds(readers: Iterable[ReaderThread]) -> float:
    """What these threads have computed; the whole process where the system does not tell."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return time.process_time()
    alive = (reader.ident for reader in readers if reader.is_alive())
    return sum(time.clock_gettime(time.pthread_getcpuclockid(ident)) for ident in alive)


def _named(item: object) -> str:
    """The file of a sample, of (step, sample), or of a path."""
    item = item[-1] if isinstance(item, tuple) else item
    return display_name(str(getattr(item, "path", item)))
