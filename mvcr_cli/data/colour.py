"""Any mode of Pillow as RGB of 8 bits; the policy is written at the top of `images`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mvcr_cli.errors import BadImage

WHITE = (255, 255, 255)

_BAND_PIXELS = 1 << 22  # grey is stretched in bands, so that float64 copies of a large picture never exist


def to_rgb(image: Image.Image, grey: tuple[float, float] | None = None) -> Image.Image:
    """The decoded picture, or a piece of it, as RGB.

    Args:
        grey: what `grey_range` says of the whole picture; needed for a piece.
    """
    if is_deep_grey(image.mode):
        values = np.asarray(image)  # (H, W)
        low, high = grey or grey_range(image.mode, *extremes(values))
        return Image.fromarray(_stretch(values, low, high)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        page = Image.new("RGB", image.size, WHITE)
        page.paste(rgba, mask=rgba)
        return page
    return image if image.mode == "RGB" else image.convert("RGB")  # convert() would copy, 1.6 GB at 400 megapixels


def is_deep_grey(mode: str) -> bool:
    """Whether a mode of Pillow is grey of 16 bits or more."""
    return mode in ("I", "F") or mode.startswith("I;16")


def extremes(values: NDArray[Any]) -> tuple[float, float]:
    with np.errstate(all="ignore"):  # of NaN
        return float(values.min()), float(values.max())


def grey_range(mode: str, least: float, most: float) -> tuple[float, float]:
    """What becomes black and white in a deep grey picture with these extreme values. Raises: BadImage, nonfinite."""
    if not (math.isfinite(least) and math.isfinite(most)):
        raise BadImage("nonfinite", "pixels that are NaN or infinite")
    if mode.startswith("I;16"):
        return 0.0, 65535.0
    if mode == "I":
        return 0.0, 65535.0 if most > 255 else 255.0
    if least >= 0 and most <= 255:
        return 0.0, 1.0 if most <= 1 else 255.0
    return least, most


def _stretch(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """`low`..`high` as 0..255, rounded half up and clipped. Shape: (H, W) -> (H, W)."""
    height, width = values.shape
    scale = 255.0 / (high - low) if high > low else 0.0
    out = np.empty((height, width), np.uint8)
    rows = max(1, _BAND_PIXELS // width)
    for top in range(0, height, rows):
        band = values[top : top + rows].astype(np.float64)
        out[top : top + rows] = ((band - low) * scale + 0.5).clip(0, 255)
    return out
