"""What a training reads, step by step: which pictures, at which size, and tiles as the network now proposes them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from mvcr_cli.config import TrainConfig
from mvcr_cli.data.folder import Sample
from mvcr_cli.data.loader import (
    Batch,
    Input,
    PixelCache,
    Step,
    TrainingReader,
    decode_side,
    epoch_order,
    evaluation_batches,
)
from mvcr_cli.data.trail import Trail
from mvcr_cli.engine.clock import Clock
from mvcr_cli.engine.evaluate import tile_reader
from mvcr_cli.engine.prepare import Prepared
from mvcr_cli.engine.schedule import lessons, size_at, training_side
from mvcr_cli.engine.session import Session
from mvcr_cli.models.zoom import ZoomResNet
from mvcr_cli.records import Problem


@dataclass
class Feed:
    """The pictures of a run; decoded ones and tiles are kept for later epochs and the validations.

    Attributes: `zoom`, what reads pictures with their tiles; None for a network that does not zoom.
    """

    config: TrainConfig
    prepared: Prepared
    session: Session
    clock: Clock
    trail: Trail | None = None

    def __post_init__(self) -> None:
        self.cache = PixelCache(self.config.cache_mb, self.trail)
        self.zoom = tile_reader(self.session.network, self.session.preprocess, self.config.memory_mb // 4, self.trail)
        self.side = self._largest_side()

    @property
    def searches(self) -> bool:
        """Whether tiles are searched for, as the network learns to."""
        return self.zoom is not None and not self.zoom.zoom.covers

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch."""
        assert self.config.batch is not None
        return max(1, len(self.prepared.train) // self.config.batch)

    def batches(self, first: int) -> Iterator[tuple[Step, Batch | None]]:
        """Steps from `first` on and their batches.

        Reading in advance pauses where the network's own proposal of tiles changes.
        """
        reader = self._reader()
        if not self.searches:
            yield from reader.batches(self._steps(first))
            return
        for due, steps in itertools.groupby(self._steps(first), lambda step: lessons(step.epoch)):
            network, average = self.session.network, self.session.average.network
            assert isinstance(network, ZoomResNet) and isinstance(average, ZoomResNet)
            if due > int(network.lessons):
                for learner in (network, average):
                    learner.teach_finder(average.scorer)
                self.search()
            yield from reader.batches(steps)

    def search(self) -> None:
        """Propose tiles as the network now says."""
        if self.zoom is not None and isinstance(self.session.network, ZoomResNet):
            preprocess = self.session.preprocess
            self.zoom.search_with(self.session.network.learned_proposal(preprocess.mean, preprocess.std))

    def validation(self, batch: int) -> Iterator[tuple[list[Sample], Input]]:
        """The validation pictures as `evaluation_batches`."""
        assert self.config.workers is not None
        return evaluation_batches(
            self.prepared.val, self.session.preprocess, batch, self.config.workers, self.cache, zoom=self.zoom
        )

    def unaugmented(self, batch: int, batches: int) -> Iterator[tuple[list[Sample], Input]]:
        """Training pictures as an evaluation sees them, the same ones each time: full batches, unless one is all there is."""
        assert self.config.workers is not None
        count = min(batch * batches, len(self.prepared.train))
        count -= count % batch if count > batch else 0
        order = epoch_order(len(self.prepared.train), self.config.seed, 0)[:count]
        samples = [self.prepared.train[index] for index in order]
        return evaluation_batches(
            samples, self.session.preprocess, batch, self.config.workers, self.cache, zoom=self.zoom
        )

    def problems(self) -> list[Problem]:
        """The pictures that could not be read so far."""
        return [*self.cache.problems.values(), *(() if self.zoom is None else self.zoom.problems.values())]

    def size(self, step: int) -> int:
        """Side in pixels of the pictures of a step."""
        return size_at(self.clock.progress(step), self.side) if self.config.progressive else self.side

    def _steps(self, first: int) -> Iterator[Step]:
        """What every step reads; sizes follow the schedule."""
        assert self.config.batch is not None
        samples, order, of_epoch = self.prepared.train, [], -1
        last = self.clock.total_steps
        for step in itertools.count(first) if last is None else range(first, last):
            epoch, position = divmod(step, self.per_epoch)
            if epoch != of_epoch:
                order, of_epoch = epoch_order(len(samples), self.config.seed, epoch), epoch
            chosen = order[position * self.config.batch : (position + 1) * self.config.batch]
            yield Step(epoch, self.size(step), tuple(samples[index] for index in chosen))

    def _largest_side(self) -> int:
        """Side in pixels of the last training pictures: what takes back the crops, but no taught view goes unseen."""
        imgsz, network = self.config.imgsz, self.session.network
        assert imgsz is not None
        side = training_side(imgsz, self.config.augment.crop) if self.config.progressive else imgsz
        while side < imgsz and network.taught_at(side) != network.taught_at(imgsz):
            side += 8
        return min(side, imgsz)

    def _reader(self) -> TrainingReader:
        config = self.config
        assert config.imgsz is not None
        assert config.workers is not None
        assert config.batch is not None
        base = decode_side(config.imgsz, config.augment)
        return TrainingReader(
            self.cache,
            self.session.preprocess,
            config.augment,
            base,
            config.seed,
            config.workers,
            3 * config.batch,
            self.zoom,
        )
