"""One policy from picture to input: nothing is cut off, and the exported form does the same."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from mvcr_cli.config import IMAGENET_MEAN, IMAGENET_STD
from mvcr_cli.data.preprocess import Preprocess, PreprocessGraph, grey_if_grey
from mvcr_cli.errors import UsageError

SIZES = [(333, 257), (257, 333), (1, 50), (50, 1), (500, 3), (3, 500), (64, 64), (2, 900), (1, 1), (97, 97), (31, 640)]
FITS = ["pad", "stretch"]


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def batched(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image))[None]


def brightness(x: torch.Tensor, preprocess: Preprocess) -> torch.Tensor:
    """Back to 0..255. Shape: (3, S, S)."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocess.mean, preprocess.std))
    return (x * std + mean) * 255


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [32, 97, 224])
@pytest.mark.parametrize("shape", SIZES)
def test_the_exported_form_gives_the_same_input(shape, size, fit):
    preprocess, image = Preprocess(size=size, fit=fit), noise(*shape)
    x = preprocess.tensor(image)
    assert x.shape == (3, size, size)
    assert x.dtype == torch.float32
    exported = PreprocessGraph(preprocess)(batched(image))[0]
    torch.testing.assert_close(exported, x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("shape", [(3, 500), (2, 900), (1, 50), (333, 257)])
def test_turning_the_picture_turns_the_input(shape, fit):
    """Rows and columns are treated alike, also where a result is one pixel wide."""
    preprocess, image = Preprocess(size=32, fit=fit), noise(*shape)
    turned = preprocess.tensor(image.transpose(Image.Transpose.TRANSPOSE))
    torch.testing.assert_close(turned, preprocess.tensor(image).transpose(1, 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("shape", [(333, 257), (64, 64), (40, 161)])
def test_every_corner_of_the_picture_counts(shape, fit):
    preprocess, plain = Preprocess(size=64, fit=fit), Image.new("RGB", shape, (0, 0, 0))
    before = preprocess.tensor(plain)
    for x in (0, shape[0] - 1):
        for y in (0, shape[1] - 1):
            marked = plain.copy()
            marked.putpixel((x, y), (255, 255, 255))
            assert (preprocess.tensor(marked) - before).abs().max() > 0.01


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("shape", [(333, 257), (31, 640), (64, 64)])
def test_the_picture_stays_as_bright_as_it_was(shape, fit):
    preprocess, image = Preprocess(size=96, fit=fit), noise(*shape)
    width, height = preprocess.fitted(*shape)
    pixels = brightness(preprocess.tensor(image), preprocess)
    left, top = (96 - width) // 2, (96 - height) // 2
    inside = pixels[:, top : top + height, left : left + width]
    assert float(inside.mean()) == pytest.approx(np.asarray(image).mean(), abs=1.5)
    assert float(pixels.min()) > -0.01
    assert float(pixels.max()) < 255.01


def test_padding_is_zero_after_normalisation_and_centred():
    x = Preprocess(size=32).tensor(Image.new("RGB", (40, 20), (255, 255, 255)))
    assert bool((x[:, 8:24] > 1).all())
    assert not x[:, :8].any()
    assert not x[:, 24:].any()


def test_a_picture_of_the_right_size_is_only_normalised():
    preprocess, image = Preprocess(size=48), noise(48, 48)
    mean, std = np.array(IMAGENET_MEAN), np.array(IMAGENET_STD)
    expected = (np.asarray(image) / 255 - mean) / std
    np.testing.assert_allclose(preprocess.tensor(image).permute(1, 2, 0).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "fitted"),
    [((100, 50), (32, 16)), ((50, 100), (16, 32)), ((1000, 1), (32, 1)), ((64, 63), (32, 32)), ((64, 61), (32, 31))],
)
def test_pad_keeps_the_aspect_and_rounds_half_up(shape, fitted):
    assert Preprocess(size=32, fit="pad").fitted(*shape) == fitted
    assert Preprocess(size=32, fit="stretch").fitted(*shape) == (32, 32)


@pytest.mark.parametrize("preprocess", [Preprocess(size=32), Preprocess(size=65, fit="stretch", mean=(0, 0.5, 1))])
def test_it_survives_a_round_trip_through_json(preprocess):
    again = Preprocess.from_dict(json.loads(json.dumps(preprocess.to_dict())))
    assert again == preprocess
    image = noise(50, 40)
    assert torch.equal(again.tensor(image), preprocess.tensor(image))


@pytest.mark.parametrize(
    "change",
    [
        {"size": 0},
        {"size": 10**9},
        {"size": 32.0},
        {"size": True},
        {"size": "32"},
        {"fit": "crop"},
        {"mean": [0.5, 0.5]},
        {"std": [1, 1, 0]},
        {"std": [1, 1, math.inf]},
        {"mean": [0, 0, math.nan]},
        {"mean": 3},
        {"surprise": 1},
    ],
)
def test_what_is_no_policy_is_refused(change):
    with pytest.raises((UsageError, ValueError, TypeError)):
        Preprocess.from_dict(Preprocess(size=32).to_dict() | change)


@pytest.mark.parametrize(("height", "coloured"), [(1, 0), (300, 299), (700, 255), (700, 256)])
def test_a_picture_is_grey_when_all_its_rows_are(height, coloured):
    pixels = np.full((height, 5, 3), 9, np.uint8)
    grey = grey_if_grey(Image.fromarray(pixels))
    assert grey.mode == "L" and (np.asarray(grey) == 9).all()
    pixels[coloured, 2, 2] += 1
    colour = Image.fromarray(pixels)
    assert grey_if_grey(colour) is colour
