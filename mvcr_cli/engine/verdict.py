"""A picture on its way through a predictor: read, then judged."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mvcr_cli.data.tiles import Tiles
from mvcr_cli.records import Tile


@dataclass(frozen=True, slots=True)
class Ready:
    """One picture read and preprocessed; width and height of the original in pixels.

    Args:
        tiles: the candidates of a network that zooms.
        image: the picture or its glance, for an explanation only.
    """

    path: str
    width: int
    height: int
    input: NDArray[np.generic]
    tiles: Tiles | None = None
    image: Image.Image | None = None


@dataclass(slots=True)
class Parity:
    """What two predictors say of the same pictures: in how many both name one class, and the largest difference of a
    probability. Ties within float noise are equal.

    Args:
        sizes: width and height in pixels of the pictures.
    """

    same: int = 0
    difference: float = 0.0
    sizes: list[tuple[int, int]] = field(default_factory=list)

    def add(self, own: NDArray[np.float64], theirs: NDArray[np.float64], size: tuple[int, int]) -> None:
        """Shape: (K,), (K,)."""
        self.same += bool(own[theirs.argmax()] >= own.max() - 1e-6)
        self.difference = max(self.difference, float(np.abs(own - theirs).max()))
        self.sizes.append(size)


@dataclass(frozen=True, slots=True)
class Verdict:
    """One picture judged. `probabilities` (K,) sum to 1; `image` is the explanation, when one was asked for."""

    probabilities: NDArray[np.float64]
    tiles: tuple[Tile, ...] = ()
    image: Image.Image | None = None
