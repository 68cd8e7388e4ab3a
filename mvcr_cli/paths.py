"""User directories, names made safe to show, and files that are written whole or not at all."""

from __future__ import annotations

import base64
import contextlib
import csv
import errno
import io
import json
import os
import re
import tempfile
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from mvcr_cli.errors import CannotCreate, MvcrError, NotPermitted, WriteFailed

_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
# What `json.dumps` leaves raw, and a terminal obeys or hides, or `str.splitlines` takes for the end of a line: C1
# controls, soft hyphen, zero widths, line separators, bidirectional marks, byte order mark, annotations, tags.
_STEERING = (
    "\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    "\ufeff\ufff9-\ufffb\U000e0000-\U000e007f\ud800-\udfff"
)
_STEERING_IN_JSON = re.compile(f"[{_STEERING}]")
_STEERING_IN_CSV = re.compile(f"[\x00-\x1f{_STEERING}]")


def cache_dir() -> Path:
    """Where downloads and caches live: `$MVCR_HOME`, else the platform's user cache directory."""
    home = os.environ.get("MVCR_HOME")
    return Path(home) if home else user_cache_path("mvcr")


def counted(count: int, noun: str) -> str:
    """`1 step`, `1,200 steps`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def display_name(name: str | os.PathLike[str], limit: int = 200) -> str:
    """Any path or class name as one printable line, for people.

    Controls, escapes, bidirectional overrides and bytes that are not UTF-8 are shown as escapes, so that a
    name from a stranger cannot move the cursor, colour the terminal or forge a line.
    """
    shown = []
    for char in os.fsdecode(name):
        if char == "\\":
            shown.append("\\\\")
        elif 0xDC80 <= ord(char) <= 0xDCFF:
            shown.append(f"\\x{ord(char) - 0xDC00:02x}")
        elif unicodedata.category(char) in _INVISIBLE:
            shown.append(char.encode("unicode_escape", "surrogatepass").decode())
        else:
            shown.append(char)
    line = "".join(shown)
    return line if len(line) <= limit else line[: limit // 2] + "…" + line[-limit // 2 :]


def json_path(path: str | os.PathLike[str]) -> dict[str, str]:
    """The path for a JSON record: always valid Unicode, with the exact bytes beside it when they are not UTF-8."""
    raw = os.fsencode(path)
    try:
        return {"path": raw.decode()}
    except UnicodeDecodeError:
        return {"path": raw.decode("utf-8", "backslashreplace"), "path_b64": base64.b64encode(raw).decode()}


def class_name(folder: str) -> str:
    """A folder name as a class name: valid Unicode; bytes that are not UTF-8 become `\\xNN` text."""
    return os.fsencode(folder).decode("utf-8", "backslashreplace")


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Strict JSON: NaN and infinity are refused, keys keep their order, and no text in it can steer a terminal."""
    text = json.dumps(value, allow_nan=False, ensure_ascii=False, indent=indent)
    return _STEERING_IN_JSON.sub(_json_escape, text)


def _json_escape(match: re.Match[str]) -> str:
    return json.dumps(match[0])[1:-1]


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A CSV document; cells that a spreadsheet would run as a formula get a leading apostrophe (OWASP).

    Controls and invisible characters are written as escapes; JSON is the form that loses nothing.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([_inert(cell) for cell in header])
    writer.writerows([_inert(cell) for cell in row] for row in rows)
    return out.getvalue()


def _inert(cell: Any) -> Any:
    if not isinstance(cell, str):
        return cell
    shown = _STEERING_IN_CSV.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), cell)
    return "'" + shown if cell[:1] in ("=", "+", "-", "@", "\t", "\r") else shown


def refuse_inside(data: Path, place: Path, what: str, option: str) -> None:
    """Refuse to write into a data folder, which no command changes, and where results would be taken for data.

    Args:
        what: is written, as in "the run".
        option: says where.

    Raises: CannotCreate.
    """
    if Path(os.path.realpath(place)).is_relative_to(os.path.realpath(data)):
        raise CannotCreate(
            f"{what} {display_name(place)} would be written inside the data folder", f"choose {option} outside of it"
        )


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where they are not there.

    Raises: CannotCreate, NotPermitted, WriteFailed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise create_error(folder, error) from error


def check_creatable(path: Path) -> None:
    """Refuse a file or folder to write when the nearest folder above it takes no file; nothing is left of the attempt.

    Raises: CannotCreate, NotPermitted, WriteFailed.
    """
    place = path
    while not place.is_dir() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise create_error(path, error) from error


def write_whole(path: Path, data: bytes | str) -> None:
    """Write a file so that a reader, a crash or a full disk sees the old one or the new one, never a part.

    Raises:
        WriteFailed: disk full, quota, read-only medium or any other I/O error; nothing is left behind.
        NotPermitted: the directory may not be written.
    """
    payload = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data
    # Not the process number: in a container it is the same at every start, and a killed one may have left its file.
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _fsync_directory(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise write_error(path, error, len(payload)) from error
        raise


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_whole(path, to_json(value, indent=2) + "\n")


def create_error(path: Path, error: OSError) -> MvcrError:
    """The `MvcrError` that says why `path` could not be made."""
    if error.errno == errno.ENOENT:
        return CannotCreate(f"cannot create {display_name(path)}: {os.strerror(error.errno)}", "choose another folder")
    return write_error(path, error)


def write_error(path: Path, error: OSError, size: int = 0) -> MvcrError:
    """The `MvcrError` that says why `path` could not be written."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    what = f"cannot write {size:,} bytes to {display_name(path)}" if size else f"cannot write {display_name(path)}"
    if error.errno in (errno.EACCES, errno.EPERM):
        return NotPermitted(f"{what}: {reason}", "choose a folder that you may write, with --out or --name")
    if error.errno == errno.ENOENT and path.parent.is_dir():
        return CannotCreate(f"{what}: {reason}", "choose another folder")
    if error.errno == errno.ENOENT:
        return CannotCreate(f"{what}: its folder is not there any more", "run the same command again")
    if error.errno in (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG):
        return CannotCreate(f"{what}: {reason}", "choose another name")
    return WriteFailed(
        f"{what}: {reason}", "free some space and run the same command again; what was saved before is intact"
    )


def _fsync_directory(directory: Path) -> None:
    """Make a rename last; the file itself is on the disk already."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot do this to a folder
            raise
    finally:
        os.close(descriptor)
