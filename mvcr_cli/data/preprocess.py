"""The one policy that turns a picture into the network's input, stored in the checkpoint and used by every command."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mvcr_cli.config import IMAGENET_MEAN, IMAGENET_STD, Fit, check_imgsz
from mvcr_cli.models.scale_set import resize_matrix, view_side

# At once, when a picture is asked whether it is grey: a large one is not copied whole, and a colour ends it early.
_ROWS_COMPARED = 64


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """Antialiased resize of the whole picture to `size` x `size`, then `(x / 255 - mean) / std`.

    Args:
        size: side of the network's input in pixels.
        fit: "pad" keeps the aspect ratio and centres the picture on zeros; "stretch" fills the square.
    """

    size: int
    fit: Fit = "pad"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        if type(self.size) is not int:  # a file may say anything
            raise ValueError(f"size {self.size!r} is no whole number")
        check_imgsz(self.size)
        if self.fit not in ("pad", "stretch"):
            raise ValueError(f"unknown fit {self.fit!r}")
        numbers = (*self.mean, *self.std)
        if len(self.mean) != 3 or len(self.std) != 3 or not all(map(math.isfinite, numbers)) or min(self.std) <= 0:
            raise ValueError("mean and std must be three finite numbers each, std above 0")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocess:
        """Raises: TypeError, ValueError or UsageError when `values` are not those of a policy."""
        tuples: dict[str, Any] = {key: tuple(map(float, values[key])) for key in ("mean", "std") if key in values}
        return cls(**(values | tuples))

    def fitted(self, width: int, height: int, factor: float = 1.0) -> tuple[int, int]:
        """Width and height in pixels of the picture inside the square that `factor` asks for."""
        side = view_side(self.size, factor)
        if self.fit == "stretch":
            return side, side
        longest = max(width, height)
        return tuple(max(1, math.floor(edge * side / longest + 0.5)) for edge in (width, height))  # type: ignore[return-value]

    def canvas(self, factor: float) -> int:
        """Side in pixels of the network's input when the picture is shown at `factor` times its size."""
        return max(self.size, view_side(self.size, factor))

    def tensor(self, image: Image.Image, factor: float = 1.0) -> Tensor:
        """The network's input for one upright picture, RGB or grey ("L"). Shape: (3, canvas, canvas), float32.

        Args:
            factor: above 1, the picture covers a square that is larger in this proportion; below 1, a smaller one in
                the middle of zeros. Both are resized straight from the picture's own pixels, and nothing is cut off.
        """
        array = np.array(image, dtype=np.uint8).reshape(image.height, image.width, -1)
        pixels = torch.from_numpy(array).permute(2, 0, 1)[None].float().contiguous()  # 1 x C x H x W
        width, height = self.fitted(image.width, image.height, factor)
        canvas = self.canvas(factor)
        if (height, width) != pixels.shape[-2:]:
            pixels = _resize(pixels, height, width)
        x = self.normalise(pixels.expand(-1, 3, -1, -1))  # a grey picture is resized once, not three times
        left, top = (canvas - width) // 2, (canvas - height) // 2
        return F.pad(x, (left, canvas - width - left, top, canvas - height - top))[0]

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels in 0..255 as float, zero mean, unit deviation. Shape: (N, 3, H, W) -> the same."""
        mean = torch.tensor(self.mean, device=pixels.device).view(1, 3, 1, 1) * 255
        std = torch.tensor(self.std, device=pixels.device).view(1, 3, 1, 1) * 255
        return (pixels.float() - mean) / std


def grey_if_grey(image: Image.Image) -> Image.Image:
    """A picture in RGB or L; a grey one in one channel costs a third of the cache and of the augmentation."""
    if image.mode == "L":
        return image
    for top in range(0, image.height, _ROWS_COMPARED):
        bands = image.crop((0, top, image.width, min(top + _ROWS_COMPARED, image.height))).split()
        first, second, third = map(np.asarray, bands)
        if not (np.array_equal(first, second) and np.array_equal(first, third)):
            return image
    return image.getchannel(0)


def image_bytes(image: Image.Image) -> int:
    """Memory of a picture in 8-bit channels."""
    return image.width * image.height * len(image.getbands())


def _resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """Antialiased bilinear resize. Shape: (N, C, H, W) -> (N, C, height, width)."""
    if width == 1 and height > 1:  # torch 2.14 gives wrong rows to a result that is one pixel wide
        return _resize(pixels.transpose(2, 3).contiguous(), width, height).transpose(2, 3)
    return F.interpolate(pixels, size=(height, width), mode="bilinear", antialias=True, align_corners=False)


class PreprocessGraph(nn.Module):
    """`Preprocess.tensor` for a batch of equal-sized pictures, in operations that any export can carry.

    The resize is two matrix products with filter weights computed from the input's own size, so that one graph takes
    pictures of every size. It agrees with `Preprocess.tensor` to float rounding.

    Shape: (N, H, W, 3) uint8 -> (N, 3, size, size).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, preprocess: Preprocess) -> None:
        super().__init__()
        self.size, self.fit = preprocess.size, preprocess.fit
        self.register_buffer("mean", torch.tensor(preprocess.mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(preprocess.std).view(1, 3, 1, 1) * 255, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        x = images.permute(0, 3, 1, 2).to(self.mean.dtype)  # N x 3 x H x W
        tall, wide = x[0, 0, :, 0], x[0, 0, 0, :]
        longest = torch.maximum(torch.ones_like(tall).sum(), torch.ones_like(wide).sum())
        down, across = self._filter(tall, longest), self._filter(wide, longest)
        resized = down @ x @ across.transpose(0, 1)  # N x 3 x size x size, zero outside the picture
        inside = down.sum(1)[:, None] * across.sum(1)[None]  # rows of a filter sum to 1 inside and 0 outside
        return (resized - self.mean) / self.std * inside

    def _filter(self, line: Tensor, longest: Tensor) -> Tensor:
        """The resize of one axis and its place in the square. Shape: (n,) -> (size, n)."""
        if self.fit == "stretch":
            return resize_matrix(line, self.size, self.size)
        fitted = torch.floor(torch.ones_like(line).sum() * self.size / longest + 0.5).clamp(min=1)
        return resize_matrix(line, fitted, self.size, torch.floor((self.size - fitted) / 2))
