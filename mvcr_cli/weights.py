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
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TypeVar
from urllib.parse import urlsplit

from mvcr_cli.config import check_preset
from mvcr_cli.errors import MvcrError, NotPermitted, Unavailable, UsageError, WriteFailed
from mvcr_cli.paths import cache_dir, display_name, write_error, write_json

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 10.0  # for the whole first answer, name look-up included
STALL_SECONDS = 10.0  # the longest silence inside a download
SLOWEST_BYTES_PER_SECOND = 1000  # below this for STALL_SECONDS, a download counts as stalled
TRIES = 3  # connections for one body; each goes on where the one before was cut, as long as that brings more

_OTHER_WEIGHTS = "train from scratch with --weights none, or name a file with --weights PATH"
_NO_DOWNLOAD = f"{_OTHER_WEIGHTS}, or set HF_ENDPOINT to a mirror of the hub that you can reach"
_NO_CACHE = "set MVCR_HOME to a folder that you may write and that has space, or use --weights none"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Source:
    repo: str
    filename: str
    revision: str


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """What the hub said at the first download: the commit (40 hex digits), the SHA-256 (64) and the size in bytes."""

    repo: str
    filename: str
    revision: str
    sha256: str
    size: int


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
        hint = f"run it once without --offline, MVCR_OFFLINE and HF_HUB_OFFLINE; or {_OTHER_WEIGHTS}"
        raise Unavailable(f"the weights {source.repo} {fault}, and the network is off: {display_name(path)}", hint)
    endpoint = _endpoint()
    with _alone(path, say):
        pin = _read_pin(path, source)
        if _fault(path, pin):
            _renew(path, source, pin, endpoint, say)
    return path


def cached(model: str) -> Path | None:
    """The checked file of `model` when the cache has it; no network, nothing is written."""
    source = SOURCES.get(model)
    if source is None:
        return None
    path = _path(source)
    return None if _fault(path, _read_pin(path, source)) else path


def _path(source: Source) -> Path:
    return cache_dir() / "weights" / f"{source.repo.rpartition('/')[2]}.safetensors"


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "on", "yes", "true")


def _endpoint() -> str:
    """The hub's address. Read at each call: `huggingface_hub` reads `HF_ENDPOINT` only once, when it is imported."""
    address = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    try:
        parts = urlsplit(address)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        hint = "write it like https://huggingface.co, or unset it"
        raise UsageError(f"HF_ENDPOINT is {display_name(address)}: no web address", hint)
    return address


def _read_pin(path: Path, source: Source) -> Pin | None:
    try:
        pin = Pin(**json.loads(path.with_suffix(".json").read_bytes()))
        good = (pin.repo, pin.filename) == (source.repo, source.filename) and _is_exact(pin)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return pin if good else None


def _is_exact(pin: Pin) -> bool:
    hexadecimal = re.fullmatch("[0-9a-f]{40}", pin.revision) and re.fullmatch("[0-9a-f]{64}", pin.sha256)
    return bool(hexadecimal) and pin.size > 0


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
    wanted = _ask(source, pin, endpoint)
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
    say(f"downloading {source.repo} from {_server(endpoint)} ({wanted.size / 1e6:.1f} MB)")
    _download(path, wanted, endpoint)


def _ask(source: Source, pin: Pin | None, endpoint: str) -> Pin:
    """What the hub has: at the pinned commit when there is a pin, else at the source's revision."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    # Otherwise the user agent tells the torch version and the shell's tools, after one more request to learn which.
    constants.HF_HUB_DISABLE_TELEMETRY = True
    revision = pin.revision if pin else source.revision
    url = hf_hub_url(source.repo, source.filename, revision=revision, endpoint=endpoint)
    try:
        # Not `hf_hub_download`: when the server stalls, that one tries six times, a minute each.
        answer = _within(
            ANSWER_SECONDS, lambda: get_hf_file_metadata(url, token=False, timeout=CONNECT_SECONDS, endpoint=endpoint)
        )
    except Exception as error:
        # httpx's errors, OSError, ValueError (proxy), ImportError (SOCKS), ssl.SSLError: each means "no weights".
        raise _unavailable(source.repo, endpoint, _reason(error)) from error
    found = Pin(repo=source.repo, filename=source.filename, revision=answer.commit_hash or "",
                sha256=answer.etag or "", size=answer.size or 0)  # fmt: skip
    if not _is_exact(found):
        raise _unavailable(source.repo, endpoint, "it does not answer like a hub (a proxy or a login page?)")
    if pin and pin.sha256 != found.sha256:
        raise _unavailable(source.repo, endpoint, "it has other weights than at the first download")
    return found


def _within(seconds: float, ask: Callable[[], T]) -> T:
    """The result of `ask`, or TimeoutError. A thread, because a name look-up has no time-out of its own."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(ask())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return future.result(seconds)
    except TimeoutError:
        raise TimeoutError(f"no answer within {seconds:g} seconds") from None


