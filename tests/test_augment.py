"""What may happen to a training picture, and what must not."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from mvcr_cli.config import AugmentConfig
from mvcr_cli.data.augment import augment, mix
from mvcr_cli.data.preprocess import Preprocess

NEUTRAL = {"crop": 1.0, "zoom": 0.0, "shear": 0.0, "hflip": False, "trivial": 0.0}
FILL = (124, 116, 104)


def neutral(**change: object) -> AugmentConfig:
    return AugmentConfig(**(NEUTRAL | change))  # type: ignore[arg-type]


def smooth(width: int, height: int) -> Image.Image:
    """A picture without symmetries and without fine detail."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    pixels = np.stack([80 + 150 * x, 60 + 150 * y, 200 - 100 * x * y], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def run(image: Image.Image, config: AugmentConfig, seed: int = 0, size: int = 32, fit: str = "stretch") -> np.ndarray:
    return augment(image, size, fit, config, random.Random(seed), FILL)  # type: ignore[arg-type]


EVERYTHING = AugmentConfig(
    crop=0.3, zoom=1.0, shear=0.3, shift=0.3, rotate=180, hflip=True, vflip=True, turn=True, trivial=1.0, erase=1.0
)


@pytest.mark.parametrize("shape", [(32, 32), (80, 50), (33, 97)])
def test_without_augmentation_it_is_a_plain_resize(shape):
    image = smooth(*shape)
    assert np.array_equal(run(image, neutral()), np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR)))


@pytest.mark.parametrize("fit", ["pad", "stretch"])
@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (50, 50), (20, 15)])
def test_without_augmentation_it_is_what_evaluation_sees(shape, fit):
    image, preprocess = smooth(*shape), Preprocess(size=32, fit=fit)
    trained = torch.from_numpy(run(image, neutral(), fit=fit)).permute(2, 0, 1)[None]
    x, y = preprocess.normalise(trained)[0], preprocess.tensor(image)
    width, height = preprocess.fitted(*shape)
    left, top = (32 - width) // 2 + 1, (32 - height) // 2 + 1  # padding may begin half a pixel apart
    inner = (slice(None), slice(top, top + height - 2), slice(left, left + width - 2))
    assert float((x[inner] - y[inner]).abs().max()) < 0.15
    assert float((x - y).abs().mean()) < 0.12


def test_mirroring_gives_the_picture_or_its_mirror_and_nothing_else():
    image = smooth(32, 32)
    allowed = {np.asarray(image).tobytes(), np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)).tobytes()}
    seen = {run(image, neutral(hflip=True), seed).tobytes() for seed in range(20)}
    assert seen == allowed


@pytest.mark.parametrize(
    ("change", "count"),
    [({"vflip": True}, 2), ({"turn": True}, 4), ({"turn": True, "hflip": True, "vflip": True}, 8)],
)
def test_mirrors_and_turns_only_move_pixels(change, count):
    image = smooth(32, 32)
    colours = sorted(map(tuple, np.asarray(image).reshape(-1, 3).tolist()))
    seen = {run(image, neutral(**change), seed).tobytes() for seed in range(60)}
    assert len(seen) == count
    for pixels in seen:
        assert sorted(map(tuple, np.frombuffer(pixels, np.uint8).reshape(-1, 3).tolist())) == colours


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (300, 7), (64, 64), (200, 150)])
@pytest.mark.parametrize("fit", ["pad", "stretch"])
@pytest.mark.parametrize("config", [neutral(), AugmentConfig(), EVERYTHING], ids=["neutral", "photo", "everything"])
def test_any_picture_gives_the_asked_shape_and_the_same_seed_the_same_pixels(shape, fit, config):
    image = smooth(*shape)
    for seed in range(6):
        pixels = run(image, config, seed, 24, fit)
        assert pixels.shape == (24, 24, 3)
        assert pixels.dtype == np.uint8
        assert np.array_equal(pixels, run(image, config, seed, 24, fit))


def test_another_seed_gives_other_pixels_and_the_source_stays_as_it_is():
    image = smooth(64, 64)
    before = image.tobytes()
    assert len({run(image, EVERYTHING, seed).tobytes() for seed in range(10)}) == 10
    assert image.tobytes() == before


