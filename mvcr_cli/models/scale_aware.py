"""Layers that know about scale, each exact at a neutral start, so that a plain ResNet's weights keep their meaning."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ScaleBatchNorm2d(nn.BatchNorm2d):
    """Batch norm with private statistics and affine terms for every view of the scale set.

    View 0 keeps the plain names (`weight`, `running_mean`, ...); view k > 0 lives in `scales.{k-1}`.
    With one view this is exactly `nn.BatchNorm2d`.

    Sources: private batch norm of resolution-switchable networks, Wang et al. 2020 (arXiv 2007.09558).
    """

    def __init__(self, channels: int, views: int) -> None:
        super().__init__(channels)
        self.scales = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(views - 1))

    def of(self, view: int) -> nn.BatchNorm2d:
        """The private set of a view."""
        return self if view == 0 else cast(nn.BatchNorm2d, self.scales[view - 1])

    def forward(self, x: Tensor, view: int = 0) -> Tensor:
        if view == 0:
            return super().forward(x)
        normalised: Tensor = self.scales[view - 1](x)
        return normalised


class SoftBlur(nn.Module):
    """Low-pass filter before a strided convolution: `x + t (B * x - x)` with B the 3x3 binomial kernel.

    `t` is one learned scalar: 0 is the identity, 1 a full blur. Computed as one depthwise convolution with the kernel
    `d + t (B - d)`, where d is 1 at the centre and 0 around it.

    Shape: (N, C, H, W) -> (N, C, H, W).
    Sources: anti-aliased CNNs, Zhang 2019 (arXiv 1904.11486); here on the block's input, so that the residual
    branch and the shortcut share one blur, and with a learned strength.
    """

    centre: Tensor
    change: Tensor

    def __init__(self, channels: int, strength: float) -> None:
        super().__init__()
        self.channels = channels
        # Numbers, not arithmetic on tensors: on the "meta" device that would load torch's compiler, 100 MB and a second.
        centre = [[float(y == x == 1) for x in range(3)] for y in range(3)]
        change = [[y * x / 16 for x in (1.0, 2.0, 1.0)] for y in (1.0, 2.0, 1.0)]
        change[1][1] -= 1
        self.register_buffer("centre", torch.tensor([[centre]]), persistent=False)  # 1 x 1 x 3 x 3
        self.register_buffer("change", torch.tensor([[change]]), persistent=False)
        self.t = nn.Parameter(torch.tensor(float(strength)))

    def forward(self, x: Tensor) -> Tensor:
        kernel = (self.centre + self.t * self.change).to(x.dtype).expand(self.channels, 1, 3, 3)
        padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
        return F.conv2d(padded, kernel, groups=self.channels)


class ScaleAwareConv2d(nn.Conv2d):
    """A 3x3 convolution that may replace the coarse band of its response by that of the same filter one octave up.

        y1 = W * x                 D = mean over 2x2, stride 2
        g  = sigmoid(V * D(x))     V a 1x1 convolution to one channel, 0 at the start, so g = 1/2
        y  = y1 + Up( alpha g (W * D(x) - D(y1)) )

    alpha, one number a channel, says how much, and g where. alpha = 0 is the plain convolution, whose name and shape
    `weight` keeps. alpha learns from the first step on, V from the second.

    Shape: (N, C, H, W) -> (N, C_out, H, W); stride 1.
    Sources: switchable atrous convolution, Qiao et al. 2021 (arXiv 2006.02334), here with blur and decimation in the
    place of dilation, which aliases less and costs a quarter of the second pass; deep scale-spaces, Worrall and
    Welling 2019 (arXiv 1905.11697).
    """

    def __init__(self, channels: int, out: int, strength: float) -> None:
        super().__init__(channels, out, 3, 1, 1, bias=False)
        self.alpha = nn.Parameter(torch.full((out,), float(strength)))
        self.gate_weight = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.gate_bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        fine = super().forward(x)
        coarse = octave_up(x)  # N x C x H/2 x W/2
        change = super().forward(coarse) - octave_up(fine)
        gate = F.conv2d(coarse, self.gate_weight, self.gate_bias).sigmoid()
        # Cast: float32 factors would promote a bfloat16 map to float32, at several times the cost.
        change = change * (self.alpha.view(-1, 1, 1).to(change.dtype) * gate.to(change.dtype))
        return fine + F.interpolate(change, size=fine.shape[-2:], mode="bilinear", align_corners=False)


def octave_up(x: Tensor) -> Tensor:
    """The map at half its sides, rounded up: means over 2x2, at odd edges over what is there."""
    return F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)


class GeM(nn.Module):
    """Generalised-mean pooling over space: `mean(x^p)^(1/p)`; p = 1 is the average, p -> inf the maximum.

    Shape: (N, C, H, W) -> (N, C).
    Sources: Radenović et al. 2018 (arXiv 1711.02512).
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(float(p)))

    def forward(self, x: Tensor) -> Tensor:
        # Powers in float32: half precision under- and overflows. The floor keeps the gradient of 0^p finite.
        powered = x.float().clamp(min=1e-6).pow(self.p).mean((2, 3))
        return powered.pow(1 / self.p)


class MaxPool(nn.Module):
    """The maximum over space: how much of the picture an object covers does not count.

    A mean grows with the object's area, and with it the logits: of several views, the one with the largest object would
    be the surest for no other reason.

    Shape: (N, C, H, W) -> (N, C).
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.amax((2, 3))


class AveragePool(nn.Module):
    """Mean over space. Shape: (N, C, H, W) -> (N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))
