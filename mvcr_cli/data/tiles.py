"""Tiles of large pictures: proposed from the maps of `search` and by a grid, or side by side where there are enough of
them to cover the picture; then cut at native resolution.

A picture is read in strips, so memory does not grow with its size. What is proposed is a function of the picture and of
the scorer alone, so tiles can be cached by content and a resumed run sees the same ones.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mvcr_cli.config import MEBIBYTE, AugmentConfig, ZoomConfig
from mvcr_cli.data.cache import ReadCache
from mvcr_cli.data.cuts import edges_repeated, within
from mvcr_cli.data.folder import Sample
from mvcr_cli.data.glance import GlanceOfStrips
from mvcr_cli.data.huge import open_huge
from mvcr_cli.data.images import HUGE_ABOVE, load_picture
from mvcr_cli.data.places import side_by_side, spread
from mvcr_cli.data.preprocess import Preprocess, grey_if_grey, image_bytes
from mvcr_cli.data.search import Finder, Picture, energies_and_scores
from mvcr_cli.data.trail import Trail
from mvcr_cli.data.turning import Box, Pixels
from mvcr_cli.models.sift import cell_px, find_peaks, local_maxima, salience
from mvcr_cli.models.zoom import TileScorer

QUIET = 0.01  # salience that counts as none
SAME = 2**-12  # scores less apart are the same
MARGIN = 4  # pixels around a tile that its random shift may show
# Bytes of candidates that a judgement may hold: an eighth of what --memory grants a training by default, which leaves a
# machine of 4 GB room for the network and for what is being decoded.
CANDIDATE_BYTES = 512 * MEBIBYTE
BATCHES_HELD = 4  # two are read in advance, one is complete, and its copy is being judged


class WholePicture:
    """A picture of ordinary size, decoded once; many times faster than the reader of large files where both apply."""

    def __init__(self, image: Image.Image) -> None:
        self._image = image
        self._pixels = np.asarray(image).reshape(image.height, image.width, -1)
        self.size = image.size

    def glance(self, side: int) -> Image.Image:
        return self._image.reduce(max(1, max(self.size) // side))

    def strips(self, rows: int, shrink: int) -> Iterator[tuple[int, Pixels]]:
        reduced = np.asarray(self._image.reduce(shrink))
        for top in range(0, reduced.shape[0], rows):
            strip = reduced[top : top + rows]
            yield top, strip.reshape(*strip.shape[:2], -1)

    def tiles(self, boxes: Sequence[Box], px: int) -> list[Pixels]:
        return [self._cut(box, px) for box in boxes]

    def _cut(self, box: Box, px: int) -> Pixels:
        """One tile, filtered where it is larger than `px`; beyond the edge the edge is repeated."""
        inner, shown = within(box, px, self.size)
        if box[2] - box[0] == px:
            left, top, right, bottom = map(round, shown)
            return edges_repeated(self._pixels[top:bottom, left:right], inner, px)
        size = inner[2] - inner[0], inner[3] - inner[1]
        image = self._image.resize(size, Image.Resampling.BILINEAR, shown)
        return edges_repeated(np.asarray(image).reshape(size[1], size[0], -1), inner, px)


@contextlib.contextmanager
def open_picture(path: str) -> Iterator[Picture]:
    """Raises: BadImage."""
    with open_huge(path) as picture:
        if picture.size[0] * picture.size[1] > HUGE_ABOVE:
            yield picture
            return
    yield WholePicture(grey_if_grey(load_picture(path).image))


@dataclass(frozen=True)
class Tiles:
    """The candidates of one picture.

    Args:
        boxes: (C, 4) left, top, right, bottom in pixels of the upright picture; only of a small one they reach over its edge.
        prior: (C,) logarithm of each tile's salience over the highest, at most 0: what SIFT's detector says; 0 where
            nothing was searched.
        pixels: (C, s, s, 1 or 3) with s = tile_px + 2 MARGIN; one channel when all of them are grey.
    """

    boxes: NDArray[np.int32]
    prior: NDArray[np.float32]
    pixels: Pixels

    @property
    def bytes(self) -> int:
        return self.boxes.nbytes + self.prior.nbytes + self.pixels.nbytes


@dataclass(frozen=True)
class TileBatch:
    """The candidates of N pictures. Shape: pixels (N, C, 3, s, s) uint8, prior (N, C) float32."""

    pixels: Tensor
    prior: Tensor

    def to(self, device: torch.device) -> TileBatch:
        return TileBatch(self.pixels.to(device, non_blocking=True), self.prior.to(device, non_blocking=True))


def stack_tiles(tiles: Sequence[Tiles]) -> TileBatch:
    """Shape: N times (C, s, s, 1 or 3)."""
    if all(found.pixels.shape[-1] == 1 for found in tiles):
        pixels = torch.from_numpy(np.stack([found.pixels for found in tiles])).expand(-1, -1, -1, -1, 3)
    else:
        coloured = [np.broadcast_to(found.pixels, (*found.pixels.shape[:3], 3)) for found in tiles]
        pixels = torch.from_numpy(np.stack(coloured))
    return TileBatch(pixels.permute(0, 1, 4, 2, 3), torch.from_numpy(np.stack([found.prior for found in tiles])))


def turned(tiles: Tiles, config: AugmentConfig, rng: random.Random) -> Tiles:
    """All tiles of a picture mirrored and turned alike, as the augmentation allows."""
    pixels = tiles.pixels
    if config.hflip and rng.random() < 0.5:
        pixels = pixels[:, :, ::-1]
    if config.vflip and rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    if config.turn:
        pixels = np.rot90(pixels, rng.randrange(4), (1, 2))
    return Tiles(tiles.boxes, tiles.prior, pixels)


class TileReader(ReadCache[str, tuple[Image.Image, Tiles]]):
    """Glances and tiles of large pictures; see `ReadCache`.

    Args:
        preprocess: of the network; the glance is read at twice its size, so that the resize that follows filters.
    """

    def __init__(self, zoom: ZoomConfig, preprocess: Preprocess, megabytes: int, trail: Trail | None = None) -> None:
        super().__init__(megabytes, trail)
        self.zoom, self.preprocess = zoom, preprocess
        self.finder: Finder | None = None

    def search_with(self, finder: Finder | None) -> None:
        """Propose with another finder from now on; what the earlier one found is forgotten."""
        self.finder = finder
        self.clear()

    def at_once(self, batch: int) -> int:
        """How many pictures to judge at once, `batch` or fewer: with those read in advance they fit `CANDIDATE_BYTES`."""
        side = self.zoom.tile_px + 2 * MARGIN
        picture = self.zoom.candidates * 3 * side * side
        return max(1, min(batch, CANDIDATE_BYTES // (BATCHES_HELD * picture)))

    def read(self, sample: Sample) -> tuple[Image.Image, Tiles] | None:
        """Glance and candidates of one picture; None when the file is bad, which is noted in `problems`."""

        def read() -> tuple[Image.Image, Tiles]:
            with open_picture(sample.path) as picture:
                return self.look(picture)

        return self.fetch(sample.digest, sample.path, read, lambda found: image_bytes(found[0]) + found[1].bytes)

    def look(self, picture: Picture) -> tuple[Image.Image, Tiles]:
        """Glance and candidates of an open picture. Raises: BadImage."""
        side = 2 * self.preprocess.size
        width, height = picture.size
        if self.zoom.covers:
            boxes, prior = side_by_side(picture.size, self.zoom), np.zeros(self.zoom.tiles, np.float32)
            return grey_if_grey(picture.glance(side)), cut_tiles(picture, boxes, prior, self.zoom)
        large = max(width, height) >= 2 * side  # so that half of it is enough
        halves = GlanceOfStrips((-(-width // 2), -(-height // 2)), side) if large else None
        boxes, prior = propose(picture, self.zoom, self.finder, halves)
        glance = picture.glance(side) if halves is None else halves.image()
        return grey_if_grey(glance), cut_tiles(picture, boxes, prior, self.zoom)


@torch.inference_mode()
def propose(picture: Picture, zoom: ZoomConfig, finder: Finder | None,
            glance: GlanceOfStrips | None = None) -> tuple[NDArray[np.int32], NDArray[np.float32]]:  # fmt: skip
    """Boxes and prior of the candidates of a picture, always `zoom.candidates` of them; see `Tiles`.

    Args:
        finder: the learned proposal; None before it has learned.
        glance: of the picture at half size; is filled on the way.

    Shape: (C, 4), (C,).
    """
    energies, scores = energies_and_scores(picture, zoom, finder, glance)
    salient = [salience(energy) for energy in energies]
    grid = round(zoom.candidates * zoom.grid)
    learned = 0 if finder is None else round(zoom.candidates * zoom.learned)
    centres: list[tuple[float, float, int]] = []
    for octave, most in enumerate(_quotas(zoom.candidates - grid - learned, zoom.octaves)):
        size = cell_px(octave)
        centres += [
            (column * size, row * size, octave) for row, column in find_peaks(energies[octave], salient[octave], most)
        ]
    for octave, most in enumerate(_quotas(learned, zoom.octaves)):
        centres += _found(scores[octave], octave, most, zoom.tile_px, centres) if most else []
    centres += spread(picture.size, zoom.candidates - len(centres), zoom.octaves)
    boxes = [_box(x, y, octave, zoom.tile_px, picture.size) for x, y, octave in centres]
    return np.array(boxes, np.int32), _prior(salient, centres)


def _prior(salient: list[Tensor], centres: list[tuple[float, float, int]]) -> NDArray[np.float32]:
    maps = [of_octave.numpy() for of_octave in salient]
    found = []
    for x, y, octave in centres:
        rows, columns = maps[octave].shape
        row, column = (min(int(place / cell_px(octave)), most - 1) for place, most in ((y, rows), (x, columns)))
        found.append(maps[octave][row, column])
    logarithm = np.log(np.array(found, np.float32) + QUIET)
    prior: NDArray[np.float32] = (logarithm - logarithm.max()).astype(np.float32)
    return prior


def _found(scores: Tensor, octave: int, most: int, tile_px: int,
           known: list[tuple[float, float, int]]) -> list[tuple[float, float, int]]:  # fmt: skip
    """Centres of the highest scores that are no known centre's neighbours."""
    near = (tile_px << octave) / 4
    taken = [(x, y) for x, y, of in known if of == octave]
    found: list[tuple[float, float, int]] = []
    rounded = (scores / SAME).round()  # so that equal places are equal, whatever the order of the sums
    for row, column in local_maxima(rounded, most + len(taken), floor=-float("inf")):
        x, y = ((TileScorer.STRIDE * cell + TileScorer.REACH / 2) * (2 << octave) for cell in (column, row))
        if len(found) < most and all(max(abs(x - u), abs(y - v)) > near for u, v in taken):
            found.append((x, y, octave))
    return found


