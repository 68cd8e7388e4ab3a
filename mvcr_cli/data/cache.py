"""What was read from picture files, in bounded memory, and which files are bad."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from typing import Generic, TypeVar

from mvcr_cli.config import MEBIBYTE
from mvcr_cli.data.trail import Trail
from mvcr_cli.errors import BadImage
from mvcr_cli.records import Problem

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class ReadCache(Generic[K, V]):
    """Values kept until the cap is reached and then no more; bad files are remembered as well.

    It never evicts: epochs visit every picture once, and under such a scan every eviction policy lowers the hit rate.
    Entries are keyed by content, so that a changed file is read again and copies are kept once.

    Args:
        megabytes: the cap, in MiB.
        trail: where to note what is being read, for the case that the decoder takes the process down.
    """

    def __init__(self, megabytes: int, trail: Trail | None = None) -> None:
        self.trail = trail
        self.cap = megabytes * MEBIBYTE
        self.used = 0
        self.problems: dict[str, Problem] = {}
        self._entries: dict[K, V] = {}
        self._lock = threading.Lock()

    def fetch(self, key: K, path: str, read: Callable[[], V], size: Callable[[V], int]) -> V | None:
        """The value of a key, read when it is not kept; None when the file is bad, which is noted in `problems`.

        Args:
            size: bytes of a value.
        """
        if (held := self._entries.get(key)) is not None:
            return held
        if path in self.problems:
            return None
        try:
            with nullcontext() if self.trail is None else self.trail.reading(path):
                value = read()
        except BadImage as bad:
            self.problems[path] = Problem(path=path, code=bad.code, detail=bad.detail)
            return None
        with self._lock:
            used = self.used + size(value)
            if key not in self._entries and used <= self.cap:
                self.used, self._entries[key] = used, value
        return value

    def clear(self) -> None:
        """Forget all values."""
        with self._lock:
            self._entries.clear()
            self.used = 0
