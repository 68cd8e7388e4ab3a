"""Decode files in forked children that may crash, hang or take too much memory without taking the test along.

    python decoding.py files PATH...            a child a file
    python decoding.py mutants COUNT SEED PATH...    mutated copies of these files, 200 a child

Prints one JSON line a file: outcome, CPU seconds, peak memory of the child in MiB above what it began with.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import mvcr_cli

SECONDS = 10  # of wall time a file
ADDRESS_SPACE = 4 << 30
BATCH = 200


class Outcome(NamedTuple):
    """`verdict` is "pixels", a code of `BadImage`, the name of another exception, or "signal N"."""

    verdict: str
    cpu_seconds: float
    megabytes: float


def decode(*arguments: str | Path) -> list[Outcome]:
    """The outcomes of one call of this file, in order."""
    environment = os.environ | {"PYTHONPATH": str(Path(mvcr_cli.__file__).parents[1])}
    argv = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True)
    return [Outcome(*json.loads(line)) for line in done.stdout.splitlines()]


def tally(outcomes: Iterable[Outcome]) -> Counter[str]:
    return Counter(outcome.verdict for outcome in outcomes)


def _verdict(path: str) -> str:
    from mvcr_cli.data.images import load_picture, read_size
    from mvcr_cli.errors import BadImage

    try:
        sizes = [read_size(path)]
    except BadImage:
        sizes = []
    verdicts = set()
    for at_least in (None, 100):  # as a whole, and reduced as training reads it
        try:
            picture = load_picture(path, at_least)
        except BadImage as bad:
            verdicts.add(bad.code)
        else:
            verdicts.add("pixels")
            sizes.append((picture.width, picture.height))
            if picture.image.mode != "RGB" or sizes[0] != sizes[-1]:
                return "wrong size or mode"
    return verdicts.pop() if len(verdicts) == 1 else f"disagree: {sorted(verdicts)}"


def _child(paths: Iterable[str], out: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    for path in paths:
        before = resource.getrusage(resource.RUSAGE_SELF)
        signal.alarm(SECONDS)
        try:
            verdict = _verdict(path)
        except BaseException as error:
            verdict = type(error).__name__
        signal.alarm(0)
        after = resource.getrusage(resource.RUSAGE_SELF)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        os.write(out, json.dumps([verdict, cpu, (after.ru_maxrss - before.ru_maxrss) / 1024]).encode() + b"\n")
    os._exit(0)


def _in_children(batch: list[str]) -> Iterator[list[object]]:
    """One outcome a file; the file at which a child dies has the signal as its outcome, and the next child goes on."""
    position = 0
    while position < len(batch):
        reading, writing = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(reading)
            _child(batch[position:], writing)
        os.close(writing)
        with os.fdopen(reading) as lines:
            for line in lines:
                position += 1
                yield json.loads(line)
        _, status = os.waitpid(process, 0)
        if os.WIFSIGNALED(status):
            position += 1
            yield [f"signal {os.WTERMSIG(status)}", 0.0, 0.0]


def _mutants(count: int, seed: int, seeds: list[str]) -> Iterator[list[object]]:
    from nasty import mutants

    with tempfile.TemporaryDirectory() as folder:
        data = mutants([Path(path).read_bytes() for path in seeds], count, seed)
        for start in range(0, count, BATCH):
            batch = [os.path.join(folder, str(number)) for number in range(start, min(start + BATCH, count))]
            for path in batch:
                Path(path).write_bytes(next(data))
            yield from _in_children(batch)
            for path in batch:
                os.unlink(path)


def main(kind: str, *arguments: str) -> None:
    import mvcr_cli.data.images  # noqa: F401  once, for all children

    if kind == "files":
        found = (outcome for path in arguments for outcome in _in_children([path]))
    else:
        found = _mutants(int(arguments[0]), int(arguments[1]), list(arguments[2:]))
    for outcome in found:
        print(json.dumps(outcome))


if __name__ == "__main__":
    main(*sys.argv[1:])
