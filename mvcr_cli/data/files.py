"""Which picture files lie below a folder, and what tells one from another; nothing is decoded.

Names are sorted by their bytes, never by locale. Whatever is passed over becomes a `Problem` with the reason.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from mvcr_cli.config import MEBIBYTE
from mvcr_cli.data.images import HEIC_ADVICE, IMAGE_SUFFIXES, open_error, open_regular
from mvcr_cli.errors import BadImage, DataError, InputMissing, MvcrError, NotPermitted
from mvcr_cli.paths import display_name
from mvcr_cli.records import Problem

LAYOUTS = "expected DATA/<class>/ with pictures, or DATA/train/<class>/ with val/ and test/ beside train/"

WHOLE_BYTES = 4 * MEBIBYTE  # files up to this are hashed in full
UNCOMPRESSED_BYTES = 1 << 30
# BMP, PPM and TIFF: a small thing in a large picture changes a few bytes there, and neither the size nor what follows.
_UNCOMPRESSED = re.compile(rb"BM|P[1-7f]|II[*+]\0|MM\0[*+]", re.IGNORECASE)
READ_THREADS = 8  # for slow and remote disks
_CHUNK = 64

Identity = tuple[int, int]  # device and inode: equal for all names of one file


@dataclass(frozen=True, slots=True)
class Content:
    digest: str
    identity: Identity


def list_root(root: Path) -> list[os.DirEntry[str]]:
    """The entries of the folder that a person named, sorted.

    Raises: InputMissing, DataError for a file, or NotPermitted.
    """
    shown = display_name(root)
    try:
        return _list(os.fspath(root))
    except NotADirectoryError as error:
        raise DataError(f"{shown} is a file, not a folder of class folders", LAYOUTS) from error
    except PermissionError as error:
        raise NotPermitted(f"cannot read folder {shown}", "make it readable") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL byte, or text that no file name can be
        raise InputMissing(f"there is no folder {shown}", LAYOUTS) from error


def _list(folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: os.fsencode(entry.name))


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")


def is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino


def walk(entries: list[os.DirEntry[str]], follow_links: bool, seen: set[Identity]) -> Iterator[str | Problem]:
    """Picture paths and problems, depth first, without recursion; hidden files and folders are passed over silently.

    Args:
        seen: the folders walked so far, added to here; a link to one of them is not followed.
    """
    pending = entries[::-1]
    while pending:
        entry = pending.pop()
        if is_hidden(entry.name):
            continue
        if not is_folder(entry):
            yield suffix_problem(entry) or entry.path
            continue
        if entry.is_symlink() and not follow_links:
            yield link_problem(entry)
            continue
        try:
            folder = identity(entry.stat())
            if entry.is_symlink() and folder in seen:
                yield Problem(path=entry.path, code="link", detail="link to a folder that is read already")
                continue
            seen.add(folder)
            pending += _list(entry.path)[::-1]
        except OSError as error:
            yield _problem(entry.path, open_error(error))


def link_problem(entry: os.DirEntry[str]) -> Problem:
    return Problem(path=entry.path, code="link", detail="link to a folder, not followed")


def suffix_problem(entry: os.DirEntry[str]) -> Problem | None:
    """None when the name ends like that of a picture."""
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix in IMAGE_SUFFIXES:
        return None
    if suffix in (".heic", ".heif"):
        return Problem(path=entry.path, code="unknown_format", detail=HEIC_ADVICE)
    return Problem(path=entry.path, code="not_an_image", detail="not the suffix of a picture")


def read_contents(paths: Sequence[str]) -> Iterator[Content | Problem]:
    """The content of every file, or why it cannot be read, in the order of `paths`."""
    chunks = [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)]
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for contents in pool.map(lambda chunk: [_read_content(path) for path in chunk], chunks):
            yield from contents


def _read_content(path: str) -> Content | Problem:
    try:
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
            return Content(_digest(file, status.st_size), identity(status))
    except OSError as error:  # the medium fails while reading
        return Problem(path=path, code="corrupt", detail=os.strerror(error.errno or 0))
    except MvcrError as error:
        return _problem(path, error)


def _digest(file: BufferedReader, size: int) -> str:
    """BLAKE2b-128 of a file: of all bytes up to 4 MiB, else of its size and its first, middle and last MiB.

    Formats without compression are hashed in full up to 1 GiB.
    """
    state = hashlib.blake2b(digest_size=16)
    head = file.read(4)
    file.seek(0)
    if size <= (UNCOMPRESSED_BYTES if _UNCOMPRESSED.match(head) else WHOLE_BYTES):
        while block := file.read(MEBIBYTE):
            state.update(block)
    else:
        state.update(b"%d" % size)
        for start in (0, (size - MEBIBYTE) // 2, size - MEBIBYTE):
            file.seek(start)
            state.update(file.read(MEBIBYTE))
    return state.hexdigest()


def _problem(path: str, error: MvcrError) -> Problem:
    """The error as a `Problem` if it is about this file; raised again if it is about this process."""
    if not isinstance(error, BadImage):
        raise error
    return Problem(path=path, code=error.code, detail=error.detail)
