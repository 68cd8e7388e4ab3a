"""How far a run is: by steps when epochs are given, by the clock when a time is given."""

from __future__ import annotations

import time
from dataclasses import dataclass

WRITING_RESERVE_SECONDS = 3.0  # last state, weights and report
MARGIN = 1.2  # a validation may take so many times what the one before it took
FORWARD_SHARE = 1 / 3  # of what a training step costs
VALIDATION_SHARE = 1 / 15  # of the time, at most, when the clock decides
WORTH_GOING_ON = 0.1  # of the time, when a validation that was thought to be the last took less than foreseen


@dataclass
class Clock:
    """Progress of a run, from 0 to 1; the learning rate and the picture size are functions of it.

    With a time budget the run ends on time whatever the machine does meanwhile, so such a run is not bit-reproducible;
    with epochs it is.

    Args:
        total_steps: length of the run in steps; None when `budget` decides.
        budget: seconds of wall time, from `started`, that the whole run may take; None when steps decide.
        started: `time.monotonic()` when the program started.
        before: seconds that earlier, interrupted parts of the run took.
        validation_seconds: of the last validation; before the first, of the one that is to come.
        first: seconds at which the first of them began to train.
    """

    total_steps: int | None
    budget: float | None
    started: float
    before: float = 0.0
    validation_seconds: float = 0.0
    validated: bool = False
    first: float = 0.0

    def elapsed(self) -> float:
        return self.before + time.monotonic() - self.started

    def begin(self) -> None:
        """Training starts now, for the first time: what start-up took is no progress."""
        if self.before == 0:
            self.first = self.elapsed()

    def progress(self, step: int) -> float:
        if self.total_steps is not None:
            return step / self.total_steps
        assert self.budget is not None
        usable = self._end_of_training(self.budget) - self.first
        return min(1.0, max(0.0, (self.elapsed() - self.first) / max(usable, 1e-3)))

    def _end_of_training(self, budget: float) -> float:
        """Seconds at which the last validation must begin."""
        return budget - WRITING_RESERVE_SECONDS - MARGIN * self.validation_seconds

    def finished(self, step: int) -> bool:
        return self.progress(step) >= 1

    def ended(self, step: int) -> bool:
        """Whether the validation that was to be the last one was; not when it took so little that much time is left."""
        return self.progress(step) >= (1 if self.budget is None else 1 - WORTH_GOING_ON)

    def foresee_validation(self, pictures: int, per_second: float, enlarged: float) -> None:
        """Guess what the first validation takes, from the speed of the training.

        A picture costs the forward share of a training step at its own size, but no less than a training picture took,
        which may have been its reading. The first steps are slow, so no guess takes more than half of the time.

        Args:
            per_second: training pictures.
            enlarged: pixels of a validation picture over those of a training picture.
        """
        if self.budget is not None and not self.validated:
            seconds = pictures / per_second * max(1.0, FORWARD_SHARE * enlarged)
            self.validation_seconds = min(seconds, self.budget / 2)

    def took_validation(self, seconds: float) -> None:
        self.validation_seconds, self.validated = seconds, True

    def allows_validation(self, since: float | None) -> bool:
        """Whether there is time to validate before the end; then a fifteenth of the time goes there at most.

        Args:
            since: seconds since the last validation; None before the first.
        """
        if self.budget is None:
            return True
        if self.elapsed() + MARGIN * self.validation_seconds >= self._end_of_training(self.budget):
            return False  # the last validation is near, and must come before the time is up
        return since is None or since * VALIDATION_SHARE >= self.validation_seconds

    def left(self, step: int) -> float | None:
        """Seconds until the end, estimated from the progress so far."""
        if self.budget is not None:
            return max(0.0, self.budget - self.elapsed())
        done = self.progress(step)
        return self.elapsed() * (1 - done) / done if done > 0 else None
