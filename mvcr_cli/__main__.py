"""`mvcr` and `python -m mvcr_cli` start here; nothing heavy is imported before the clock is read."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

STARTED = time.monotonic()
# Read by OpenMP when torch loads. Waiting threads that spin steal the cores from the threads that decode pictures, and on
# a busy machine a spinning team is much slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


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


if __name__ == "__main__":
    main()
