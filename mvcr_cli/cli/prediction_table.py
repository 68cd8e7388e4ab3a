"""The table of `mvcr predict`: one line a picture, printed as soon as it is known, from 80 columns on.

What a row needs is not known before it is there, so the widths come of the terminal and of the first row alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from mvcr_cli.cli.tables import NAME_CHARACTERS, percent
from mvcr_cli.paths import display_name
from mvcr_cli.records import Label, Prediction, Problem

GAP = 2
PROBABILITY = len("probability")
SIZE = len("30000x20000")
CLASS_CELLS = 10  # of the column, where not all classes have been seen
SHARE_CELLS = len(" 12.3 %")
NEXT_FROM, SIZE_FROM = 72, 50  # columns of a terminal; in fewer, this column is left out


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionTable:
    """Widths of the columns in cells; 0 leaves a column out."""

    path: int
    label: int
    next: int
    size: int

    @classmethod
    def fitted(cls, width: int, first: Prediction | Problem, topk: int) -> PredictionTable:
        """For a terminal of `width` columns, to whose rows `first` is the first, with up to `topk` classes each."""
        known = first.topk if isinstance(first, Prediction) else ()
        longest = max((cell_len(_short_name(one.label)) for one in known), default=0)
        if len(known) >= topk or not known:  # there may be other classes
            longest = max(longest, CLASS_CELLS)
        size = SIZE if width >= SIZE_FROM else 0
        has_next = topk > 1 and width >= NEXT_FROM
        rest = width - PROBABILITY - 2 * GAP - (size + GAP if size else 0) - (GAP if has_next else 0)
        label = max(1, min(max(longest, len("class")), rest // 2 - 5))
        shown = min(topk, 3) - 1
        others = min(shown * (longest + SHARE_CELLS) + 2 * (shown - 1), (rest - label) // 2) if has_next else 0
        return cls(path=max(1, rest - label - others), label=label, next=others, size=size)

    def header(self) -> Table:
        return self._line([Text(name, style="bold") for name in ("picture", "class", "probability", "next", "size")])

    def row(self, result: Prediction | Problem) -> Table:
        path = Text(from_the_right(display_name(result.path), self.path))
        if isinstance(result, Problem):
            why = Text.assemble((display_name(result.code), "red"), "  ", display_name(result.detail))
            grid = Table.grid(padding=(0, GAP))
            grid.add_column(width=self.path, no_wrap=True)
            grid.add_column(overflow="fold")
            grid.add_row(path, why)
            return grid
        return self._line([
            path, Text(display_name(result.label)), Text(percent(result.probability), style="bold"),
            Text(_fitting(result.topk[1:3], self.next), style="dim"), Text(f"{result.width}x{result.height}"),
        ])  # fmt: skip

    def _line(self, cells: Sequence[Text]) -> Table:
        grid = Table.grid(padding=(0, GAP))
        grid.add_column(width=self.path, no_wrap=True)
        grid.add_column(width=self.label, overflow="fold")
        grid.add_column(width=PROBABILITY, justify="right", no_wrap=True)
        shown = list(cells[:3])
        if self.next:
            grid.add_column(width=self.next, no_wrap=True)
            shown.append(cells[3])
        if self.size:
            grid.add_column(width=self.size, justify="right", no_wrap=True)
            shown.append(cells[4])
        grid.add_row(*shown)
        return grid


def from_the_right(name: str, room: int) -> str:
    """The end of a path in `room` cells, from the start of a folder where the file's own name leaves that room."""
    if cell_len(name) <= room:
        return name
    end = name
    while end and cell_len(end) > room - 1:
        end = end[1:]
    return "…" + end[max(0, end.find("/")) :]


def _fitting(others: Sequence[Label], room: int) -> str:
    """As many of the runners-up as have room, the first one with its name shortened if need be."""
    shown = ""
    for other in others:
        more = f"{', ' if shown else ''}{_short_name(other.label)} {percent(other.probability)}"
        if cell_len(shown + more) > room:
            break
        shown += more
    return shown or "".join(_squeezed(other, room) for other in others[:1])


def _squeezed(other: Label, room: int) -> str:
    share = f"… {percent(other.probability)}"
    name = _short_name(other.label)
    while name and cell_len(name + share) > room:
        name = name[:-1]
    return name + share if name else ""


def _short_name(label: str) -> str:
    return display_name(label, NAME_CHARACTERS)
