"""Copies of one picture, also re-encoded or resized ones, told by small fingerprints.

A fingerprint is made of the decoded picture: a digest of its pixels, a 64-bit difference hash (brightness of
neighbouring ninths and eighths compared) and the picture itself in 16 x 16 grey values. Two pictures are alike when
their hashes differ in at most four bits and their small pictures are the same but for noise. The hash alone calls many
different pictures alike where pictures are simple, such as digits on black.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mvcr_cli.data.images import load_picture
from mvcr_cli.data.loader import ordered
from mvcr_cli.errors import BadImage
from mvcr_cli.records import Problem

HASH_BITS_APART = 4
MOST_DIFFERENT = 0.12  # rms difference of the small pictures, as a share of their contrast ...
NOISE = 0.5  # ... and in grey levels, so that almost empty pictures can be alike, too
_HASH = (8, 9)  # rows and columns whose neighbours are compared
_SMALL = (16, 16)
_WIDTH, _HEIGHT = 144, 128  # both grids divide it
_ROWS = 256  # compared with all others at once


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What tells a picture from others: equal `pixels` are equal pictures, `bits` and `small` show likeness.

    Shape: bits (64,) bool; small (256,) uint8.
    """

    pixels: str
    bits: NDArray[np.bool_]
    small: NDArray[np.uint8]


def read_fingerprints(paths: Sequence[str], workers: int) -> Iterator[Fingerprint | Problem]:
    """The fingerprint of every file, or why it cannot be decoded, in the order of `paths`; every file is decoded."""
    return (found for _, found in ordered(_read, paths, max(1, workers), 64 * max(1, workers)))


def _read(path: str) -> Fingerprint | Problem:
    try:
        picture = load_picture(path, _WIDTH)
    except BadImage as bad:
        return Problem(path=path, code=bad.code, detail=bad.detail)
    return fingerprint(picture.image, (picture.width, picture.height))


def fingerprint(image: Image.Image, size: tuple[int, int]) -> Fingerprint:
    """The fingerprint of an upright RGB picture. `size` in pixels is that of the file, should `image` be reduced."""
    digest = hashlib.sha256(repr(size).encode())
    digest.update(image.tobytes())
    grey = image.convert("L").resize((_WIDTH, _HEIGHT), Image.Resampling.BILINEAR, reducing_gap=3.0)
    values = np.asarray(grey, np.float32)
    blocks = _means(values, _HASH)  # 8 x 9
    bits = blocks[:, 1:] > blocks[:, :-1] + NOISE
    return Fingerprint(digest.hexdigest(), bits.ravel(), (_means(values, _SMALL) + 0.5).astype(np.uint8).ravel())


def _means(values: NDArray[np.float32], grid: tuple[int, int]) -> NDArray[np.float32]:
    rows, columns = grid
    height, width = values.shape
    means: NDArray[np.float32] = values.reshape(rows, height // rows, columns, width // columns).mean((1, 3))
    return means


def find_alike(prints: Sequence[Fingerprint], groups: Sequence[int]) -> list[tuple[int, int]]:
    """For every picture that is alike to one of a lower group, the pair (the likest of these, the picture).

    The work is a few matrix products whatever the pictures look like; memory is 1.3 kB a picture.
    """
    if len(set(groups)) < 2:
        return []
    order = np.asarray(groups)
    small = np.stack([print_.small for print_ in prints]).astype(np.float32)  # N x 256
    small -= small.mean(1, keepdims=True)
    contrast = np.sqrt(np.square(small).mean(1))  # N
    bits = np.stack([print_.bits for print_ in prints]).astype(np.float32) * 2 - 1  # N x 64, -1 or 1
    means = np.stack([print_.small.mean(dtype=np.float32) for print_ in prints])
    pairs = []
    for start in range(0, len(prints), _ROWS):
        rows = slice(start, start + _ROWS)
        # |a - b|² = |a|² + |b|² - 2ab, the difference of the means added
        squares = np.square(contrast[rows, None]) + np.square(contrast) - small[rows] @ small.T * (2 / small.shape[1])
        apart = np.sqrt(np.maximum(squares + np.square(means[rows, None] - means), 0))
        allowed = MOST_DIFFERENT * np.minimum(contrast[rows, None], contrast) + NOISE
        alike = (apart <= allowed) & (order[rows, None] > order)
        if not alike.any():
            continue
        alike &= bits[rows] @ bits.T >= bits.shape[1] - 2 * HASH_BITS_APART
        likest = np.where(alike, apart, np.inf).argmin(1)
        pairs += [(int(likest[row]), start + int(row)) for row in np.nonzero(alike.any(1))[0]]
    return pairs
