"""How far a run is: by steps when epochs are given, by the clock when a time is given."""

from __future__ import annotations

import time
from dataclasses import dataclass

WRITING_RESERVE_SECONDS = 3.0  # last state, weights and report
FIRST_VALIDATION_GUESS_SECONDS = 5.0


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
        first: seconds at which the first of them began to train.
    """

    total_steps: int | None
    budget: float | None
    started: float
    before: float = 0.0
    validation_seconds: float = FIRST_VALIDATION_GUESS_SECONDS
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
        usable = self.budget - WRITING_RESERVE_SECONDS - 1.2 * self.validation_seconds - self.first
        return min(1.0, max(0.0, (self.elapsed() - self.first) / max(usable, 1e-3)))

    def finished(self, step: int) -> bool:
        return self.progress(step) >= 1

    def left(self, step: int) -> float | None:
        """Seconds until the end, estimated from the progress so far."""
        if self.budget is not None:
            return max(0.0, self.budget - self.elapsed())
        done = self.progress(step)
        return self.elapsed() * (1 - done) / done if done > 0 else None
