"""Leaving out plain ground, and taking the glance on the way, must not change what is found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mvcr_cli.config import IMAGENET_MEAN, IMAGENET_STD, ZoomConfig
from mvcr_cli.data import search
from mvcr_cli.data.glance import MOST_SHRINK, GlanceOfStrips
from mvcr_cli.data.plain_ground import ALL_COLUMNS, PlainGround
from mvcr_cli.data.preprocess import Preprocess
from mvcr_cli.data.search import energies_and_scores
from mvcr_cli.data.tiles import TileReader, WholePicture, propose
from mvcr_cli.models.sift import CALM, block_means, salience
from mvcr_cli.models.zoom import SearchScorer, TileScorer

BLOCK = 40


def picture(width: int, height: int, objects: int, grounds: tuple[tuple[int, int, int], ...], seed: int) -> Image.Image:
    """Small random textures on ground of one colour above another."""
    rng = np.random.default_rng(seed)
    pixels = np.empty((height, width, 3), np.uint8)
    for number, colour in enumerate(grounds):
        pixels[height * number // len(grounds) :] = colour
    for _ in range(objects):
        x, y = int(rng.integers(-8, width)), int(rng.integers(-8, height))
        part = pixels[max(0, y) : max(0, y + 20), max(0, x) : max(0, x + 20)]
        part[:] = rng.integers(0, 256, part.shape)
    return Image.fromarray(pixels)


@pytest.fixture
def finder() -> SearchScorer:
    torch.manual_seed(0)
    return SearchScorer(TileScorer(), IMAGENET_MEAN, IMAGENET_STD)


@pytest.mark.parametrize("grounds", [((0, 0, 0),), ((255, 255, 255), (10, 80, 30))])
@pytest.mark.parametrize(
    ("width", "height", "objects"), [(1600, 900, 12), (1031, 655, 4), (333, 2000, 0), (70, 700, 3)]
)
@pytest.mark.parametrize("octaves", [1, 2, 3])
def test_what_is_found_is_the_same_without_plain_ground(finder, monkeypatch, octaves, width, height, objects, grounds):
    monkeypatch.setattr(search, "STRIP_PIXELS", 160 * width)
    zoom = ZoomConfig(octaves=octaves)
    looked = []

    def found(everything: bool):
        def columns(self, strip, known=PlainGround.columns):
            looked.append(ALL_COLUMNS if everything else known(self, strip))
            return looked[-1]

        with monkeypatch.context() as patch, torch.inference_mode():
            patch.setattr(PlainGround, "columns", columns)
            return energies_and_scores(WholePicture(picture(width, height, objects, grounds, 3)), zoom, finder)

    everywhere, left_out = found(True), found(False)
    for whole, parts in zip(everywhere, left_out, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    assert any(columns.runs is not None for columns in looked) or width <= 160


def test_columns_are_those_of_the_objects_and_a_block_on_either_side():
    ground = PlainGround(BLOCK)
    strip = np.full((20, 12 * BLOCK + 7, 3), 9, np.uint8)
    strip[5, 5 * BLOCK, 1] = 10
    assert ground.columns(strip).runs == ((4, 7),)
    assert ground.columns(np.full_like(strip, 9)).runs == ((4, 7),)  # rows of the strip before are still in a window
    assert ground.columns(np.full_like(strip, 9)).runs == ((0, 1),)  # something must be looked at
    assert ground.columns(np.full_like(strip, 8)).runs is None  # an edge between two grounds
    assert ground.columns(np.full_like(strip, 8)).ground == pytest.approx((8 / 255,) * 3)


def test_nothing_is_left_out_of_texture():
    strip = np.random.default_rng(0).integers(0, 256, (20, 400, 3), np.uint8)
    assert PlainGround(BLOCK).columns(strip).runs is None


@pytest.mark.parametrize(("width", "height", "side"), [(400, 300, 100), (333, 205, 50), (90, 1200, 7), (10, 10, 40)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_glance_of_strips_is_that_of_the_whole(width, height, side, channels):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)
    glance = GlanceOfStrips((width, height), side)
    for top in range(0, height, 33):
        glance.add(pixels[top : top + 33])
    shrink = min(MOST_SHRINK, max(1, max(width, height) // side))
    whole = Image.fromarray(pixels[..., 0] if channels == 1 else pixels).reduce(shrink)
    assert glance.image().tobytes() == whole.tobytes()


def test_plain_ground_left_out_or_not_gives_the_same_tiles(finder, monkeypatch):
    for seed in range(6):
        page = WholePicture(picture(1700, 1100, 2 * seed, ((240, 240, 240),), seed))
        with torch.inference_mode():
            left_out, _ = propose(page, ZoomConfig(), finder)
            with monkeypatch.context() as patch:
                patch.setattr(PlainGround, "columns", lambda self, strip: ALL_COLUMNS)
                everywhere, _ = propose(page, ZoomConfig(), finder)
        assert np.array_equal(left_out, everywhere)


def test_few_widths_occur():
    rng = np.random.default_rng(0)
    ground, widths = PlainGround(BLOCK), set()
    for _ in range(200):
        strip = np.zeros((20, 150 * BLOCK, 3), np.uint8)
        strip[:, rng.integers(0, strip.shape[1], rng.integers(0, 40))] = 1
        runs = ground.columns(strip).runs
        widths.add(None if runs is None else sum(end - first for first, end in runs))
    assert len(widths) <= 32


def test_the_glance_of_a_search_is_the_picture_made_smaller():
    image = picture(1400, 900, 40, ((0, 0, 0),), 1)
    glance, _ = TileReader(ZoomConfig(), Preprocess(size=100), 0).look(WholePicture(image))
    assert np.array_equal(np.asarray(glance), np.asarray(image.reduce(2).reduce(3)))


def test_salience_of_even_energy_is_even():
    energy = torch.full((20, 30), 0.25)
    torch.testing.assert_close(salience(energy), torch.full((20, 30), 0.25 / (0.25 + CALM)))


@pytest.mark.parametrize("size", [2, 4, 5])
def test_means_of_blocks_are_those_of_pooling(size):
    x = torch.rand(2, 43, 61, generator=torch.Generator().manual_seed(0))
    pooled = F.avg_pool2d(x, size, ceil_mode=True, count_include_pad=False)
    torch.testing.assert_close(block_means(x, size), pooled)
