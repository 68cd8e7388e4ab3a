"""What may happen to a training picture: one geometric warp, one colour operation, one erased rectangle.

Every function takes its own random generator, seeded from (seed, epoch, picture), so that the result does not depend on
which thread made it or in which order.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from mvcr_cli.config import AugmentConfig, Fit
from mvcr_cli.models.scale_set import make_view

Matrix = tuple[float, float, float, float]
Point = tuple[float, float]
Colour = int | tuple[int, int, int]
FOREIGN = (1.4, 2.8)  # factors at which a view is foreign: beyond the usual jitter of object sizes
_TURNS = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)


def augment(image: Image.Image, size: int, fit: Fit, config: AugmentConfig, rng: random.Random,
            fill: tuple[int, int, int]) -> NDArray[np.uint8]:  # fmt: skip
    """One training view. Shape: (size, size, 3), uint8."""
    image, inside = _warp(image, size, fit, config, rng, fill)
    if config.resolution and rng.random() < config.resolution:
        image = _blurred(image, config.coarsest ** rng.random())
    if config.trivial and rng.random() < config.trivial:
        image = rng.choice(_COLOUR)(image, rng)
    pixels = np.array(image.convert("RGB"), dtype=np.uint8)
    pixels[np.asarray(inside) == 0] = fill  # grey pictures and colour operations too: zero after the normalisation
    if config.erase and rng.random() < config.erase:
        _erase(pixels, rng, fill)
    return pixels


def _warp(image: Image.Image, size: int, fit: Fit, config: AugmentConfig, rng: random.Random,
          fill: tuple[int, int, int]) -> tuple[Image.Image, Image.Image]:  # fmt: skip
    """Crop, zoom, shift, shear, rotate, mirror and turn, antialiased. Grey pictures stay in one channel.

    Returns: the view, and a grey picture of the same size that is 0 where the view is padding.
    """
    centre, half = _box(image.width, image.height, fit, config, rng)
    linear = _linear(config, rng)
    colour = fill if image.mode == "RGB" else round(sum(fill) / 3)
    if linear is not None:
        framed, inside = _affine(image, size, centre, half, linear, colour)
    else:
        framed, inside = _framed(image, size, centre, half, colour)
    for operation in _mirrors(config, rng):
        framed, inside = framed.transpose(operation), inside.transpose(operation)
    return framed, inside


def _framed(image: Image.Image, size: int, centre: Point, half: Point,
            colour: Colour) -> tuple[Image.Image, Image.Image]:  # fmt: skip
    """The box around `centre`, resized to a square; what lies outside of the picture is filled."""
    left, top = max(0.0, centre[0] - half[0]), max(0.0, centre[1] - half[1])
    right, bottom = min(float(image.width), centre[0] + half[0]), min(float(image.height), centre[1] + half[1])
    x0, x1 = (round((edge - centre[0] + half[0]) / (2 * half[0]) * size) for edge in (left, right))
    y0, y1 = (round((edge - centre[1] + half[1]) / (2 * half[1]) * size) for edge in (top, bottom))
    canvas, inside = Image.new(image.mode, (size, size), colour), Image.new("L", (size, size), 0)
    if right > left and bottom > top:
        target = (max(1, x1 - x0), max(1, y1 - y0))
        canvas.paste(image.resize(target, Image.Resampling.BILINEAR, box=(left, top, right, bottom)), (x0, y0))
        inside.paste(255, (x0, y0, x0 + target[0], y0 + target[1]))
    return canvas, inside


def _affine(image: Image.Image, size: int, centre: Point, half: Point, linear: Matrix,
            colour: Colour) -> tuple[Image.Image, Image.Image]:  # fmt: skip
    """The same box under a linear map; each side of a larger source is shrunk first, so that the map never skips pixels."""
    shrink_x, shrink_y = (min(1.0, size / (2 * side)) for side in half)
    if min(shrink_x, shrink_y) < 1:
        target = max(1, round(image.width * shrink_x)), max(1, round(image.height * shrink_y))
        rate_x, rate_y = target[0] / image.width, target[1] / image.height
        image = image.resize(target, Image.Resampling.BILINEAR)
        centre, half = (centre[0] * rate_x, centre[1] * rate_y), (half[0] * rate_x, half[1] * rate_y)
    step_x, step_y = 2 * half[0] / size, 2 * half[1] / size
    a, b, c, d = linear[0] * step_x, linear[1] * step_x, linear[2] * step_y, linear[3] * step_y
    data = (a, b, centre[0] - (a + b) * size / 2, c, d, centre[1] - (c + d) * size / 2)

    def moved(source: Image.Image, outside: Colour) -> Image.Image:
        return source.transform(
            (size, size), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR, fillcolor=outside
        )

    return moved(image, colour), moved(Image.new("L", image.size, 255), 0)


def _blurred(image: Image.Image, factor: float) -> Image.Image:
    """Shrunk by `factor` and enlarged again: as large as before, with the detail of a smaller object seen enlarged."""
    small = tuple(max(1, round(side / factor)) for side in image.size)
    shrunk = image.resize((small[0], small[1]), Image.Resampling.BILINEAR)
    return shrunk.resize(image.size, Image.Resampling.BILINEAR)


def _box(width: int, height: int, fit: Fit, config: AugmentConfig,
         rng: random.Random) -> tuple[tuple[float, float], tuple[float, float]]:  # fmt: skip
    """Centre and half extent, in source pixels, of the region that fills the output."""
    area = rng.uniform(config.crop, 1.0)
    aspect = math.exp(rng.uniform(-1, 1) * math.log(4 / 3)) if config.crop < 1 else 1.0
    box_w, box_h = width * min(1.0, math.sqrt(area * aspect)), height * min(1.0, math.sqrt(area / aspect))
    x = rng.uniform(box_w / 2, width - box_w / 2) + rng.uniform(-config.shift, config.shift) * width
    y = rng.uniform(box_h / 2, height - box_h / 2) + rng.uniform(-config.shift, config.shift) * height
    grown = math.exp(rng.uniform(-1, 1) * math.log1p(config.zoom))
    half_x, half_y = box_w / 2 * grown, box_h / 2 * grown
    if fit == "pad":
        half_x = half_y = max(half_x, half_y)
    return (x, y), (half_x, half_y)


def _linear(config: AugmentConfig, rng: random.Random) -> Matrix | None:
    """Rotation and shear as one 2x2 matrix (a, b, c, d), None when there is neither."""
    if not config.rotate and not config.shear:
        return None
    matrix: Matrix = (1.0, 0.0, 0.0, 1.0)
    if config.rotate:
        angle = math.radians(rng.uniform(-config.rotate, config.rotate))
        matrix = (math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle))
    if config.shear:
        amount = rng.uniform(-config.shear, config.shear)
        matrix = _product(matrix, rng.choice(((1, amount, 0, 1), (1, 0, amount, 1))))
    return matrix


def _mirrors(config: AugmentConfig, rng: random.Random) -> Iterator[Image.Transpose]:
    """Mirrors and quarter turns, each with its own chance."""
    if config.hflip and rng.random() < 0.5:
        yield Image.Transpose.FLIP_LEFT_RIGHT
    if config.vflip and rng.random() < 0.5:
        yield Image.Transpose.FLIP_TOP_BOTTOM
    if config.turn and (turn := rng.choice(_TURNS)) is not None:
        yield turn


def _product(p: Matrix, q: Matrix) -> Matrix:
    return (
        p[0] * q[0] + p[1] * q[2],
        p[0] * q[1] + p[1] * q[3],
        p[2] * q[0] + p[3] * q[2],
        p[2] * q[1] + p[3] * q[3],
    )


ColourOperation = Callable[[Image.Image, random.Random], Image.Image]


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> ColourOperation:
    return lambda image, rng: kind(image).enhance(1 + rng.uniform(-0.6, 0.6))


# The photometric operations of TrivialAugment (Müller and Hutter 2021, arXiv 2103.10158), at photo-like strengths.
_COLOUR: Sequence[ColourOperation] = (
    _enhance(ImageEnhance.Brightness),
    _enhance(ImageEnhance.Contrast),
    _enhance(ImageEnhance.Color),
    _enhance(ImageEnhance.Sharpness),
    lambda image, rng: ImageOps.autocontrast(image),
    lambda image, rng: ImageOps.equalize(image),
    lambda image, rng: ImageOps.posterize(image, rng.randint(4, 7)),
    lambda image, rng: ImageOps.solarize(image, rng.randint(160, 255)),
)


def _erase(pixels: NDArray[np.uint8], rng: random.Random, fill: tuple[int, int, int]) -> None:
    side = pixels.shape[0]
    area, aspect = rng.uniform(0.02, 0.25) * side * side, math.exp(rng.uniform(-1, 1))
    height = min(side, max(1, round(math.sqrt(area * aspect))))
    width = min(side, max(1, round(math.sqrt(area / aspect))))
    top, left = rng.randint(0, side - height), rng.randint(0, side - width)
    pixels[top : top + height, left : left + width] = fill


def mix(x: Tensor, target: Tensor, config: AugmentConfig, rng: random.Random) -> tuple[Tensor, Tensor]:
    """MixUp (arXiv 1710.09412) or CutMix (arXiv 1905.04899) of a batch with itself, reversed.

    Shape: (N, 3, H, W), (N, K) -> the same.
    """
    kinds = [kind for kind in ("mixup", "cutmix") if getattr(config, kind) > 0]
    if not kinds:
        return x, target
    kind = rng.choice(kinds)
    share = rng.betavariate(getattr(config, kind), getattr(config, kind))
    if kind == "mixup":
        return torch.lerp(x.flip(0), x, share), torch.lerp(target.flip(0), target, share)
    height, width = x.shape[-2:]
    cut_h, cut_w = round(height * math.sqrt(1 - share)), round(width * math.sqrt(1 - share))
    top, left = rng.randint(0, height - cut_h), rng.randint(0, width - cut_w)
    mixed = x.clone()
    mixed[:, :, top : top + cut_h, left : left + cut_w] = x.flip(0)[:, :, top : top + cut_h, left : left + cut_w]
    kept = 1 - cut_h * cut_w / (height * width)
    return mixed, torch.lerp(target.flip(0), target, kept)


def foreign_scales(x: Tensor, rng: random.Random) -> Tensor:
    """Every picture at a scale at which the network is not taught: shrunk and repeated, or a part of it enlarged.

    They have the size of the others, so that both kinds can go through the batch norms together: foreign pictures with
    statistics of their own are told apart by these, which are not there in use.

    Shape: (N, 3, S, S) -> the same.
    """
    return torch.cat([_foreign(picture[None], rng) for picture in x])


def _foreign(x: Tensor, rng: random.Random) -> Tensor:
    side = x.shape[-1]
    factor = math.exp(rng.uniform(*map(math.log, FOREIGN)))
    if rng.random() < 0.5:
        small = make_view(x, 1 / factor)
        period = small.shape[-1]
        wall = small.repeat(1, 1, *(-(-side // period) + 1,) * 2)
        top, left = rng.randrange(period), rng.randrange(period)
        return wall[:, :, top : top + side, left : left + side]
    part = round(side / factor)
    top, left = rng.randint(0, side - part), rng.randint(0, side - part)
    return make_view(x[:, :, top : top + part, left : left + part], side / part)
