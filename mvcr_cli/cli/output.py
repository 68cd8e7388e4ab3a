"""The only file that prints: stdout is data, stderr is talk, and nothing that a stranger named can steer a terminal."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from mvcr_cli.errors import WriteFailed
from mvcr_cli.paths import display_name, to_json
from mvcr_cli.records import NO_LOSS, EpochReport, Problem, record

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from mvcr_cli.cli.progress import Bars

T = TypeVar("T")
STDIN, STDOUT, STDERR = 0, 1, 2
FILE_WIDTH = 200  # columns of a table that goes to a file
NAMES_SHOWN = 20

# Found while walking a folder, and no fault of a picture.
NO_FAULT = NO_LOSS | {"link", "outside_class", "twin_classes"}


class ReaderLeftError(Exception):
    """The reader of stdout has left."""


def one_line(text: str) -> str:
    """Text that may quote strangers, as one printable line; text that `display_name` has made is left as it is."""
    return display_name(text, limit=sys.maxsize).replace("\\\\", "\\")


def is_bad(problem: Problem) -> bool:
    """A picture that should have been used, and could not be."""
    return problem.code not in NO_FAULT


class _Talk(io.TextIOWrapper):
    """stderr; a reader that leaves, or a full disk behind a log, must not stop the work."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            super().flush()


class Output:
    """The two streams of the program.

    `open` moves the data stream to a private descriptor and points descriptor 1 at stderr, so that whatever a
    library prints becomes talk. stderr has a private descriptor, too: image decoders silence number 2 for an instant.
    """

    def __init__(self) -> None:
        _fill_closed_descriptors()
        self._talk = _Talk(
            os.fdopen(os.dup(STDERR), "wb"), encoding="utf-8", errors="backslashreplace", line_buffering=True
        )
        self._data: io.TextIOWrapper | None = None
        self._bars: Bars | None = None

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_bars()
        if self._data is not None:
            _flush_python_stdout()
            os.dup2(self._data.fileno(), STDOUT)
            with contextlib.suppress(OSError):
                self._data.close()
        with contextlib.suppress(OSError):
            self._talk.close()

    def open(self) -> None:
        """From here on stdout carries data only."""
        _flush_python_stdout()
        encoding = getattr(sys.stdout, "encoding", None) if os.isatty(STDOUT) else None
        self._data = os.fdopen(
            os.dup(STDOUT), "w", encoding=encoding or "utf-8", errors="backslashreplace", newline="\n"
        )
        os.dup2(STDERR, STDOUT)

    @property
    def data_is_terminal(self) -> bool:
        return self._data is not None and self._data.isatty()

    @property
    def data_width(self) -> int:
        """Columns of stdout."""
        assert self._data is not None
        return (os.get_terminal_size(self._data.fileno()).columns or 80) if self._data.isatty() else FILE_WIDTH

    def write(self, text: str) -> None:
        """Text for stdout, there when the call returns.

        Raises: ReaderLeftError, WriteFailed.
        """
        assert self._data is not None
        if self._bars is not None and self._bars.shown and self.data_is_terminal:
            self._bars.hide()  # else the text would go on in the line of the bar
        try:
            self._data.write(text)
            self._data.flush()
        except BrokenPipeError:
            self._discard_data()
            raise ReaderLeftError from None
        except OSError as error:
            self._discard_data()
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise WriteFailed(f"cannot write the result to stdout: {reason}", "send it to another disk") from None

    def emit(self, result: Any) -> None:
        """One record as one JSON line."""
        self.write(to_json(record(result)) + "\n")

    def show(self, renderable: RenderableType) -> None:
        """A table or text for people, on stdout."""
        console = self._data_console()
        with console.capture() as captured:
            console.print(renderable, markup=False, highlight=False, emoji=False)
        self.write(captured.get())

    def _data_console(self) -> Console:
        from rich.console import Console

        return Console(file=self._data, width=self.data_width, markup=False, highlight=False, emoji=False)

    def _discard_data(self) -> None:
        """What the buffer still holds must not fail again when it is closed."""
        assert self._data is not None
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._data.fileno())
        os.close(nowhere)

    def say(self, text: str) -> None:
        """One plain line on stderr, above a progress bar."""
        if self._bars is not None and self._bars.shown:
            self._bars.say(one_line(text))
        else:
            self._talk.write(one_line(text) + "\n")

    def error(self, message: str, hint: str = "") -> None:
        self._stop_bars()
        self._label("error", "31", message)
        for number, line in enumerate(hint.splitlines()):
            if number == 0:
                self._label("hint", "36", line)
            else:
                self._talk.write(f"      {one_line(line)}\n")

    def bug(self, error: BaseException) -> None:
        """A defect of ours: the whole traceback, without the values of variables."""
        self._stop_bars()
        for line in "".join(traceback.format_exception(error)).splitlines():
            self._talk.write(one_line(line) + "\n")
        self._label("error", "31", f"internal error: {type(error).__name__}; please report the lines above")

    def epoch(self, report: EpochReport) -> None:
        """One line an epoch; a progress bar keeps its numbers in sight."""
        from mvcr_cli.cli import tables

        if self._bars is None:
            self.say(tables.epoch_line(report))
        else:
            self._bars.note(tables.epoch_status(report), report.left_seconds)
            self.say(tables.epoch_line(report, self._bars.width))

    def problems(self, problems: Iterable[Problem]) -> None:
        """One line an error code: how many files, and the first of their names."""
        by_code: dict[str, list[str]] = defaultdict(list)
        counts: dict[str, int] = defaultdict(int)
        for problem in problems:
            counts[problem.code] += 1
            if counts[problem.code] <= NAMES_SHOWN:
                by_code[problem.code].append(display_name(problem.path))
        for code, names in sorted(by_code.items()):
            more = f" and {counts[code] - len(names):,} more" if counts[code] > len(names) else ""
            files = "file" if counts[code] == 1 else "files"
            self.say(f"{code}: {counts[code]:,} {files}: {', '.join(names)}{more}")

    def track(self, items: Iterable[T], *, total: int | None, label: str) -> Iterator[T]:
        """The same items; on a terminal, with a progress bar."""
        if not self._talk.isatty() or os.environ.get("TERM") == "dumb":
            return iter(items)
        if self._bars is None:
            from mvcr_cli.cli.progress import Bars

            self._bars = Bars(self._talk)
        return self._bars.track(items, total=total, label=one_line(label))

    def _stop_bars(self) -> None:
        if self._bars is not None:
            self._bars.stop()

    def _label(self, label: str, colour: str, text: str) -> None:
        if self._talk.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb":
            label = f"\x1b[1;{colour}m{label}:\x1b[0m"
        else:
            label += ":"
        self._talk.write(f"{label} {one_line(text)}\n")


def _flush_python_stdout() -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()


def _fill_closed_descriptors() -> None:
    """A descriptor below 3 that was closed at the start would go to the next file opened, and prints into that."""
    for descriptor in (STDIN, STDOUT, STDERR):
        try:
            os.fstat(descriptor)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != descriptor:
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
    # Python leaves None for a stream that was closed, and libraries write to it.
    sys.stdout = sys.stdout or open(STDOUT, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(STDERR, "w", closefd=False)  # noqa: SIM115
