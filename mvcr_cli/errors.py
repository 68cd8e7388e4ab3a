"""Every error that `mvcr` raises on purpose, and the exit code that each one means.

    MvcrError                     70  internal
    ├── UsageError                 2  an option or argument cannot be used
    ├── DataError                 65  a picture, folder or number in the data is bad
    │   ├── BadImage              65  one picture cannot be decoded; carries a code and a detail
    │   └── CheckpointError       65  a weights file, run or exported file is not what it claims
    ├── InputMissing              66  a file, folder or run does not exist
    ├── Unavailable               69  weights cannot be downloaded, or the network is off
    ├── CheckFailed               70  an export does not reproduce its run
    ├── WorkerFailed              70  out of memory, or a reader died
    ├── CannotCreate              73  an output exists already or cannot be made
    ├── WriteFailed               74  disk full, quota, read-only medium
    ├── RunBusy                   75  another process writes this run
    ├── NotPermitted              77  the file system forbids it
    └── ConfigMismatch            78  settings, versions or class lists contradict each other

The codes follow BSD `sysexits.h`. They are a public contract: tested one by one, never reused.
Ctrl-C, a closed pipe and SIGTERM end with 130, 141 and 143, as the shell expects.
"""

from __future__ import annotations

import mmap
from enum import IntEnum


class ExitCode(IntEnum):
    OK = 0
    USAGE = 2
    BAD_DATA = 65
    INPUT_MISSING = 66
    UNAVAILABLE = 69
    INTERNAL = 70
    CANNOT_CREATE = 73
    IO_FAILED = 74
    BUSY = 75
    NOT_PERMITTED = 77
    CONFIG = 78
    INTERRUPTED = 130
    PIPE_CLOSED = 141
    TERMINATED = 143


class MvcrError(Exception):
    """An expected failure: what is wrong in one sentence, and the way out.

    Args:
        message: what is wrong, with the value and where it came from.
        hint: the command or setting that helps; empty when there is none.
    """

    exit_code = ExitCode.INTERNAL

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(MvcrError):
    exit_code = ExitCode.USAGE


class DataError(MvcrError):
    exit_code = ExitCode.BAD_DATA


class BadImage(DataError):
    """One file that is no usable picture.

    `code` is one of: missing, permission, not_a_file, empty, too_large, too_many_pixels,
    unknown_format, corrupt, nonfinite, out_of_memory.
    """

    def __init__(self, code: str, detail: str = "") -> None:
        super().__init__(f"{code}: {detail}" if detail else code)
        self.code = code
        self.detail = detail

    def __reduce__(self) -> tuple[type[BadImage], tuple[str, str]]:
        return type(self), (self.code, self.detail)


class CheckpointError(DataError):
    pass


class InputMissing(MvcrError):
    exit_code = ExitCode.INPUT_MISSING


class Unavailable(MvcrError):
    exit_code = ExitCode.UNAVAILABLE


class CheckFailed(MvcrError):
    exit_code = ExitCode.INTERNAL


class WorkerFailed(MvcrError):
    exit_code = ExitCode.INTERNAL


class CannotCreate(MvcrError):
    exit_code = ExitCode.CANNOT_CREATE


class WriteFailed(MvcrError):
    exit_code = ExitCode.IO_FAILED


class RunBusy(MvcrError):
    exit_code = ExitCode.BUSY


class NotPermitted(MvcrError):
    exit_code = ExitCode.NOT_PERMITTED


class ConfigMismatch(MvcrError):
    exit_code = ExitCode.CONFIG


# torch and onnxruntime raise bare RuntimeErrors when the processor's own memory is full; these are their words for it.
_OUT_OF_MEMORY = (
    "out of memory", "allocate memory", "failed to allocate", "bad_alloc", "bad allocation", "can't start new thread",
    "could not create a memory object", "failed to map segment",
)  # fmt: skip
_SPARE_BYTES = 64 << 20  # of address space, without which no failure of a decoder is blamed on its file


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, torch or onnxruntime says that memory ran out; none of them is imported for that."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    text = str(error).lower()
    return bool(kinds & {"MemoryError", "OutOfMemoryError"}) or any(words in text for words in _OUT_OF_MEMORY)


def lacked_memory(error: Exception) -> bool:
    """Whether a decoder may have failed for lack of memory: libjpeg and zlib say of it what they say of damaged files."""
    try:
        mmap.mmap(-1, _SPARE_BYTES).close()  # nothing touches it, so it costs nothing
    except OSError:
        return True
    return is_out_of_memory(error)