def _quotas(count: int, octaves: int) -> list[int]:
    """`count` split over the octaves, half as many for each next one."""
    shares = [count * (1 << (octaves - 1 - octave)) // ((1 << octaves) - 1) for octave in range(octaves)]
    shares[0] += count - sum(shares)
    return shares


def _box(x: float, y: float, octave: int, tile_px: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The tile around a centre, moved so that it and its margin lie inside of a picture that is large enough.

    A smaller picture stands in its middle.
    """
    side, margin = tile_px << octave, MARGIN << octave

    def first(centre: float, length: int) -> int:
        if length < side + 2 * margin:
            return (length - side) // 2
        return max(margin, min(length - side - margin, int(np.floor(centre - side / 2 + 0.5))))

    left, top = first(x, size[0]), first(y, size[1])
    return left, top, left + side, top + side


def cut_tiles(picture: Picture, boxes: NDArray[np.int32], prior: NDArray[np.float32], zoom: ZoomConfig) -> Tiles:
    """The pixels of the boxes and of a margin around them, all of one size."""
    scales = (boxes[:, 2] - boxes[:, 0]) / zoom.tile_px
    margin = np.rint(MARGIN * scales).astype(np.int32)[:, None] * np.array([-1, -1, 1, 1], np.int32)
    wanted = [(left, top, right, bottom) for left, top, right, bottom in (boxes + margin).tolist()]
    pixels = np.stack(picture.tiles(wanted, zoom.tile_px + 2 * MARGIN))
    if pixels.shape[-1] == 3 and (pixels[..., :1] == pixels[..., 1:]).all():
        pixels = np.ascontiguousarray(pixels[..., :1])
    return Tiles(boxes, prior, pixels)
