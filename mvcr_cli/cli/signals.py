"""SIGTERM and Ctrl-C end the program with 143 and 130, and training asks here whether it should save and stop."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from mvcr_cli.errors import ExitCode

CODES = {"SIGINT": ExitCode.INTERRUPTED, "SIGTERM": ExitCode.TERMINATED}
Handler = Callable[[int, FrameType | None], None]
IMPORTER = "<frozen importlib._bootstrap>"  # file name of the frames that import a module


class Ending:
    """Which signal has asked the program to end, if one has.

    The exception that a signal raises may arrive as another one, or not at all: an import that it cuts short fails later
    in its own words, and what is raised in a finaliser is lost. So the signal itself is kept.
    """

    asked_by: str | None = None

    @property
    def code(self) -> ExitCode | None:
        return None if self.asked_by is None else CODES[self.asked_by]


ending = Ending()


@contextmanager
def signals_end_the_program() -> Iterator[Ending]:
    """SIGTERM and Ctrl-C become `SystemExit`, so that files are closed and the cursor comes back."""
    ending.asked_by = None
    # A shell starts background jobs with SIGINT ignored; that stays so.
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]
    with _handling(dict.fromkeys(numbers, _end(os.getpid()))):
        yield ending


class StopRequest:
    """Answers "should I stop?": None, or the name of the signal that asked.

    The signals are caught from the first question on: before it there is nothing to save, and a signal ends the
    program at once. A second signal ends it at once, too.
    """

    def __init__(self) -> None:
        self.asked_by: str | None = None
        self._owner = os.getpid()
        self._restore: list[tuple[int, signal.Handlers | Handler | int | None]] = []

    def __call__(self) -> str | None:
        self.asked_by = self.asked_by or ending.asked_by
        if not self._restore and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                # A shell starts background jobs with SIGINT ignored; that stays so.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._restore.append((number, signal.signal(number, self._note)))
        return self.asked_by

    def __enter__(self) -> StopRequest:
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._restore:
            signal.signal(number, handler)
        self._restore.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked_by is not None or os.getpid() != self._owner:
            _end(self._owner)(number, frame)
        self.asked_by = signal.Signals(number).name


def _end(owner: int) -> Handler:
    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked worker: dies as if nobody had installed anything
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        ending.asked_by = signal.Signals(number).name
        code = int(CODES[ending.asked_by])
        if _is_importing(frame):
            os._exit(code)  # an exception in the native half of an import can abort the process
        raise SystemExit(code)

    return end


def _is_importing(frame: FrameType | None) -> bool:
    """Whether a frame belongs to the import of a module; the program has nothing open then that it would lose."""
    while frame is not None:
        if frame.f_code.co_filename == IMPORTER:
            return True
        frame = frame.f_back
    return False


@contextmanager
def _handling(handlers: dict[signal.Signals, Handler]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
