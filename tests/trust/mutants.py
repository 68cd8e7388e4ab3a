"""Mutated files, thousands of them, read in forked children: a crash, a hang or a stranger's exception is a fault."""

from __future__ import annotations

import faulthandler
import json
import os
import random
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mvcr_cli.engine import peak_rss_mb

SECONDS = 20  # that one mutant may take
STACKS = "stacks"  # file beside the mutants: where the threads of one stood that took too long
EXTREMES = (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\x80\0\0\0")


@dataclass
class Found:
    results: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    peak_mb: int = 0


def mutate(chance: random.Random, seeds: Sequence[bytes], head: int = 0) -> bytes:
    """One of the seeds with bytes changed, cut, spliced, inserted, removed or made extreme.

    Args:
        head: half of the changes fall into this many first bytes.
    """
    content = bytearray(chance.choice(seeds))
    limit = min(len(content), head) if head and chance.random() < 0.5 else len(content)
    at = chance.randrange(limit)
    match chance.choice(("bytes", "bytes", "bytes", "bytes", "cut", "cut", "splice", "insert", "remove", "extreme")):
        case "bytes":
            for _ in range(chance.choice((1, 1, 2, 4, 16, 64))):
                content[chance.randrange(limit)] = chance.randrange(256)
        case "cut":
            del content[chance.randrange(len(content)) :]
        case "splice":
            other = chance.choice(seeds)
            content[at:] = other[chance.randrange(len(other)) :]
        case "insert":
            content[at:at] = chance.randbytes(chance.randrange(1, 200))
        case "remove":
            del content[at : at + chance.randrange(1, 200)]
        case "extreme":
            content[at : at + 4] = chance.choice(EXTREMES)
    return bytes(content)


def fuzz(target: Callable[[Path], object], allowed: tuple[type[Exception], ...], make: Callable[[random.Random], bytes],
         count: int, folder: Path, *, seed: int = 1, suffix: str = ".safetensors") -> Found:  # fmt: skip
    """Give `count` files of `make` to `target`, which may return, or raise what is `allowed`."""
    found = Found()
    path = folder / f"mutant{suffix}"
    for start in range(0, count, 400):
        batch = [make(random.Random(f"{seed} {number}")) for number in range(start, min(start + 400, count))]
        done = 0
        while done < len(batch):
            lines, status = _in_child(target, allowed, batch[done:], path)
            for name, is_fault, peak in lines:
                found.results[name] += 1
                found.peak_mb = max(found.peak_mb, peak)
                if is_fault:
                    found.faults.append(_keep(folder, batch[done], name))
                done += 1
            if status and done < len(batch):
                name = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {status >> 8}"
                found.results[name] += 1
                found.faults.append(_keep(folder, batch[done], name))
                done += 1
    return found


def _keep(folder: Path, content: bytes, name: str) -> str:
    kept = folder / f"fault-{len(list(folder.glob('fault-*')))}"
    kept.write_bytes(content)
    stacks = (folder / STACKS).read_text()
    return f"{name}: {kept}\n{stacks}".rstrip()


def _in_child(target: Callable[[Path], object], allowed: tuple[type[Exception], ...], batch: Sequence[bytes],
              path: Path) -> tuple[list[tuple[str, bool, int]], int]:  # fmt: skip
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _work(target, allowed, batch, path, writer)
    os.close(writer)
    with os.fdopen(reader) as stream:
        lines = [tuple(json.loads(line)) for line in stream]
    return lines, os.waitpid(pid, 0)[1]


def _work(target: Callable[[Path], object], allowed: tuple[type[Exception], ...], batch: Sequence[bytes], path: Path,
          writer: int) -> None:  # fmt: skip
    try:
        warnings.simplefilter("ignore")
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        stacks = (path.parent / STACKS).open("a")
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            os.dup2(nowhere, descriptor)
        with os.fdopen(writer, "w", buffering=1) as stream:
            for content in batch:
                path.write_bytes(content)
                signal.alarm(SECONDS)
                faulthandler.dump_traceback_later(SECONDS - 1, file=stacks)
                name, is_fault = "accepted", False
                try:
                    target(path)
                except Exception as error:
                    name, is_fault = type(error).__name__, not isinstance(error, allowed)
                stream.write(json.dumps((name, is_fault, round(peak_rss_mb()))) + "\n")
    finally:
        os._exit(0)
