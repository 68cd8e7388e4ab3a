"""Pictures with one small thing somewhere, and settings that look for it in tiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIDE = 320
ZOOM: dict[str, Any] = {"zoom_mode": "on", "tiles": 4, "tile_px": 32, "imgsz": 48}


def needle(shape: str, seed: int, side: int = SIDE) -> tuple[Image.Image, tuple[int, int]]:
    """A dark, noisy picture with a ring or a disc of 20 pixels somewhere, and its centre; no two tiles are the same."""
    chance = np.random.default_rng([seed, *shape.encode()])
    x, y = (int(edge) for edge in chance.integers(30, side - 30, 2))
    rows, columns = np.mgrid[:side, :side]
    distance = np.hypot(rows - y, columns - x)
    ink = (distance < 10) & ((distance > 6) | (shape == "disc"))
    pixels = np.where(ink, 240, chance.integers(0, 40, ink.shape)).astype(np.uint8)[..., None].repeat(3, 2)
    return Image.fromarray(pixels), (x, y)


def needles(root: Path, images: int = 16) -> Path:
    """`root/disc` and `root/ring` with so many pictures each."""
    for shape in ("disc", "ring"):
        (root / shape).mkdir(parents=True)
        for number in range(images):
            needle(shape, number)[0].save(root / shape / f"{number:03d}.png")
    return root
