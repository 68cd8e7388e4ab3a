"""The run directory: one writer, resumable states that prove themselves, and records that survive a kill."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from mvcr_cli import __version__
from mvcr_cli.checkpoint import pack, read_bytes, unpack
from mvcr_cli.engine import RUNS
from mvcr_cli.errors import CannotCreate, CheckpointError, ConfigMismatch, InputMissing, MvcrError, RunBusy
from mvcr_cli.paths import (
    create_error,
    csv_text,
    display_name,
    make_folder,
    refuse_inside,
    to_json,
    write_error,
    write_whole,
)
from mvcr_cli.records import EpochReport, TrainReport

FORMAT_VERSION = 1  # of a run folder as a whole; config.json carries it
KEPT_STATES = 2
_META = {
    "step": int, "best": float, "best_epoch": int, "pending": bool, "elapsed": float, "records": int, "held": int,
    "scaler": dict,
}  # fmt: skip


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
        self.reading = path / ".reading"  # what is being read; left only by a process that died
        self.lock = path / ".lock"
        self._made: list[Path] = []

    @classmethod
    def numbered(cls, model: str) -> RunDirectory:
        """A new `runs/<model>-<n>`; `mkdir` decides races, so that two starters never share one.

        Raises: CannotCreate, NotPermitted or WriteFailed, as when `runs` is a file or a link to nothing.
        """
        make_folder(RUNS)
        for number in range(1, 1_000_000):
            path = RUNS / f"{model}-{number}"
            try:
                path.mkdir()
            except FileExistsError:
                continue
            except OSError as error:
                raise create_error(path, error) from error
            run = cls(path)
            run._made = [path]
            return run
        raise CannotCreate("a million runs have this name", "give one with --name")

    def is_foreign(self) -> bool:
        """The path is taken by something that is no run, and that no run was killed in before it began."""
        if not self.path.exists():
            return False
        if not self.path.is_dir():
            return True
        own = {self.lock, self.reading, self.split}
        return not self.config.exists() and any(
            path not in own and not (path.name.startswith(".") and path.suffix == ".tmp")
            for path in self.path.rglob("*")
            if not path.is_dir()
        )

    def create(self) -> None:
        for folder in (self.path, self.best.parent, self.states):
            if not folder.is_dir():
                make_folder(folder)
                self._made.append(folder)

    def _take_back(self) -> None:
        """Remove what was made for a run that has not begun; whatever else is there stays."""
        for file in (self.split, self.reading, self.lock):
            with contextlib.suppress(OSError):
                file.unlink()
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):
                folder.rmdir()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One writer a run; the lock of a killed process is gone with it. A run that does not begin leaves nothing.

        Raises: RunBusy.
        """
        try:
            descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise write_error(self.lock, error) from error
        try:
            _lock(descriptor, self.lock)
            try:
                yield
            finally:
                if not self.config.exists():
                    self._take_back()
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
        self.sweep()

    def sweep(self) -> None:
        """Remove the torn files that a killed run has left. Only for the holder of the lock."""
        for torn in self.path.rglob(".*.tmp"):
            torn.unlink(missing_ok=True)

    def has_state(self) -> bool:
        """Whether anything was saved to go on from, damaged or not."""
        return any(self.states.glob("step-*.safetensors"))

    def load_state(self, say: Callable[[str], None]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest undamaged state, or None when none was saved yet.

        Raises: CheckpointError when there are states, and every one is damaged.
        """
        states = sorted(self.states.glob("step-*.safetensors"), reverse=True)
        for path, older in itertools.zip_longest(states, states[1:]):
            try:
                raw = read_bytes(path)
                if _digest(raw) == path.stem.rsplit("-", 1)[1]:
                    tensors, meta = unpack(raw, path)
                    if all(type(meta.get(key)) is kind for key, kind in _META.items()):
                        return tensors, meta
            except CheckpointError:
                pass
            then = f"; using the state before it, {display_name(older.name)}" if older else ""
            say(f"warning: {display_name(path.name)} is damaged{then}")
        if states:
            raise CheckpointError(
                f"every state of {display_name(self.path)} is damaged",
                f"start a new run, from the kept weights if you like: --weights {display_name(self.best)}",
            )
        return None

    def write_metrics(self, records: list[dict[str, Any]]) -> None:
        """`metrics.jsonl` and `results.csv` from the epoch records."""
        write_whole(self.metrics, "".join(to_json(entry) + "\n" for entry in records))
        if records:
            header = [key for key in records[0] if key not in ("record", "schema")]
            write_whole(self.results, csv_text(header, [[entry[key] for key in header] for entry in records]))

    def note(self, entry: dict[str, Any]) -> None:
        """Add a line to `metrics.jsonl` that is no epoch, and that a resumed run drops."""
        with contextlib.suppress(MvcrError):
            before = read_bytes(self.metrics).decode("utf-8", "replace") if self.metrics.exists() else ""
            write_whole(self.metrics, before + to_json(entry) + "\n")

    def read_metrics(self, epochs: int) -> list[dict[str, Any]]:
        """The first `epochs` epoch records; what a killed run wrote beyond its last state is dropped.

        Raises: ConfigMismatch when they are not there, which no kill can bring about.
        """
        found: list[dict[str, Any]] = []
        with contextlib.suppress(InputMissing, CheckpointError, ValueError, RecursionError):
            lines = read_bytes(self.metrics).splitlines() if epochs else []
            found = [entry for entry in map(json.loads, lines[:epochs]) if _is_epoch(entry)]
        if len(found) < epochs:
            raise ConfigMismatch(
                f"{display_name(self.metrics)} does not hold the {epochs} epochs of the newest state", "start a new run"
            )
        return found

    def read_config(self) -> dict[str, Any]:
        """What a resumed run must agree with. Raises: ConfigMismatch when it is missing or damaged."""
        stored = self.read_json(self.config)
        self._check_format(stored)
        parts = {"train": dict, "start": dict, "classes": list}
        if not all(isinstance(stored.get(key), kind) for key, kind in parts.items()):
            raise ConfigMismatch(
                f"{display_name(self.config)} is no record of a run", "start a new run without --resume"
            )
        return stored

    def read_summary(self) -> TrainReport:
        """What the finished run reported, wherever it has been moved to. Raises: ConfigMismatch when it is damaged."""
        stored = self.read_json(self.summary) | {"run": str(self.path)}
        values: dict[str, Any] = {field.name: stored.get(field.name) for field in fields(TrainReport)}
        kinds = {"str": (str,), "int": (int,), "float": (int, float)}
        if not all(type(values[field.name]) in kinds[str(field.type)] for field in fields(TrainReport)):
            raise ConfigMismatch(f"{display_name(self.summary)} is no record of a finished run", "start a new run")
        return TrainReport(**values)

    def read_split(self) -> dict[str, Any]:
        """`split.json`, of this format or an older one."""
        self._check_format(self.read_json(self.config))
        return self.read_json(self.split)

    def data_folders(self) -> tuple[Path, ...]:
        """The folders that its pictures were in; those that its records do not tell are left out."""
        with contextlib.suppress(ConfigMismatch):
            settings, root = self.read_json(self.config).get("train"), self.read_json(self.split).get("root")
            given = settings if isinstance(settings, dict) else {}
            data, val, root = (
                name if isinstance(name, str) else "" for name in (given.get("data"), given.get("val"), root)
            )
            # The root is absolute, the names are as given: what is before the data's is where the run was begun.
            here = root.removesuffix(data)
            return tuple(Path(here, name) for name in (root or data, val) if name)
        return ()

    def _check_format(self, stored: dict[str, Any]) -> None:
        version = stored.get("format_version", 0)
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise ConfigMismatch(
                f"{display_name(self.path)} has run format {display_name(str(version))}, this is mvcr {__version__} with "
                f"format {FORMAT_VERSION}",
                f"it needs mvcr {display_name(str(stored.get('mvcr', 'of a later version')))} or newer",
            )

    def read_json(self, path: Path) -> dict[str, Any]:
        """Raises: ConfigMismatch when the file is missing or damaged."""
        try:
            value = json.loads(read_bytes(path))
        except (InputMissing, CheckpointError, ValueError, RecursionError) as error:
            raise ConfigMismatch(
                f"{display_name(path)} cannot be read: {error.__class__.__name__}", "start a new run without --resume"
            ) from error
        if not isinstance(value, dict):
            raise ConfigMismatch(f"{display_name(path)} is no record", "start a new run without --resume")
        return value


def refuse_in_data(run: Path | None, place: Path, what: str, option: str) -> None:
    """As `refuse_inside`, for the data folders of a run; None is one whose folder is not at hand.

    Raises: CannotCreate.
    """
    for data in () if run is None else RunDirectory(run).data_folders():
        with contextlib.suppress(ValueError):  # a damaged record may have a name that no folder can have
            refuse_inside(data, place, what, option)


def _is_epoch(entry: Any) -> bool:
    """Whether it has a number for every field of an `EpochReport` that needs one."""
    return isinstance(entry, dict) and all(
        type(entry.get(field.name)) in (int, float) or (field.name in entry and str(field.type).endswith("| None"))
        for field in fields(EpochReport)
    )


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()[:16]


def _lock(descriptor: int, lock: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: no advisory locks in the standard library
        return
    shown = display_name(lock.parent)
    busy = RunBusy(f"{shown} is being written by another mvcr train", "wait for it, or choose another --name or --run")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), os.stat(lock)):  # its run was taken back, and begun by a third
            raise busy
    except FileNotFoundError:
        raise busy from None
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise busy from None
        raise write_error(lock.parent, error) from error
