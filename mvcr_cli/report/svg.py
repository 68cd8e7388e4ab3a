"""Line charts and the confusion matrix as inline SVG; colours come from the page's style sheet."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from unicodedata import east_asian_width

from mvcr_cli.paths import display_name

WIDTH, HEIGHT = 430, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 12, 34
HOVERED = 200  # with more points the hover targets would cover each other
COUNTED = 20  # with more classes the cells are too small for numbers


@dataclass(frozen=True, slots=True)
class Series:
    """One line: `style` is a class of the style sheet, NaN leaves a gap, `steps` holds each value to the next x."""

    name: str
    style: str
    values: Sequence[float]
    steps: bool = False


def shown(text: str, limit: int = 200) -> str:
    """Any text as inert, printable HTML; right for element content and for quoted attributes."""
    return html.escape(display_name(text, limit), quote=True)


def line_chart(
    label: str, xs: Sequence[int], series: Sequence[Series], write: Callable[[float], str], best: int | None = None
) -> str:
    """A chart of values over epochs.

    Args:
        label: what a screen reader says.
        xs: epoch numbers, increasing.
        write: a value as text, for the axis and on hover.
        best: the epoch to mark on the last series.
    """
    finite = [value for line in series for value in line.values if math.isfinite(value)]
    ticks = _ticks(min(finite, default=0.0), max(finite, default=1.0))
    first, last = min(xs, default=0), max(xs, default=1)
    right, floor = WIDTH - RIGHT, HEIGHT - BOTTOM

    def x(epoch: float) -> float:
        return LEFT + (right - LEFT) * ((epoch - first) / (last - first) if last > first else 0.5)

    def y(value: float) -> float:
        return floor - (floor - TOP) * (value - ticks[0]) / (ticks[-1] - ticks[0])

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{shown(label)}">']
    for tick in ticks:
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{write(tick)}</text>')
    for epoch in _epoch_ticks(first, last):
        parts.append(f'<text x="{x(epoch):.1f}" y="{floor + 16}" text-anchor="middle">{epoch}</text>')
    parts.append(f'<text x="{(LEFT + right) / 2:.0f}" y="{HEIGHT - 3}" text-anchor="middle">epoch</text>')
    for line in series:
        points = [(x(e), y(v)) if math.isfinite(v) else None for e, v in zip(xs, line.values, strict=True)]
        parts.append(f'<path class="{line.style}" d="{_path(points, line.steps)}"/>')
        parts.extend(_dots(xs, line, points, write, best if line is series[-1] else None))
    return "".join([*parts, "</svg>"])


def confusion_chart(confusion: Sequence[Sequence[int]], labels: Sequence[str]) -> str:
    """The matrix for up to 60 classes: rows are true classes, opacity is the share of the row."""
    names = [shown(label, 22) for label in labels]
    cell = max(11, min(96 if len(labels) <= 4 else 64, 660 // len(labels)))
    font = min(13.0, cell * 0.72)
    longest = font * max(_ems(display_name(label, 22)) for label in labels)
    left, side = round(longest) + 34, cell * len(labels)
    flat = longest < cell - 6
    width, height = left + side + 2, side + (font + 34 if flat else longest + 42)
    parts = [
        f'<svg class="matrix" viewBox="0 0 {width} {height:.0f}" style="max-width:{width}px" '
        f'role="img" aria-label="confusion matrix" font-size="{font:.1f}">',
        f'<rect class="frame" x="{left}" y="1" width="{side}" height="{side}"/>',
    ]
    for i, (row, name) in enumerate(zip(confusion, names, strict=True)):
        middle = (i + 0.5) * cell
        parts.append(f'<text x="{left - 8}" y="{middle + 1 + font * 0.35:.1f}" text-anchor="end">{name}</text>')
        at = f"{left + middle + (0 if flat else font * 0.35):.1f} {side + (font + 6 if flat else 10):.1f}"
        turn, anchor = ("", "middle") if flat else (" rotate(-90)", "end")
        parts.append(f'<text transform="translate({at}){turn}" text-anchor="{anchor}">{name}</text>')
        parts.extend(_cells(row, i, names, cell, left))
    for k in range(1, len(labels)):
        parts.append(f'<path class="rule" d="M{left + k * cell} 1v{side}M{left} {k * cell + 1}h{side}"/>')
    captions = (
        f'<text class="caption" transform="translate(12 {side / 2:.0f}) rotate(-90)" text-anchor="middle">true</text>'
        f'<text class="caption" x="{left + side / 2:.0f}" y="{height - 6:.0f}" text-anchor="middle">predicted</text>'
    )
    return "".join([*parts, captions, "</svg>"])


def _cells(row: Sequence[int], i: int, names: Sequence[str], cell: int, left: int) -> list[str]:
    total = sum(row)
    size = min(15.0, cell * 0.36, cell * 1.35 / max(3, len(f"{max(row):,}")))
    parts = []
    for j, count in enumerate(row):
        if not count:
            continue
        share = count / total
        x, y = left + j * cell, i * cell + 1
        hover = f"<title>{names[i]} → {names[j]}: {count:,} of {total:,}</title>"
        square = f'x="{x}" y="{y}" width="{cell}" height="{cell}" fill-opacity="{0.07 + 0.93 * share**0.7:.3f}"'
        parts.append(f'<rect class="cell" {square}>{hover}</rect>')
        if len(row) <= COUNTED:
            style = "count on" if share > 0.48 else "count"
            centre = f'x="{x + cell / 2:.1f}" y="{y + cell / 2 + size * 0.36:.1f}" font-size="{size:.1f}"'
            parts.append(f'<text class="{style}" {centre} text-anchor="middle">{count:,}</text>')
    return parts


def _ems(text: str) -> float:
    """About how wide a text is, in units of its font size; there is no font to measure with."""
    return sum(1.0 if east_asian_width(c) in "WF" else 0.7 if c.isupper() or c in "mw@%" else 0.56 for c in text)


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round values that cover [low, high]."""
    span = high - low or abs(high) or 1.0
    low, high = (low, high) if high > low else (low - span / 2, high + span / 2)
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * nice for nice in (1, 2, 2.5, 5, 10) if span / (power * nice) <= 4.0001)
    return [k * step for k in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def _epoch_ticks(first: int, last: int) -> range:
    steps = (base * 10**power for power in range(19) for base in (1, 2, 5))
    step = next(step for step in steps if (last - first) / step <= 8)
    return range(first, last + 1) if step == 1 else range(-(-first // step) * step, last + 1, step)


def _path(points: Sequence[tuple[float, float] | None], steps: bool) -> str:
    commands = []
    before = None
    for point in points:
        if point is not None:
            at = f"{point[0]:.1f} {point[1]:.1f}"
            on = f"H{point[0]:.1f}V{point[1]:.1f}" if steps else f"L{at}"
            commands.append(f"M{at}" if before is None else on)
        before = point
    return "".join(commands)


def _dots(
    xs: Sequence[int],
    line: Series,
    points: Sequence[tuple[float, float] | None],
    write: Callable[[float], str],
    best: int | None,
) -> list[str]:
    """A mark on the best epoch, on a line of one point, and hover targets."""
    dots = []
    for epoch, value, point in zip(xs, line.values, points, strict=True):
        if point is None:
            continue
        at = f'cx="{point[0]:.1f}" cy="{point[1]:.1f}"'
        if epoch == best or len(xs) == 1:
            dots.append(f'<circle class="{line.style} dot" {at} r="4"/>')
        if len(xs) <= HOVERED:
            note = f"<title>{line.name}, epoch {epoch}: {write(value)}</title>"
            dots.append(f'<circle class="hover" {at} r="7">{note}</circle>')
    return dots
