"""The run directory: one writer, resumable states that prove themselves, and records that survive a kill."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from mvcr_cli.checkpoint import pack, read_bytes, unpack
from mvcr_cli.engine import RUNS
from mvcr_cli.errors import CannotCreate, CheckpointError, ConfigMismatch, RunBusy
from mvcr_cli.paths import csv_text, display_name, to_json, write_error, write_whole

KEPT_STATES = 2


class RunDirectory:
    """`runs/<name>/` and the names of what is in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.split = path / "split.json"
        self.metrics = path / "metrics.jsonl"
        self.results = path / "results.csv"
        self.summary = path / "summary.json"
        self.evaluation = path / "eval.json"
        self.best = path / "weights" / "best.safetensors"
        self.last = path / "weights" / "last.safetensors"
        self.states = path / "state"

    @classmethod
    def numbered(cls, model: str) -> RunDirectory:
        """A new `runs/<model>-<n>`; `mkdir` decides races, so that two starters never share one."""
        for number in range(1, 1_000_000):
            path = RUNS / f"{model}-{number}"
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                continue
            except OSError as error:
                raise write_error(path, error) from error
            return cls(path)
        raise CannotCreate("a million runs have this name", "give one with --name")

    def is_foreign(self) -> bool:
        """The path is taken by something that is no run."""
        if not self.path.exists():
            return False
        own = {".lock", "weights", "state"}
        return not self.path.is_dir() or (
            not self.config.exists() and any(entry.name not in own for entry in self.path.iterdir())
        )

    def create(self) -> None:
        try:
            for folder in (self.path, self.best.parent, self.states):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(self.path, error) from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One writer a run; the lock of a killed process is gone with it.

        Raises: RunBusy.
        """
        try:
            descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise write_error(self.path / ".lock", error) from error
        try:
            _lock(descriptor, self.path)
            yield
        finally:
            os.close(descriptor)

    def save_state(self, step: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """One resumable state; its name carries the digest of its bytes, so that a damaged one is noticed."""
        raw = pack(tensors, {**meta, "step": step})
        newest = self.states / f"step-{step:08d}-{_digest(raw)}.safetensors"
        write_whole(newest, raw)
        for other in self.states.glob(f"step-{step:08d}-*.safetensors"):  # damaged, or from before the validation
            if other != newest:
                other.unlink(missing_ok=True)
        for old in sorted(self.states.glob("step-*.safetensors"))[:-KEPT_STATES]:
            old.unlink(missing_ok=True)
        for torn in self.path.rglob(".*.tmp"):  # left by a killed run; this process holds the lock
            torn.unlink(missing_ok=True)

    def load_state(self, say: Callable[[str], None]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest undamaged state, or None when there is none."""
        for path in sorted(self.states.glob("step-*.safetensors"), reverse=True):
            try:
                raw = read_bytes(path)
                if _digest(raw) == path.stem.rsplit("-", 1)[1]:
                    return unpack(raw, path)
            except CheckpointError:
                pass
            say(f"warning: {display_name(path.name)} is damaged; using the state before it")
        return None

    def write_metrics(self, records: list[dict[str, Any]]) -> None:
        """`metrics.jsonl` and `results.csv` from the epoch records."""
        write_whole(self.metrics, "".join(to_json(entry) + "\n" for entry in records))
        if records:
            header = [key for key in records[0] if key not in ("record", "schema")]
            write_whole(self.results, csv_text(header, [[entry[key] for key in header] for entry in records]))

    def read_metrics(self, epochs: int) -> list[dict[str, Any]]:
        """The first `epochs` epoch records; what a killed run wrote beyond its last state is dropped."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            lines = self.metrics.read_text("utf-8").splitlines()
            return [json.loads(line) for line in lines][:epochs]
        return []

    def read_config(self) -> dict[str, Any]:
        """What a resumed run must agree with. Raises: ConfigMismatch when it is missing or damaged."""
        stored = self.read_json(self.config)
        parts = {"train": dict, "start": dict, "classes": list}
        if not all(isinstance(stored.get(key), kind) for key, kind in parts.items()):
            raise ConfigMismatch(
                f"{display_name(self.config)} is no record of a run", "start a new run without --resume"
            )
        return stored

    def read_json(self, path: Path) -> dict[str, Any]:
        """Raises: ConfigMismatch when the file is missing or damaged."""
        try:
            value = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigMismatch(
                f"{display_name(path)} cannot be read: {error.__class__.__name__}", "start a new run without --resume"
            ) from error
        if not isinstance(value, dict):
            raise ConfigMismatch(f"{display_name(path)} is no record", "start a new run without --resume")
        return value


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()[:16]


def _lock(descriptor: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: no advisory locks in the standard library
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise RunBusy(
                f"{display_name(path)} is being written by another mvcr train", "wait for it, or choose another --name"
            ) from None
        raise write_error(path, error) from error
