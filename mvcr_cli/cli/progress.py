"""Progress bars on a terminal's stderr."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TextIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

T = TypeVar("T")
REFRESH_SECONDS = 0.5  # drawing takes as long as a small training step


class _StatusColumn(ProgressColumn):
    """What the loop has to say, or else its speed."""

    def __init__(self) -> None:
        super().__init__(Column(no_wrap=True, overflow="ellipsis"))

    def render(self, task: Task) -> Text:
        return Text(task.fields["status"] or ("" if task.speed is None else f"{task.speed:,.1f}/s"))


class Bars:
    """One line for each loop that runs; refreshed by the loop itself, so no thread is alive when workers fork."""

    def __init__(self, file: TextIO) -> None:
        self.status = ""
        self._console = Console(file=file, markup=False, highlight=False, emoji=False)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
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
    def shown(self) -> bool:
        return bool(self._progress.live.is_started)

    def track(self, items: Iterable[T], *, total: int | None, label: str) -> Iterator[T]:
        """The same items, counted."""
        task = self._progress.add_task(label, total=total, status=self.status)
        self._progress.start()
        try:
            for item in items:
                yield item
                self._progress.update(task, advance=1, status=self.status)
                if time.monotonic() - self._refreshed > REFRESH_SECONDS:
                    self._progress.start()  # it may be hidden
                    self._progress.refresh()
                    self._refreshed = time.monotonic()
        finally:
            self._progress.remove_task(task)
            if not self._progress.task_ids:
                self.stop()

    def say(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)

    def hide(self) -> None:
        """Erase the line of the bar; the next refresh draws it again."""
        self._progress.stop()

    def stop(self) -> None:
        self._progress.stop()
