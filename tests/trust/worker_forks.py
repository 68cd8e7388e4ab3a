"""Confined workers without the price of importing torch each time: forked from a process of one thread that has it loaded.

A process with threads must not fork workers: a lock that another thread holds at that moment stays locked in the fork.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import mvcr_cli
from mvcr_cli import torch_worker

ROOT = Path(mvcr_cli.__file__).parents[1]


class WorkerForks:
    """The process that forks workers. It ends with the socket, so with the processes that have it open."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__], stdin=theirs, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            )  # fmt: skip
        self._socket.recv(1)  # until everything is imported

    def close(self) -> None:
        self._socket.close()
        self._process.wait(20)

    def start(self) -> Worker:
        theirs, ours = os.pipe(), os.pipe()
        socket.send_fds(self._socket, [b"!"], [theirs[0], ours[1]])
        os.close(theirs[0])
        os.close(ours[1])
        return Worker(self, int.from_bytes(self._socket.recv(8), "little"), theirs[1], ours[0])

    def wait(self, process: int) -> int:
        self._socket.sendall(process.to_bytes(8, "little"))
        return int.from_bytes(self._socket.recv(8), "little", signed=True)


class Worker:
    """A worker's process as `subprocess` would give it."""

    def __init__(self, forks: WorkerForks, pid: int, requests: int, answers: int) -> None:
        self._forks, self.pid = forks, pid
        self.returncode: int | None = None
        self.stdin, self.stdout = os.fdopen(requests, "wb"), os.fdopen(answers, "rb")

    def kill(self) -> None:
        if self.returncode is None:
            os.kill(self.pid, 9)

    def wait(self, seconds: float | None = None) -> None:
        if self.returncode is None:
            self.returncode = self._forks.wait(self.pid)


def serve(work: ModuleType) -> None:
    """Fork a worker for each pair of descriptors that comes, and wait for one whose number comes."""
    requests = socket.socket(fileno=os.dup(0))
    work.rehearse()
    requests.sendall(b"!")
    while True:
        message, descriptors, *_ = socket.recv_fds(requests, 8, 2)
        if not message:
            return
        if descriptors:
            answer = _fork(work, requests, descriptors)
        else:
            answer = os.waitstatus_to_exitcode(os.waitpid(int.from_bytes(message, "little"), 0)[1])
        requests.sendall(answer.to_bytes(8, "little", signed=True))


def _fork(work: ModuleType, requests: socket.socket, descriptors: list[int]) -> int:
    process = os.fork()
    if process == 0:
        requests.close()
        for place, descriptor in enumerate(descriptors):
            os.dup2(descriptor, place)
            os.close(descriptor)
        try:
            work.main()
        except BaseException:
            os._exit(1)
        os._exit(0)
    for descriptor in descriptors:
        os.close(descriptor)
    return process


if __name__ == "__main__":
    serve(torch_worker)
