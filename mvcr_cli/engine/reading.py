"""How fast pictures are read: decoded alone, and as the augmented batches of a training."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from mvcr_cli.config import AugmentConfig
from mvcr_cli.data.folder import Sample, find_layout, scan
from mvcr_cli.data.images import load_picture
from mvcr_cli.data.loader import PixelCache, Step, TrainingReader, decode_side, ordered
from mvcr_cli.data.preprocess import Preprocess
from mvcr_cli.data.tiles import TileReader
from mvcr_cli.engine import Say, default_workers
from mvcr_cli.errors import BadImage, DataError

PICTURES = 512
SECONDS = 5.0


@dataclass(frozen=True)
class ReadingSpeeds:
    """Pictures a second, each measured with the network at rest; `images` were read by the loader."""

    images: int
    decode: float
    loader: float


def sample_pictures(data: Path) -> tuple[Sample, ...]:
    """Up to 512 training pictures, spread evenly over the classes. Raises: see `scan`."""
    samples = scan(find_layout(data).train).samples
    return samples[:: math.ceil(len(samples) / PICTURES)]


def reading_speeds(samples: Sequence[Sample], preprocess: Preprocess, batch: int, workers: int | None,
                   say: Say, zoom: TileReader | None = None) -> ReadingSpeeds:  # fmt: skip
    """Read each picture once with each, for at most five seconds; nothing is cached.

    Args:
        zoom: what the loader reads with for a network that zooms.

    Raises: DataError when no picture can be read.
    """
    threads = default_workers(workers)
    batch = min(batch, len(samples))
    augment = AugmentConfig()
    base = decode_side(preprocess.size, augment)
    decoded, decode = _speed(_decoded(samples, base, threads))
    if not decoded:
        raise DataError("none of the pictures can be read", "look at them with an image viewer")
    cache = PixelCache(0)
    reader = TrainingReader(cache, preprocess, augment, base, 0, threads, 3 * batch, zoom)
    steps = (Step(0, preprocess.size, tuple(samples[start : start + batch])) for start in range(0, len(samples), batch))
    batches = reader.batches(steps)
    images, loader = _speed(0 if read is None else len(read.labels) for _, read in batches)
    if problems := (cache if zoom is None else zoom).problems:
        say(f"{len(problems)} of the pictures cannot be read")
    return ReadingSpeeds(images, decode, loader)


def _decoded(samples: Sequence[Sample], at_least: int, threads: int) -> Iterator[int]:
    def decode(sample: Sample) -> int:
        try:
            load_picture(sample.path, at_least)
        except BadImage:
            return 0
        return 1

    with closing(ordered(decode, samples, max(1, threads), 4 * max(1, threads))) as read:  # type: ignore[type-var]
        yield from (count for _, count in read)


def _speed(counts: Iterable[int]) -> tuple[int, float]:
    """Pictures, and pictures a second, until they or the time is up."""
    began = time.perf_counter()
    total, seconds = 0, 0.0
    for count in counts:
        total += count
        seconds = time.perf_counter() - began
        if seconds > SECONDS:
            break
    return total, total / max(seconds, 1e-9)
