"""Accuracy against object scale as a PNG, drawn with Pillow alone."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from itertools import pairwise

from PIL import Image, ImageDraw

from mvcr_cli.config import factor_text
from mvcr_cli.lettering import drawable, load_font
from mvcr_cli.records import ScaleCurve, ScaleCurveReport
from mvcr_cli.report.plots import GREY, INK, LINE, MARGIN, Colour

WIDTH, HEIGHT = 1500, 1060  # pixels; sharp on dense screens
LEFT, RIGHT, TOP, BOTTOM = MARGIN + 110, WIDTH - MARGIN - 24, MARGIN + 234, HEIGHT - MARGIN - 96
SMOOTH = 2  # lines are drawn this much larger and shrunk
RUN_CHARS = 44
# Blue and orange stay apart for colour-blind eyes and in grey print; the other run is dashed as well.
OWN, OTHER = (8, 81, 156), (217, 95, 14)

Point = tuple[float, float]  # pixels from the left and from the top


@dataclass(frozen=True)
class Axes:
    """`low` and `high` are accuracies, `first` and `last` log2 of the scale."""

    low: float
    high: float
    step: float
    first: float
    last: float

    @classmethod
    def of(cls, report: ScaleCurveReport) -> Axes:
        curves = [report.curve] + ([] if report.against is None else [report.against])
        lowest = min(point.accuracy.low for curve in curves for point in curve.points)
        step = next(step for step in (0.02, 0.05, 0.1, 0.2) if (1 - lowest) / step <= 6)
        octaves = [math.log2(point.factor) for point in report.curve.points]
        return cls(math.floor(lowest / step + 1e-9) * step, 1.0, step, octaves[0], octaves[-1])

    def place(self, octave: float, accuracy: float) -> Point:
        across = (octave - self.first) / (self.last - self.first)
        up = (accuracy - self.low) / (self.high - self.low)
        return LEFT + across * (RIGHT - LEFT), BOTTOM - up * (BOTTOM - TOP)


def scale_png(report: ScaleCurveReport) -> bytes:
    """A picture of the curve with its 95 % intervals, and of the other run's when there is one.

    Returns:
        PNG bytes without metadata; across is the scale on a log2 axis, up the accuracy.
    """
    axes = Axes.of(report)
    page = Image.new("RGB", (WIDTH, HEIGHT), "white")
    _frame(page, report, axes)
    curves = [(report.curve, OWN, False)] + ([] if report.against is None else [(report.against, OTHER, True)])
    for curve, colour, _ in curves:
        _band(page, curve, axes, colour)
    for curve, colour, dashed in reversed(curves):  # this run on top
        _line(page, curve, axes, colour, dashed)
    for row, (curve, colour, dashed) in enumerate(curves):
        _legend(page, curve, MARGIN + 112 + 46 * row, colour, dashed)
    out = io.BytesIO()
    page.save(out, "PNG", optimize=True)
    return out.getvalue()


def _frame(page: Image.Image, report: ScaleCurveReport, axes: Axes) -> None:
    """Title, rules, and what stands along the axes."""
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN), "Accuracy against object scale", INK, load_font(44), anchor="lt")
    data = drawable(report.data, 0, RUN_CHARS)
    line = f"{data} · {report.images:,} pictures · shaded: 95 % interval"
    draw.text((MARGIN, MARGIN + 62), line, GREY, load_font(26), anchor="lt")
    font = load_font(26)
    for number in range(round((axes.high - axes.low) / axes.step) + 1):
        value = axes.low + number * axes.step
        x, y = axes.place(axes.first, value)
        draw.line((LEFT, y, RIGHT, y), LINE, 2)
        draw.text((x - 18, y), f"{100 * value:.0f} %", GREY, font, anchor="rm")
    for factor in _ticks(report.curve):
        x, y = axes.place(math.log2(factor), axes.low)
        draw.line((x, TOP, x, BOTTOM), LINE, 2)
        draw.line((x, BOTTOM, x, BOTTOM + 10), GREY, 2)
        draw.text((x, y + 22), factor_text(factor), INK if factor == 1 else GREY, font, anchor="mt")
    foot = "object scale: size at which the pictures are shown; 1 is the size of the training"
    draw.text(((LEFT + RIGHT) / 2, HEIGHT - MARGIN + 6), foot, GREY, load_font(26), anchor="mb")


def _ticks(curve: ScaleCurve) -> list[float]:
    """Whole octaves; all scales where there are fewer than three."""
    factors = [point.factor for point in curve.points]
    first, last = math.ceil(math.log2(factors[0])), math.floor(math.log2(factors[-1]))
    return [2.0**octave for octave in range(first, last + 1)] if last - first >= 2 else factors


def _band(page: Image.Image, curve: ScaleCurve, axes: Axes, colour: Colour) -> None:
    octaves = [math.log2(point.factor) for point in curve.points]
    upper = [axes.place(at, point.accuracy.high) for at, point in zip(octaves, curve.points, strict=True)]
    lower = [axes.place(at, point.accuracy.low) for at, point in zip(octaves, curve.points, strict=True)]
    mask = Image.new("L", page.size)
    ImageDraw.Draw(mask).polygon(upper + lower[::-1], fill=38)
    page.paste(colour, mask=mask)


def _line(page: Image.Image, curve: ScaleCurve, axes: Axes, colour: Colour, dashed: bool) -> None:
    points = [axes.place(math.log2(point.factor), point.accuracy.value) for point in curve.points]
    _paste_smooth(page, colour, points, points, dashed)


def _paste_smooth(page: Image.Image, colour: Colour, points: list[Point], marks: list[Point], dashed: bool) -> None:
    """A line through the points and circles on the marks, drawn larger and shrunk."""
    mask = Image.new("L", (page.width * SMOOTH, page.height * SMOOTH))
    draw = ImageDraw.Draw(mask)
    for start, end in _dashes(points) if dashed else list(pairwise(points)):
        draw.line(_larger([start, end]), 255, 5 * SMOOTH)
    for x, y in _larger(marks):
        draw.circle((x, y), 9 * SMOOTH, 255)
        if dashed:
            draw.circle((x, y), 5 * SMOOTH, 0)
    page.paste(colour, mask=mask.reduce(SMOOTH))


def _larger(points: list[Point]) -> list[Point]:
    return [(x * SMOOTH, y * SMOOTH) for x, y in points]


def _dashes(points: list[Point], on: float = 20, off: float = 12) -> list[tuple[Point, Point]]:
    """The pieces of a dashed line along the points, in pixels."""
    pieces = []
    phase = 0.0  # where in a dash and its gap the next segment begins
    for (x0, y0), (x1, y1) in pairwise(points):
        length = math.hypot(x1 - x0, y1 - y0)
        at = -phase
        while at < length:
            start, end = max(at, 0.0) / length, min(at + on, length) / length
            if end > start:
                near, far = ((x0 + (x1 - x0) * part, y0 + (y1 - y0) * part) for part in (start, end))
                pieces.append((near, far))
            at += on + off
        phase = (phase + length) % (on + off)
    return pieces


def _legend(page: Image.Image, curve: ScaleCurve, top: int, colour: Colour, dashed: bool) -> None:
    """A piece of the line, the run's name and its figures."""
    middle = top + 12.0
    _paste_smooth(page, colour, [(MARGIN, middle), (MARGIN + 76, middle)], [(MARGIN + 38, middle)], dashed)
    text = (
        f"area {100 * curve.area:.1f} %   {100 * curve.accuracy_at_1:.1f} % at 1   "
        f"worst {100 * curve.worst_accuracy:.1f} % at {factor_text(curve.worst_factor)}"
    )
    words = ImageDraw.Draw(page)
    words.text((MARGIN + 96, middle), drawable(curve.run, 0, RUN_CHARS), INK, load_font(28), anchor="lm")
    words.text((RIGHT, middle), text, INK, load_font(28), anchor="rm")
