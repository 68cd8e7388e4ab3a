"""A process of its own for a file from a stranger: it may use little and write nothing, and gets bytes for bytes.

`Confined` starts `python -P -m mvcr_cli.SOMETHING_worker` and talks to it through two pipes; the other functions here are
for the module that runs there. A message is a length of eight bytes and that many bytes. The first one from here is the
file. An answer begins with `+` and the result, or with `-` and why there is none.

Nothing heavy is loaded here: such a process starts fast and its memory can be bounded.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterable
from typing import IO, Any, Protocol

from mvcr_cli.errors import CheckpointError
from mvcr_cli.paths import display_name

# All that the other process gets to know of this one's environment.
_ENVIRONMENT = frozenset(
    {
        "PATH",
        "LD_LIBRARY_PATH",
        "DYLD_LIBRARY_PATH",
        "SYSTEMROOT",
        "TMPDIR",
        "OMP_NUM_THREADS",
        "OMP_WAIT_POLICY",
        "GOMP_SPINCOUNT",
    }
)
ENDING_SECONDS = 1.0  # for a process that has closed its pipes


class Refused(Exception):
    """Why a file is not used, and the way out; both are for people."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)


def send(stream: IO[bytes], *messages: bytes | memoryview) -> None:
    for message in messages:
        stream.write(len(message).to_bytes(8, "little"))
        stream.write(message)
    stream.flush()


def receive(stream: IO[bytes], limit: int) -> bytes | None:
    """The next message; None at the end of the stream, or when it is longer than `limit` bytes."""
    head = stream.read(8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > limit:
        return None
    message = stream.read(length)
    return message if len(message) == length else None


# In the process


def streams() -> tuple[IO[bytes], IO[bytes]]:
    """Where messages come from and where answers go."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    return requests, answers


def refuse(answers: IO[bytes], refused: Refused) -> None:
    send(answers, b"-" + json.dumps(refused.args).encode())


def confine(memory: int) -> None:
    """From here on no files, no core dump, and `memory` bytes at most; where the system can do that."""
    with contextlib.suppress(ImportError):
        import resource

        # RLIMIT_DATA, because address space that is only reserved, as for the stacks of many threads, costs nothing.
        _limit(((resource.RLIMIT_DATA, memory), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)))


def open_nothing() -> None:
    """From here on no file, socket or pipe can be opened."""
    with contextlib.suppress(ImportError):
        import resource

        _limit(((resource.RLIMIT_NOFILE, 0),))


def start_nothing() -> None:
    """From here on, but for root, no process or thread can be started."""
    with contextlib.suppress(ImportError):
        import resource

        _limit(((resource.RLIMIT_NPROC, 0),))


def _limit(limits: Iterable[tuple[int, int]]) -> None:
    import resource

    for kind, limit in limits:
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (limit, limit))


def allow_processor_time(seconds: float) -> None:
    """So many more seconds of all threads; then the system ends the process."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        until = math.ceil(time.process_time() + seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (until, resource.getrlimit(resource.RLIMIT_CPU)[1]))


# Outside of it


class Work(Protocol):
    """The module that works there.

    Attributes:
        SECONDS: for each answer.
        LONGEST_ANSWER: in bytes.
    """

    __name__: str
    SECONDS: int
    LONGEST_ANSWER: int


class Confined:
    """The process that works on one file; it ends with this object, or with this process.

    Args:
        shown: the file's name, for messages.
        environment: what the process gets to know beside the little that it knows of this one's environment.
    """

    def __init__(self, work: Work, shown: str, **environment: str) -> None:
        self.shown, self._work, self._lock = shown, work, threading.Lock()
        self._failure: str | None = None
        known = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        # The same packages as here, and never the current folder.
        known["PYTHONPATH"] = os.pathsep.join(folder for folder in sys.path if os.path.isabs(folder))
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-B", "-m", work.__name__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=known | environment, cwd=os.sep,
            start_new_session=True,  # Ctrl-C is for this process, which then ends that one
        )  # fmt: skip
        self._ended = weakref.finalize(self, _end, self._process)

    def ask(self, *messages: bytes | memoryview) -> bytes:
        """The answer to one request.

        Raises: CheckpointError when the file is refused, takes too long, or takes its process down.
        """
        with self._lock:  # several threads may ask
            answer = self._exchange(messages)
        if not answer.startswith(b"+"):
            raise CheckpointError(*_refusal(self.shown, answer[1:]))
        return answer[1:]

    def _exchange(self, messages: Iterable[bytes | memoryview]) -> bytes:
        if self._failure is not None:  # at an earlier request
            raise CheckpointError(self._failure)
        late, process = threading.Event(), self._process

        def stop() -> None:  # does not know this object, whose end is the end of the process
            late.set()
            process.kill()

        timer = threading.Timer(self._work.SECONDS, stop)
        timer.start()
        try:
            assert process.stdin is not None and process.stdout is not None
            send(process.stdin, *messages)
            answer = receive(process.stdout, self._work.LONGEST_ANSWER)
        except OSError:  # it ended before it had read everything
            answer = None
        finally:
            timer.cancel()
        if answer is None:
            with contextlib.suppress(subprocess.TimeoutExpired):  # it may be alive, with more to say than is allowed
                process.wait(ENDING_SECONDS)
            code = process.returncode
            self._ended()
            self._failure = f"{self.shown} {self._reason(late.is_set(), code)}"
            raise CheckpointError(self._failure)
        return answer

    def _reason(self, late: bool, code: int | None) -> str:
        if late:
            return f"takes longer than {self._work.SECONDS} s; it was stopped"
        if code is None:
            return f"gives more than the {self._work.LONGEST_ANSWER >> 20} MiB that an answer may have"
        if code < 0:
            return f"took down the process that opened it: {signal.Signals(-code).name}"
        return "took down the process that opened it"


def _refusal(shown: str, answer: bytes) -> tuple[str, str]:
    try:
        message, hint = json.loads(answer)
    except (ValueError, TypeError, RecursionError):
        message, hint = "cannot be used", ""
    return f"{shown} {display_name(str(message))}", display_name(str(hint))


def _end(process: subprocess.Popen[Any]) -> None:
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):  # what was still to be written
                stream.close()
    process.kill()
    process.wait()
