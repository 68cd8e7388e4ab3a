"""Progress bars on a terminal's stderr."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TextIO, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

T = TypeVar("T")
REFRESH_SECONDS = 0.5  # drawing takes as long as a small training step


class _StatusColumn(ProgressColumn):
    """What the loop has to say, or else its speed; the one column that gives way in a narrow terminal."""

    def __init__(self) -> None:
        super().__init__(Column())

    def render(self, task: Task) -> Text:
        text = task.fields["status"] or ("" if task.speed is None else f"{task.speed:,.1f}/s")
        return Text(text, no_wrap=True, overflow="ellipsis")


class _LeftColumn(TimeRemainingColumn):
    """Time left as the loop itself estimates it, or else as the speed so far says."""

    def __init__(self) -> None:
        super().__init__(compact=True, table_column=Column(no_wrap=True))

    def render(self, task: Task) -> Text:
        ends = task.fields["ends"]
        if ends is None:
            return super().render(task)
        minutes, seconds = divmod(max(0, round(ends - time.monotonic())), 60)
        clock = f"{minutes:02d}:{seconds:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
        return Text(clock, style="progress.remaining")


class Bars:
    """One line for each loop that runs; refreshed by the loop itself, so no thread is alive when workers fork."""

    def __init__(self, file: TextIO) -> None:
        self._noted: dict[str, object] = {"status": "", "ends": None}
        self._outer: TaskID | None = None  # what is noted is about this loop, and not about one inside of it
        self._console = Console(file=file, markup=False, highlight=False, emoji=False)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            BarColumn(bar_width=10, table_column=Column(no_wrap=True)),
            _LeftColumn(),
            _StatusColumn(),
            console=self._console,
            auto_refresh=False,
            transient=True,
            # With a terminal on stderr and a file on stdout these would swallow what is printed to the file.
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._refreshed = 0.0

    @property
    def width(self) -> int:
        return self._console.width

    @property
    def shown(self) -> bool:
        return bool(self._progress.live.is_started)

    def track(self, items: Iterable[T], *, total: int | None, label: str) -> Iterator[T]:
        """The same items, counted."""
        task = self._progress.add_task(label, total=total, status="", ends=None)
        outer, self._outer = self._outer, task if self._outer is None else self._outer
        self._progress.start()
        try:
            for item in items:
                yield item
                self._progress.update(task, advance=1, **(self._noted if task == self._outer else {}))  # type: ignore[arg-type]
                if time.monotonic() - self._refreshed > REFRESH_SECONDS:
                    self._progress.start()  # it may be hidden
                    self._progress.refresh()
                    self._refreshed = time.monotonic()
        finally:
            self._outer = outer
            self._progress.remove_task(task)
            if not self._progress.task_ids:
                self.stop()

    def note(self, status: str, left_seconds: float | None) -> None:
        """What to show beside the loop that runs, and when it will end."""
        self._noted = {"status": status, "ends": None if left_seconds is None else time.monotonic() + left_seconds}

    def say(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)

    def hide(self) -> None:
        """Erase the line of the bar; the next refresh draws it again."""
        self._progress.stop()

    def stop(self) -> None:
        self._progress.stop()
