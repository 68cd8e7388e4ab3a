"""The residual trunk, with torchvision's parameter names, so that public ResNet weights load unchanged.

Sources: He et al. 2015 (arXiv 1512.03385), stride in the 3x3 convolution of bottlenecks as torchvision and timm do
("v1.5"). Batch norm has one private set a view (`ScaleBatchNorm2d`); with one view this is the plain ResNet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from mvcr_cli.config import Stem
from mvcr_cli.models.scale_aware import ScaleAwareConv2d, ScaleBatchNorm2d, SoftBlur

NARROW = 16  # channels: floats in a register of AVX-512


class Shortcut(nn.Sequential):
    """1x1 convolution and batch norm where a block changes stride or channels."""

    def __init__(self, channels: int, out: int, stride: int, views: int) -> None:
        super().__init__(nn.Conv2d(channels, out, 1, stride, bias=False), ScaleBatchNorm2d(out, views))

    def forward(self, x: Tensor, view: int) -> Tensor:  # type: ignore[override]
        convolution = cast(nn.Conv2d, self[0])
        if x.shape[1] < NARROW and convolution.stride[0] > 1:
            # The same, for it looks at these pixels only. With AVX-512, the gradient of the strided form is written
            # beyond its memory (oneDNN of torch 2.14), and the process crashes there or later.
            step = convolution.stride[0]
            x = F.conv2d(x[..., ::step, ::step], convolution.weight)
        else:
            x = convolution(x)
        result: Tensor = self[1](x, view)
        return result


class Block(nn.Module):
    """What both residual blocks share: an optional blur before a stride, and the shortcut."""

    expansion: int

    def __init__(self, channels: int, out: int, stride: int, views: int, blur: float | None) -> None:
        super().__init__()
        self.downsample = Shortcut(channels, out, stride, views) if stride != 1 or channels != out else None
        self.blur = SoftBlur(channels, blur) if stride != 1 and blur is not None else None

    def forward(self, x: Tensor, view: int) -> Tensor:
        if self.blur is not None:
            x = self.blur(x)
        identity = x if self.downsample is None else self.downsample(x, view)
        return F.relu(self.branch(x, view) + identity, inplace=True)

    def branch(self, x: Tensor, view: int) -> Tensor:
        raise AssertionError("a block defines its branch")


class BasicBlock(Block):
    expansion = 1

    def __init__(self, channels: int, width: int, stride: int, views: int, blur: float | None,
                 sacs: float | None = None) -> None:  # fmt: skip
        super().__init__(channels, width, stride, views, blur)
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = ScaleBatchNorm2d(width, views)
        self.conv2 = _convolution(width, 1, sacs)
        self.bn2 = ScaleBatchNorm2d(width, views)

    def branch(self, x: Tensor, view: int) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x), view), inplace=True)
        return cast(Tensor, self.bn2(self.conv2(x), view))


class Bottleneck(Block):
    expansion = 4

    def __init__(self, channels: int, width: int, stride: int, views: int, blur: float | None,
                 sacs: float | None = None) -> None:  # fmt: skip
        out = width * self.expansion
        super().__init__(channels, out, stride, views, blur)
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = ScaleBatchNorm2d(width, views)
        self.conv2 = _convolution(width, stride, sacs)
        self.bn2 = ScaleBatchNorm2d(width, views)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = ScaleBatchNorm2d(out, views)

    def branch(self, x: Tensor, view: int) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x), view), inplace=True)
        x = F.relu(self.bn2(self.conv2(x), view), inplace=True)
        return cast(Tensor, self.bn3(self.conv3(x), view))


def _convolution(width: int, stride: int, sacs: float | None) -> nn.Conv2d:
    """A block's own 3x3 convolution; scale-aware, with the strength `sacs`, where it keeps the size."""
    if sacs is not None and stride == 1:
        return ScaleAwareConv2d(width, width, sacs)
    return nn.Conv2d(width, width, 3, stride, 1, bias=False)


STEMS: dict[Stem, tuple[int, int]] = {"imagenet": (7, 2), "small": (3, 2), "fine": (3, 1)}  # kernel, stride
LAYER2_STRIDE: dict[Stem, int] = {"imagenet": 8, "small": 4, "fine": 2}


class ResNetTrunk(nn.Module):
    """Stem and four stages; `features` gives the maps of stages 2, 3 and 4 (strides 8, 16, 32; "small" stem: half;
    "fine" stem: a quarter).

    Args:
        depths: blocks a stage.
        width: channels of stage 1.
        stem: "imagenet" (7x7 stride 2, max-pool), "small" (3x3 stride 2) or "fine" (3x3 stride 1).
        views: S, the number of private batch-norm sets.
        blur: initial strength of SoftBlur, None for no blur.
        sacs: initial strength of `ScaleAwareConv2d` by stage, 1 to 4; the stages that are left out have none.
    """

    def __init__(self, block: type[BasicBlock | Bottleneck], depths: tuple[int, ...], width: int, stem: Stem, views: int,
                 blur: float | None, sacs: Mapping[int, float] | None = None) -> None:  # fmt: skip
        super().__init__()
        kernel, stride = STEMS[stem]
        self.conv1 = nn.Conv2d(3, width, kernel, stride, kernel // 2, bias=False)
        self.bn1 = ScaleBatchNorm2d(width, views)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if stem == "imagenet" else nn.Identity()
        channels, self.channels = width, []
        for stage, depth in enumerate(depths):
            planes = width << stage
            blocks = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(block(channels, planes, stride, views, blur, (sacs or {}).get(stage + 1)))
                channels = planes * block.expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
            self.channels.append(channels)

    def features(self, x: Tensor, view: int, beside1: Tensor | None = None,
                 beside2: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Maps of stages 2, 3 and 4. What runs beside the trunk is added behind stages 1 and 2."""
        x = F.relu(self.bn1(self.conv1(x), view), inplace=True)  # N x width x H/2 x W/2
        x = self.maxpool(x)
        x = self._stage(self.layer1, x, view)
        x = x if beside1 is None else x + beside1
        c3 = self._stage(self.layer2, x, view)
        c3 = c3 if beside2 is None else c3 + beside2
        c4 = self._stage(self.layer3, c3, view)
        return c3, c4, self._stage(self.layer4, c4, view)

    @staticmethod
    def _stage(blocks: Tensor | nn.Module, x: Tensor, view: int) -> Tensor:
        for block in cast(nn.Sequential, blocks):
            x = block(x, view)
        return x