def dot(side: int = 96, radius: int = 16) -> Image.Image:
    image = Image.new("RGB", (side, side), (10, 10, 10))
    ImageDraw.Draw(image).ellipse(
        [side // 2 - radius, side // 2 - radius, side // 2 + radius, side // 2 + radius], "white"
    )
    return image


def test_zoom_shows_objects_smaller_and_larger_within_its_bound():
    image = dot()
    plain = float((run(image, neutral()) > 128).mean())
    config = neutral(zoom=1.0)
    ratios = [float((run(image, config, seed)[..., 0] > 128).mean() / plain) ** 0.5 for seed in range(60)]
    assert min(ratios) < 0.7
    assert max(ratios) > 1.4
    assert min(ratios) > 0.45
    assert max(ratios) < 2.1
    assert 0.3 < np.mean([ratio > 1 for ratio in ratios]) < 0.7


def test_what_lies_outside_the_picture_is_filled():
    white = Image.new("RGB", (40, 40), "white")
    shifted = [run(white, neutral(shift=0.4), seed) for seed in range(10)]
    colours = {tuple(colour) for pixels in shifted for colour in pixels.reshape(-1, 3).tolist()}
    assert colours == {FILL, (255, 255, 255)}


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_what_a_rotation_brings_in_is_filled(mode):
    white = Image.new(mode, (40, 40), "white")
    corners = [run(white, neutral(rotate=45.0), seed)[0, 0] for seed in range(10)]
    assert {tuple(corner) for corner in corners} <= {FILL, (255, 255, 255)}
    assert any(tuple(corner) == FILL for corner in corners)


@pytest.mark.parametrize("shape", [(640, 32), (32, 640)])
def test_a_long_picture_that_is_stretched_and_sheared_shows_no_moire(shape):
    stripes = Image.fromarray(np.broadcast_to(np.uint8([[0], [0], [255], [255]] * 160), (640, 32)).copy())
    stripes = stripes if shape == stripes.size else stripes.transpose(Image.Transpose.TRANSPOSE)
    inner = [run(stripes, neutral(shear=0.1), seed)[8:24, 8:24] for seed in range(5)]
    assert all(abs(int(pixels.min()) - 127) < 20 and abs(int(pixels.max()) - 127) < 20 for pixels in inner)


@pytest.mark.parametrize("change", [{}, {"shear": 0.3, "rotate": 30.0, "shift": 0.2}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_padding_is_that_of_evaluation_whatever_happens_to_the_picture(mode, change):
    """Zero after the normalisation, but for the rounding to whole grey levels."""
    preprocess = Preprocess(size=64)
    picture = Image.fromarray(np.full((30, 60, 3), 255, np.uint8)).convert(mode)
    config = {"zoom": 1.0, "hflip": True} | change
    padded = 0
    for seed in range(24):  # every colour operation
        plain = (run(picture, neutral(**config), seed, 64, "pad") == FILL).all(-1)
        pixels = run(picture, neutral(trivial=1.0, **config), seed, 64, "pad")
        assert (pixels[plain] == FILL).all()
        assert not (pixels[~plain] == FILL).all(-1).any()
        x = preprocess.normalise(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0]
        half_a_level = 0.5 / (255 * torch.tensor(preprocess.std).view(3, 1, 1))
        assert bool((x.abs() <= half_a_level).all(0)[torch.from_numpy(plain)].all())
        padded += int(plain.sum())
    assert padded > 24 * 64 * 64 / 4


def test_grey_in_one_channel_is_treated_like_grey_in_three():
    one = smooth(60, 45).convert("L")
    three = one.convert("RGB")
    for seed in range(40):
        a, b = (augment(x, 32, "pad", EVERYTHING, random.Random(seed), (115, 115, 115)) for x in (one, three))
        assert np.array_equal(a, b)


def test_erasing_covers_between_a_fiftieth_and_a_quarter():
    white = Image.new("RGB", (64, 64), "white")
    for seed in range(30):
        erased = (run(white, neutral(erase=1.0), seed, 64) != 255).any(-1)
        assert 0.015 < erased.mean() < 0.27
        rows, columns = np.nonzero(erased)
        assert erased[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()  # one rectangle


def test_colour_operations_leave_every_pixel_in_its_place():
    image = smooth(32, 32)
    changed = [run(image, neutral(trivial=1.0), seed) for seed in range(30)]
    assert len({pixels.tobytes() for pixels in changed}) > 15
    luma = np.asarray(image.convert("L")).astype(float)
    for pixels in changed:
        other = np.asarray(Image.fromarray(pixels).convert("L")).astype(float)
        assert other.std() == 0 or abs(np.corrcoef(luma.ravel(), other.ravel())[0, 1]) > 0.2


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(0)
    return torch.randn(6, 3, 20, 20, generator=chance), torch.eye(3)[torch.tensor([0, 1, 2, 0, 1, 2])] * 0.9 + 0.1 / 3


@pytest.mark.parametrize("kind", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_mixed_targets_stay_distributions_and_share_as_the_pixels_do(kind):
    x, target = batch()
    for seed in range(25):
        mixed, soft = mix(x, target, neutral(**kind), random.Random(seed))
        torch.testing.assert_close(soft.sum(1), torch.ones(6))
        assert bool((soft >= 0).all())
        # The share of each picture is that of its label: solve it from the first row, labels 0 and 2.
        share = float((soft[0, 0] - 0.1 / 3) / 0.9)
        assert mixed.shape == x.shape
        if torch.allclose(mixed, torch.lerp(x.flip(0), x, share), atol=1e-5):
            continue
        own = (mixed == x).all(1).float().mean((1, 2))
        torch.testing.assert_close(own, torch.full((6,), share), rtol=0, atol=1e-5)
        assert bool(((mixed == x) | (mixed == x.flip(0))).all())


def test_without_mixing_the_batch_is_left_alone():
    x, target = batch()
    mixed, soft = mix(x, target, AugmentConfig(), random.Random(0))
    assert mixed is x
    assert soft is target
