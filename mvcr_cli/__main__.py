"""`mvcr` and `python -m mvcr_cli` start here; nothing heavy is imported before the clock is read."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

STARTED = time.monotonic()
# Read by GNU OpenMP when torch loads. A thread that waits for its next piece of work spins for some microseconds, then sleeps.
# Without spinning, a step of a small network, which has thousands of short pieces, takes up to twice as long; without
# sleeping, waiting threads keep the cores from those that decode pictures.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command line and leave with its exit code."""
    # Where a crash in native code happened. Not on descriptor 2 itself, which is silenced while some pictures are decoded.
    with contextlib.suppress(OSError):
        faulthandler.enable(os.dup(2))
    try:
        from mvcr_cli import cli

        cli.main(argv, started=STARTED)
    except KeyboardInterrupt:
        sys.exit(130)


def start() -> NoReturn:
    """The program: `main`, and out at once, without taking apart what the system takes back anyway.

    To take torch apart would need a quarter of the time of a short command, and 100 MB.
    """
    try:
        main()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or never there
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    start()
