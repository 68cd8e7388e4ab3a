"""A thread that reads pictures, and whose beginning is waited for with an end in sight."""

from __future__ import annotations

import _thread
import os
import threading
from collections.abc import Callable

from mvcr_cli.errors import WorkerFailed

BEGIN_SECONDS = 10.0


class ReaderThread:
    """A daemon thread. `threading.Thread.start` waits for ever for a thread that lacks the memory to begin.

    Raises: WorkerFailed when it does not begin.
    """

    def __init__(self, work: Callable[[], object]) -> None:
        self._work, self._process = work, os.getpid()
        self._began, self._ended = threading.Event(), threading.Event()
        self.ident = _thread.start_new_thread(self._run, ())
        if not self._began.wait(BEGIN_SECONDS):
            raise WorkerFailed(
                "out of memory: a thread that reads pictures could not begin", "a smaller --batch or --imgsz needs less"
            )

    def _run(self) -> None:
        self._began.set()
        try:
            self._work()
        finally:
            self._ended.set()

    def is_alive(self) -> bool:
        return self._process == os.getpid() and not self._ended.is_set()

    def join(self, seconds: float) -> None:
        if self.is_alive():  # threads do not survive a fork, and what waits for one there would wait in vain
            self._ended.wait(seconds)
