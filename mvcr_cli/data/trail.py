"""Which pictures are being read, kept where a crash of the process does not take it along.

Decoders are native code in threads of this process. If one of them crashes there is nobody left to say at which file,
and after a kill for lack of memory neither. So every reader writes the name down before and strikes it out after, in a
file that the next process reads. The page cache keeps it; a power cut may lose it, which only costs the hint.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from mvcr_cli.paths import display_name

SLOTS = 512  # readers at the same time; any more go unrecorded
SLOT_BYTES = 4096


class Trail:
    """The file `path`, there from `open` to `close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None
        self._free = deque(range(SLOTS))
        self._lock = threading.Lock()

    def left_behind(self) -> list[str]:
        """The files, fit to be shown, that a process was reading when it died."""
        content = b""
        with contextlib.suppress(OSError):
            if self.path.is_file():  # no pipe, in a run from a stranger
                with open(self.path, "rb") as file:
                    content = file.read(SLOTS * SLOT_BYTES)
        slots = (content[start : start + SLOT_BYTES] for start in range(0, len(content), SLOT_BYTES))
        return [display_name(os.fsdecode(name)) for slot in slots if (name := slot.partition(b"\0")[0])]

    @contextlib.contextmanager
    def opened(self) -> Iterator[Trail]:
        """Without the file, because the disk is full or may not be written, nothing is noted."""
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0)
        with contextlib.suppress(OSError):
            self._file = os.open(self.path, flags, 0o644)
        try:
            yield self
        finally:
            with self._lock:  # a reader that hangs may go on later, when the number belongs to another file
                file, self._file = self._file, None
            if file is not None:
                os.close(file)
                with contextlib.suppress(OSError):
                    self.path.unlink()

    @contextlib.contextmanager
    def reading(self, path: str) -> Iterator[None]:
        try:
            slot = self._free.popleft()
        except IndexError:
            yield
            return
        self._write(slot, os.fsencode(path)[: SLOT_BYTES - 1] + b"\0")
        try:
            yield
        finally:
            self._write(slot, b"\0")
            self._free.append(slot)

    def _write(self, slot: int, content: bytes) -> None:
        with self._lock, contextlib.suppress(OSError):
            if self._file is not None:
                os.pwrite(self._file, content, slot * SLOT_BYTES)
