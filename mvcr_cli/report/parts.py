"""The building blocks of the page, and how its numbers are written."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from mvcr_cli.report.svg import shown


def section(title: str, note: str, *body: str, style: str = "") -> str:
    opening = f'<section class="{style}">' if style else "<section>"
    under = f'<p class="note">{note}</p>' if note else ""
    return f"{opening}<h2>{title}</h2>{under}{''.join(body)}</section>"


def grid(tiles: Sequence[str]) -> str:
    columns = 3 if len(tiles) % 3 == 0 else 4  # never one tile alone in the last row
    return f'<div class="grid" style="--columns:{columns}">{"".join(tiles)}</div>' if tiles else ""


def tile(name: str, value: str, hint: str = "") -> str:
    return f'<div><p class="value">{value}</p><p class="name">{shown(name)}</p><p class="hint">{hint}</p></div>'


def table(head: str, rows: Sequence[str]) -> str:
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def percent(share: float | None) -> str:
    """`93.4 %`, with a narrow space that does not break; a dash where there is no number."""
    return "–" if share is None or not math.isfinite(share) else f"{100 * share:.1f}\u202f%"


def decimal(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.3f}"


def duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"


def plain(value: Any) -> str:
    """A setting as text; of paths only the last component, because a report may be sent to others."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value)) or "–"
    return re.split(r"[/\\]", str(value).rstrip("/\\"))[-1]


def finite_or(value: float | None, otherwise: float) -> float:
    return value if value is not None and math.isfinite(value) else otherwise
