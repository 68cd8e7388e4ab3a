"""Real command lines without the price of importing torch each time: forked from a process that has it loaded.

Every command gets its own process, session, working folder, environment and descriptors; nothing is faked.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mvcr_cli

ROOT = Path(mvcr_cli.__file__).parents[1]
PRELOADED = (
    "engine.train",
    "engine.evaluate",
    "engine.predict",
    "engine.export",
    "engine.benchmark",
    "__main__",
    "cli.tables",
)
NOWHERE = os.devnull


@dataclass(frozen=True)
class Done:
    """How a command ended. `code` is negative after a signal, as in `subprocess`; memory in MiB, of the process."""

    code: int
    out: bytes
    err: bytes
    cpu_seconds: float
    memory: float

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.decode().split("\n")[:-1]]


class Forks:
    """Starts commands. One server process for a whole test session."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self._count = 0
        quiet = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | quiet, text=True
        )
        self._ask({})  # until everything is imported

    def close(self) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(20)
        self._server.stdout.close()

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, *argv: str, cwd: Path, stdin: str = NOWHERE, stdout: str, stderr: str,
              env: dict[str, str] | None = None, meek: bool = False) -> int:  # fmt: skip
        """Start `mvcr argv`. Returns: the process.

        Args:
            stdin, stdout, stderr: names of files, pipes or terminals.
            meek: as root, without root's right to read and write whatever the permissions say.
        """
        request = {
            "argv": argv, "cwd": str(cwd), "streams": [stdin, stdout, stderr], "env": env or {}, "meek": meek,
        }  # fmt: skip
        process = self._ask(request)
        assert isinstance(process, int), process
        return process

    def wait(self, process: int, seconds: float = 120) -> tuple[int, float, float]:
        """Exit code, CPU seconds and peak memory. Raises: TimeoutError after killing it."""
        code, cpu, memory = self._ask({"wait": process, "seconds": seconds})
        if code is None:
            raise TimeoutError(f"{process} ran for more than {seconds} s")
        return code, cpu, memory

    def run(self, *argv: str, cwd: Path, stdin: bytes | None = None, env: dict[str, str] | None = None,
            meek: bool = False, seconds: float = 120) -> Done:  # fmt: skip
        """Run to the end with both streams in files."""
        self._count += 1
        files = [str(self.scratch / f"{self._count}.{name}") for name in ("in", "out", "err")]
        Path(files[0]).write_bytes(stdin or b"")
        for name in files[1:]:
            Path(name).touch()
        start, *rest = files if stdin is not None else (NOWHERE, *files[1:])
        process = self.start(*argv, cwd=cwd, stdin=start, stdout=rest[0], stderr=rest[1], env=env, meek=meek)
        code, cpu, memory = self.wait(process, seconds)
        return Done(code, Path(rest[0]).read_bytes(), Path(rest[1]).read_bytes(), cpu, memory)

    def on_terminal(self, *argv: str, cwd: Path, columns: int = 120, streams: str = "out err",
                    env: dict[str, str] | None = None, seconds: float = 120) -> tuple[int, bytes, bytes]:  # fmt: skip
        """Run on a pseudo-terminal: exit code, what the terminal got, what went to the stream that is none.

        Args:
            streams: those that are the terminal: "out", "err" or both.
        """
        import fcntl
        import struct
        import termios
        import threading

        here, there = os.openpty()
        fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        name = os.ttyname(there)
        self._count += 1
        file = self.scratch / f"{self._count}.other"
        file.touch()
        shown: list[bytes] = []
        reader = threading.Thread(target=lambda: shown.extend(_parts(here)))
        reader.start()
        chosen = {stream: name if stream in streams.split() else str(file) for stream in ("out", "err")}
        process = self.start(*argv, cwd=cwd, stdin=name, stdout=chosen["out"], stderr=chosen["err"],
                             env={"TERM": "xterm-256color"} | (env or {}))  # fmt: skip
        code, *_ = self.wait(process, seconds)
        os.close(there)  # only now: with no process on the terminal, reading it would end
        reader.join(20)
        os.close(here)
        return code, b"".join(shown), file.read_bytes()


def _parts(descriptor: int) -> Iterator[bytes]:
    with contextlib.suppress(OSError):  # how Linux says that no process has the terminal open any more
        while part := os.read(descriptor, 65536):
            yield part


def serve() -> None:
    """Answer requests, one JSON line each, until stdin ends."""
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(nowhere, descriptor)
    for name in PRELOADED:
        importlib.import_module(f"mvcr_cli.{name}")
    for line in requests:
        request = json.loads(line)
        if "wait" in request:
            answer: Any = _wait(request["wait"], request["seconds"])
        elif request:
            answer = _fork(request, (requests.fileno(), answers.fileno(), nowhere))
        else:
            answer = "ready"
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _wait(process: int, seconds: float) -> tuple[int | None, float, float]:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status, used = os.wait4(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, used.ru_maxrss / 1024
        time.sleep(0.005)
    os.kill(process, 9)
    os.waitpid(process, 0)
    return None, 0.0, 0.0


def _become_meek() -> None:
    """Give up CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH. Another user could not read the Python of every machine."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, low words first
    if libc.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    for place in range(3):
        sets[place] &= ~0b110
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


def _fork(request: dict[str, Any], own: tuple[int, ...]) -> int:
    process = os.fork()
    if process:
        return process
    try:
        os.setsid()
        for descriptor in own:
            os.close(descriptor)
        flags = (os.O_RDONLY, os.O_WRONLY | os.O_APPEND, os.O_WRONLY | os.O_APPEND)
        for descriptor, (name, flag) in enumerate(zip(request["streams"], flags, strict=True)):
            opened = os.open(name, flag)
            os.dup2(opened, descriptor)
            os.close(opened)
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        if request["meek"] and os.geteuid() == 0:
            _become_meek()
        from mvcr_cli.__main__ import main

        main(request["argv"])
    except SystemExit as error:
        code = error.code
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        with contextlib.suppress(OSError):
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(99)
    os._exit(98)


if __name__ == "__main__":
    serve()
