"""Silences what Pillow and libtiff say behind our back, for several threads at once."""

from __future__ import annotations

import os
import re
import threading
import warnings
from types import TracebackType
from typing import Any

_PILLOW_FILTER: Any = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
_FILTER_LOCK = threading.Lock()


def mute_pillow() -> None:
    """Ignore Pillow's warnings for good, so that `-W error` decodes the same files to the same pixels.

    `warnings.catch_warnings` would swap global state under the other threads.
    """
    with _FILTER_LOCK:
        if not warnings.filters or warnings.filters[0] != _PILLOW_FILTER:
            warnings.filterwarnings("ignore", module=r"PIL\.")


class QuietStderr:
    """Sends file descriptor 2 to nowhere while any thread is inside: libtiff writes there past `sys.stderr`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._saved: int | None = None

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._saved = _silence_stderr()
            self._inside += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._saved is not None:
                os.dup2(self._saved, 2)
                os.close(self._saved)
                self._saved = None


def _silence_stderr() -> int | None:
    """Redirect descriptor 2; returns a copy of the old one, or None when there is none or no descriptor is free."""
    try:
        saved = os.dup(2)
    except OSError:
        return None
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
    except OSError:
        os.close(saved)
        return None
    os.dup2(nowhere, 2)
    os.close(nowhere)
    return saved


quiet_stderr = QuietStderr()  # one for the process: it has one descriptor 2
