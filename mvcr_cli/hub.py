"""The Hugging Face hub, asked with short time-outs: which commit and SHA-256 a file has, and then its bytes.

Not by `hf_hub_download`: when a server stalls, that one tries six times, a minute each.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import IO, TypeVar
from urllib.parse import urlsplit

from mvcr_cli.errors import Unavailable, UsageError
from mvcr_cli.paths import display_name

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 10.0  # for the whole first answer, name look-up included
STALL_SECONDS = 10.0  # the longest silence inside a download
SLOWEST_BYTES_PER_SECOND = 1000  # below this for STALL_SECONDS, a download counts as stalled
TRIES = 3  # connections for one body; each goes on where the one before was cut, as long as that brings more

OTHER_WEIGHTS = "train from scratch with --weights none, or name a file with --weights PATH"
_NO_DOWNLOAD = f"{OTHER_WEIGHTS}, or set HF_ENDPOINT to a mirror of the hub that you can reach"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Source:
    repo: str
    filename: str
    revision: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """What the hub said at the first download: the commit (40 hex digits), the SHA-256 (64) and the size in bytes."""

    repo: str
    filename: str
    revision: str
    sha256: str
    size: int


def is_exact(pin: Pin) -> bool:
    hexadecimal = re.fullmatch("[0-9a-f]{40}", pin.revision) and re.fullmatch("[0-9a-f]{64}", pin.sha256)
    return bool(hexadecimal) and pin.size > 0


def address_of_hub() -> str:
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


def ask(source: Source, pin: Pin | None, endpoint: str) -> Pin:
    """What the hub has: at the pinned commit when there is a pin, else at the source's revision."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    # Otherwise the user agent tells the torch version and the shell's tools, after one more request to learn which.
    constants.HF_HUB_DISABLE_TELEMETRY = True
    revision = pin.revision if pin else source.revision
    url = hf_hub_url(source.repo, source.filename, revision=revision, endpoint=endpoint)
    try:
        answer = _within(
            ANSWER_SECONDS, lambda: get_hf_file_metadata(url, token=False, timeout=CONNECT_SECONDS, endpoint=endpoint)
        )
    except Exception as error:
        # httpx's errors, OSError, ValueError (proxy), ImportError (SOCKS), ssl.SSLError: each means "no weights".
        raise unavailable(source.repo, endpoint, _reason(error)) from error
    found = Pin(repo=source.repo, filename=source.filename, revision=answer.commit_hash or "",
                sha256=answer.etag or "", size=answer.size or 0)  # fmt: skip
    if not is_exact(found):
        raise unavailable(source.repo, endpoint, "it does not answer like a hub (a proxy or a login page?)")
    if pin and pin.sha256 != found.sha256:
        raise unavailable(source.repo, endpoint, "it has other weights than at the first download")
    return found


def _within(seconds: float, get: Callable[[], T]) -> T:
    """The result of `get`, or TimeoutError. A thread, because a name look-up has no time-out of its own."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(get())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return future.result(seconds)
    except TimeoutError:
        raise TimeoutError(f"no answer within {seconds:g} seconds") from None


def fetch(file: IO[bytes], pin: Pin, endpoint: str) -> None:
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
    raise unavailable(pin.repo, endpoint, f"{reason}, after {file.tell():,} of {pin.size:,} bytes")


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


def server(endpoint: str) -> str:
    """The address without a user name and password, which people do put there."""
    parts = urlsplit(endpoint)
    return display_name(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}")


def unavailable(repo: str, endpoint: str, reason: str) -> Unavailable:
    return Unavailable(f"the weights {repo} cannot be downloaded from {server(endpoint)}: {reason}", _NO_DOWNLOAD)
