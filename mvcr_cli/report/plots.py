"""The confusion matrix as a PNG, drawn with Pillow alone."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from mvcr_cli.lettering import drawable as _drawable
from mvcr_cli.lettering import load_font as _font

Counts = npt.NDArray[np.int64]
Colour = tuple[int, int, int]

INK, GREY, LINE = (15, 23, 42), (100, 116, 139), (226, 232, 240)
BLUES = ((255, 255, 255), (198, 219, 239), (107, 174, 214), (33, 113, 181), (8, 48, 107))  # ColorBrewer "Blues"
COUNTED = 20  # with more classes the cells are too small for numbers
LABELLED = 60  # with more classes the rows are too thin for names
DRAWN = 1200  # with more classes neighbours share a cell
GRID_PX = 1040  # least side of the grid
MARGIN = 56


def confusion_png(confusion: npt.ArrayLike, labels: Sequence[str]) -> bytes:
    """A picture of the confusion matrix: rows are true classes, colours are shares of the row.

    Args:
        confusion: (K, K) counts.
        labels: K class names; shown printable, shortened, and as `#12` where the built-in font has no glyph.

    Returns:
        PNG bytes without metadata, about 1500 px wide from five classes on, so that it is sharp on dense screens.
    """
    counts = np.asarray(confusion, dtype=np.int64)
    drawn = _merged(counts)
    names = [_drawable(label, number) for number, label in enumerate(labels)] if len(labels) <= LABELLED else []
    cell = max(1, -(-GRID_PX // len(drawn)) if len(drawn) > 4 else 260)
    side = cell * len(drawn)
    small = _font(int(np.clip(cell * 0.68, 13, 28)))
    strips = [_strip(name, small) for name in names]
    longest = max((strip.width for strip in strips), default=60)
    flat = max((strip.width for strip in strips), default=0) <= cell - 12
    left, top = MARGIN + 56 + longest + 16, MARGIN + 130
    foot = 16 + (small.size if flat else longest) + 106
    page = Image.new("RGB", (int(left + side + 170), int(top + side + foot)), "white")
    draw = ImageDraw.Draw(page)
    _title(draw, counts, left)
    page.paste(_grid(drawn, cell), (left, top))
    draw.rectangle((left - 1, top - 1, left + side, top + side), outline=LINE, width=2)
    if len(drawn) <= COUNTED:
        _numbers(draw, drawn, cell, left, top)
    if strips:
        _names(page, strips, cell, left, top, flat)
    else:
        _ticks(draw, len(labels), side, left, top)
    _captions(page, left + side / 2, page.height - MARGIN + 6, top + side / 2)
    _legend(page, left + side + 44, top, min(side, 360))
    out = io.BytesIO()
    page.save(out, "PNG", optimize=True)
    return out.getvalue()


def _merged(counts: Counts) -> Counts:
    """Sums of neighbouring classes, so that at most DRAWN cells stand in a row."""
    group = -(-len(counts) // DRAWN)
    if group <= 1:
        return counts
    starts = np.arange(0, len(counts), group)
    merged: Counts = np.add.reduceat(np.add.reduceat(counts, starts, axis=0), starts, axis=1)
    return merged


def _shares(counts: Counts) -> npt.NDArray[np.float64]:
    """Each row divided by its sum; rows of classes without pictures stay 0."""
    shares: npt.NDArray[np.float64] = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    return shares


def _blue(share: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """Shares in [0, 1] as colours, white to deep blue; small shares are lifted, or rare mistakes would be invisible.

    Shape: (...) -> (..., 3).
    """
    stops = np.linspace(0, 1, len(BLUES))
    channels = [np.interp(share**0.7, stops, channel) for channel in zip(*BLUES, strict=True)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def _grid(counts: Counts, cell: int) -> Image.Image:
    image = Image.fromarray(_blue(_shares(counts))).resize((cell * len(counts),) * 2, Image.Resampling.NEAREST)
    if cell >= 12:
        draw = ImageDraw.Draw(image)
        for at in range(cell, image.width, cell):
            draw.line((at, 0, at, image.width), LINE)
            draw.line((0, at, image.width, at), LINE)
    return image


def _numbers(draw: ImageDraw.ImageDraw, counts: Counts, cell: int, left: int, top: int) -> None:
    longest = max(f"{counts.max():,}", "000", key=len)
    font = _font(34)
    font = _font(max(9, int(min(34, cell * 0.42, 34 * cell * 0.8 / font.getlength(longest)))))
    for (i, j), share in np.ndenumerate(_shares(counts)):
        if not counts[i, j]:
            continue
        colour = (255, 255, 255) if share > 0.48 else INK
        centre = (left + (j + 0.5) * cell, top + (i + 0.5) * cell)
        draw.text(centre, f"{counts[i, j]:,}", colour, font, anchor="mm")


def _names(page: Image.Image, strips: Sequence[Image.Image], cell: int, left: int, top: int, flat: bool) -> None:
    bottom = top + cell * len(strips)
    for number, strip in enumerate(strips):
        middle = round((number + 0.5) * cell)
        _stamp(page, strip, left - 16 - strip.width, top + middle - strip.height // 2)
        if flat:
            _stamp(page, strip, left + middle - strip.width // 2, bottom + 12)
        else:
            upright = strip.transpose(Image.Transpose.ROTATE_90)
            _stamp(page, upright, left + middle - upright.width // 2, bottom + 16)


def _ticks(draw: ImageDraw.ImageDraw, classes: int, side: int, left: int, top: int) -> None:
    """Class numbers at round steps, where there is no room for names."""
    step = next(step for step in (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000) if classes / step <= 12)
    font = _font(22)
    for number in range(0, classes, step):
        at = (number + 0.5) * side / classes
        draw.line((left - 10, top + at, left - 3, top + at), GREY, 2)
        draw.text((left - 16, top + at), f"{number:,}", GREY, font, anchor="rm")
        draw.line((left + at, top + side + 3, left + at, top + side + 10), GREY, 2)
        draw.text((left + at, top + side + 16), f"{number:,}", GREY, font, anchor="mt")


def _title(draw: ImageDraw.ImageDraw, counts: Counts, left: int) -> None:
    total, right = int(counts.sum()), int(counts.diagonal().sum())
    line = f"{total:,} pictures · {100 * right / max(total, 1):.1f} % right"
    draw.text((left, MARGIN), "Confusion matrix", INK, _font(44), anchor="lt")
    draw.text((left, MARGIN + 66), line, GREY, _font(26), anchor="lt")


def _captions(page: Image.Image, across: float, foot: float, down: float) -> None:
    font = _font(28)
    ImageDraw.Draw(page).text((across, foot), "predicted class", GREY, font, anchor="mb")
    upright = _strip("true class", font).transpose(Image.Transpose.ROTATE_90)
    _stamp(page, upright, MARGIN, round(down - upright.height / 2), GREY)


def _legend(page: Image.Image, left: int, top: int, height: int) -> None:
    ramp = _blue(np.repeat(np.linspace(1, 0, height)[:, None], 26, axis=1))
    page.paste(Image.fromarray(ramp), (left, top))
    draw = ImageDraw.Draw(page)
    draw.rectangle((left - 1, top - 1, left + 26, top + height), outline=LINE, width=1)
    for text, at, anchor in (("100 %", 0, "lt"), ("50 %", height / 2, "lm"), ("0 %", height, "lb")):
        draw.text((left + 36, top + at), text, GREY, _font(20), anchor=anchor)
    draw.text((left, top + height + 14), "of the row", GREY, _font(20), anchor="lt")


def _strip(text: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """A mask of one line of text, cut to its width; the height depends on the font alone, so lines align."""
    ascent, descent = font.getmetrics()
    mask = Image.new("L", (max(1, round(font.getlength(text))), ascent + descent))
    ImageDraw.Draw(mask).text((0, 0), text, 255, font)
    return mask


def _stamp(page: Image.Image, mask: Image.Image, left: int, top: int, colour: Colour = INK) -> None:
    page.paste(colour, (left, top), mask)