def _download(path: Path, pin: Pin, endpoint: str) -> None:
    """Fetch the pinned bytes to a temporary file, check them, and give them their name."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        if shutil.disk_usage(path.parent).free < pin.size:
            raise WriteFailed(f"no space for {pin.size:,} bytes at {display_name(path)}", _NO_CACHE)
        with open(temporary, "xb") as file:
            _fill(file, pin, endpoint)
            file.flush()
            os.fsync(file.fileno())
        digest = _sha256(temporary)
        if digest != pin.sha256:
            raise _unavailable(pin.repo, endpoint, f"it sent a file with SHA-256 {digest}, not {pin.sha256}")
        # The record first: a crash between the two leaves a record without a file, which is only "not in the cache".
        write_json(path.with_suffix(".json"), asdict(pin))
        os.replace(temporary, path)
    except OSError as error:
        raise _cannot_write(path, error, pin.size) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _fill(file: IO[bytes], pin: Pin, endpoint: str) -> None:
    """Write the whole body to `file`, over several connections when they are cut but bring more each time."""
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(pin.repo, pin.filename, revision=pin.revision, endpoint=endpoint)
    for _ in range(TRIES):
        before = file.tell()
        reason = _receive(url, file, pin.size)
        if file.tell() == pin.size:
            return
        if file.tell() <= before or file.tell() > pin.size:
            break
    raise _unavailable(pin.repo, endpoint, f"{reason}, after {file.tell():,} of {pin.size:,} bytes")


def _receive(url: str, file: IO[bytes], size: int) -> str:
    """Add what the server sends beyond the bytes that `file` has, and say why it ended."""
    from huggingface_hub import get_session

    headers = {"User-Agent": "mvcr", "Accept-Encoding": "identity"}
    if file.tell():
        headers["Range"] = f"bytes={file.tell()}-"
    timeout = (CONNECT_SECONDS, STALL_SECONDS, STALL_SECONDS, CONNECT_SECONDS)  # connect, read, write, pool
    try:
        with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
            if response.status_code not in (200, 206):
                return f"it answered {response.status_code}"
            if response.status_code == 200:
                file.seek(0)
                file.truncate()
            began, had = time.monotonic(), file.tell()
            for chunk in response.iter_raw():
                file.write(chunk)
                if file.tell() > size:
                    return "it sent too much"
                if time.monotonic() - began > STALL_SECONDS:
                    if file.tell() - had < SLOWEST_BYTES_PER_SECOND * STALL_SECONDS:
                        return "it almost stopped sending"
                    began, had = time.monotonic(), file.tell()
    except OSError:
        raise  # the disk: what a socket raises arrives as an error of the HTTP library, which is none
    except Exception as error:
        return _reason(error)
    return "it ended the connection"


def _reason(error: BaseException) -> str:
    response = getattr(error, "response", None)
    if response is not None:
        return f"it answered {response.status_code}"
    lines = str(error).strip().splitlines()
    return display_name(lines[0] if lines else type(error).__name__)


def _server(endpoint: str) -> str:
    """The address without a user name and password, which people do put there."""
    parts = urlsplit(endpoint)
    return display_name(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}")


def _unavailable(repo: str, endpoint: str, reason: str) -> Unavailable:
    return Unavailable(f"the weights {repo} cannot be downloaded from {_server(endpoint)}: {reason}", _NO_DOWNLOAD)
