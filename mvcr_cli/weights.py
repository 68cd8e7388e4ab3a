"""Pretrained ImageNet trunks: where they come from, and a cache that never hands out a file it did not check.

Two files a trunk lie in `paths.cache_dir()/weights`: the safetensors file, and beside it a JSON record (`Pin`) of the
commit and SHA-256 that the hub gave at the first download. Every later load hashes the file against that record,
and every later download asks for that commit.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO

from mvcr_cli.config import check_preset
from mvcr_cli.errors import MvcrError, NotPermitted, Unavailable, UsageError, WriteFailed
from mvcr_cli.hub import OTHER_WEIGHTS, Pin, Source, address_of_hub, ask, fetch, is_exact, server, unavailable
from mvcr_cli.paths import cache_dir, display_name, write_error, write_json

_NO_CACHE = "set MVCR_HOME to a folder that you may write and that has space, or use --weights none"

# "main" and no digest in the source: the commit and the SHA-256 could not be looked up when this table was written, and
# an invented pin would be worse than none. So the first download on a machine takes what the hub says over TLS and
# records it. To pin for everybody, put the 40-digit commit here.
SOURCES = {
    "mvcr18": Source("timm/resnet18.a1_in1k", "model.safetensors", "main"),
    "mvcr34": Source("timm/resnet34.a1_in1k", "model.safetensors", "main"),
    "mvcr50": Source("timm/resnet50.a1_in1k", "model.safetensors", "main"),
    "resnet18": Source("timm/resnet18.a1_in1k", "model.safetensors", "main"),
    "resnet34": Source("timm/resnet34.a1_in1k", "model.safetensors", "main"),
    "resnet50": Source("timm/resnet50.a1_in1k", "model.safetensors", "main"),
}


def _silent(text: str) -> None:
    pass


def pretrained(model: str, *, offline: bool = False, say: Callable[[str], None] = _silent) -> Path:
    """The checked safetensors file of the ImageNet trunk for `model`, downloaded when it is not in the cache.

    Args:
        model: preset name.
        offline: open no socket; `MVCR_OFFLINE=1` and `HF_HUB_OFFLINE=1` mean the same.
        say: takes one plain line, for stderr.

    Raises:
        UsageError: the model has no pretrained trunk, or `HF_ENDPOINT` is no address.
        Unavailable: not in the cache, or damaged there, and the hub cannot be reached or sends something else.
        WriteFailed, NotPermitted, CannotCreate: the cache cannot be written or read.
    """
    check_preset(model)
    source = SOURCES.get(model)
    if source is None:
        hint = f"models with them: {', '.join(SOURCES)}; or train from scratch with --weights none"
        raise UsageError(f"there are no pretrained weights for {model}", hint)
    path = _path(source)
    fault = _fault(path, _read_pin(path, source))
    if not fault:
        return path
    if offline or _is_on("MVCR_OFFLINE") or _is_on("HF_HUB_OFFLINE"):
        hint = f"run it once without --offline, MVCR_OFFLINE and HF_HUB_OFFLINE; or {OTHER_WEIGHTS}"
        raise Unavailable(f"the weights {source.repo} {fault}, and the network is off: {display_name(path)}", hint)
    endpoint = address_of_hub()
    with _alone(path, say):
        pin = _read_pin(path, source)
        if _fault(path, pin):
            _renew(path, source, pin, endpoint, say)
    return path


def _path(source: Source) -> Path:
    return cache_dir() / "weights" / f"{source.repo.rpartition('/')[2]}.safetensors"


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "on", "yes", "true")


def _read_pin(path: Path, source: Source) -> Pin | None:
    try:
        pin = Pin(**json.loads(path.with_suffix(".json").read_bytes()))
        good = (pin.repo, pin.filename) == (source.repo, source.filename) and is_exact(pin)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return pin if good else None


def _fault(path: Path, pin: Pin | None) -> str:
    """Why the cached file cannot be used; empty when it is, byte for byte, what was pinned."""
    try:
        if not path.is_file():
            return "are not in the cache"
        digest = _sha256(path)
    except PermissionError:
        raise NotPermitted(f"cannot read {display_name(path)}: permission denied", _NO_CACHE) from None
    except OSError as error:
        return f"cannot be read ({os.strerror(error.errno or 0)})"
    if pin is None:
        return f"have no valid record of their SHA-256 in {display_name(path.with_suffix('.json').name)}"
    return "" if digest == pin.sha256 else "are damaged: their SHA-256 is not the recorded one"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _alone(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of `path`, so that of several starters one downloads; the system frees it when a process dies."""
    with _open_lock(path) as lock:
        # Some network file systems have no locks. Then each starter downloads, to a file of its own.
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"waiting for another process that downloads {display_name(path.name)}")
                fcntl.flock(lock, fcntl.LOCK_EX)
            for leftover in path.parent.glob(f".{path.name}.*.tmp"):
                leftover.unlink()
        yield


def _open_lock(path: Path) -> IO[bytes]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path.with_name(f".{path.name}.lock"), "ab")
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError, size: int = 0) -> MvcrError:
    told = write_error(path, error, size)
    return type(told)(told.message, _NO_CACHE)


def _renew(path: Path, source: Source, pin: Pin | None, endpoint: str, say: Callable[[str], None]) -> None:
    """Make `path` and its record agree with the hub; a file that does not is moved to `.damaged`."""
    wanted = ask(source, pin, endpoint)
    if os.path.lexists(path):
        fault = _fault(path, wanted)
        if not fault:
            write_json(path.with_suffix(".json"), asdict(wanted))
            return
        aside = path.with_name(f"{path.name}.damaged")
        try:
            os.replace(path, aside)
        except OSError as error:
            raise _cannot_write(path, error) from error
        say(f"the weights {source.repo} {fault}; moved to {display_name(aside)}")
    say(f"downloading {source.repo} from {server(endpoint)} ({wanted.size / 1e6:.1f} MB)")
    _download(path, wanted, endpoint)


def _download(path: Path, pin: Pin, endpoint: str) -> None:
    """Fetch the pinned bytes to a temporary file, check them, and give them their name."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        if shutil.disk_usage(path.parent).free < pin.size:
            raise WriteFailed(f"no space for {pin.size:,} bytes at {display_name(path)}", _NO_CACHE)
        with open(temporary, "xb") as file:
            fetch(file, pin, endpoint)
            file.flush()
            os.fsync(file.fileno())
        digest = _sha256(temporary)
        if digest != pin.sha256:
            raise unavailable(pin.repo, endpoint, f"it sent a file with SHA-256 {digest}, not {pin.sha256}")
        # The record first: a crash between the two leaves a record without a file, which is only "not in the cache".
        write_json(path.with_suffix(".json"), asdict(pin))
        os.replace(temporary, path)
    except OSError as error:
        raise _cannot_write(path, error, pin.size) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
