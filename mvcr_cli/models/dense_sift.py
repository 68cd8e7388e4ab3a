"""Dense RootSIFT: fixed gradient histograms on a grid, as one more input of the trunk."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvcr_cli.config import IMAGENET_STD
from mvcr_cli.models.scale_aware import ScaleBatchNorm2d

ORIENTATIONS, CELLS = 8, 4
DESCRIPTOR = ORIENTATIONS * CELLS * CELLS
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
CLIP = 0.2
FAINT = 1e-3  # norm at which a descriptor is halved; noise of one grey level has about 0.1, that of rounding 1e-5
TINY = 1e-12  # keeps the gradient of a root of nothing finite


class DenseRootSift(nn.Module):
    """A RootSIFT descriptor every `stride` pixels; nothing is learned.

        g   = central differences of the luma,    m = |g|
        h_k = m relu(g . u_k / m)^8               u_k = 8 directions, 45 degrees apart
        d   = 4x4 cells of stride/2 pixels (at least 2), h pooled into them with a triangle as wide as two cells
        n   = |d|_2;  d <- min(d / n, 0.2);  d <- sqrt(d / |d|_1) n / (n + 0.001)

    The eighth power stands for SIFT's linear interpolation between directions: it is 1 on the direction, 0.53 halfway to
    the next and 0.06 on the next, and needs no angle. There is no Gaussian window, as is usual on a grid, and no
    rotation to a dominant direction. The last factor leaves nothing of a patch without contrast. Channel 16 k + 4 r + c
    is direction k in row r and column c of the patch, whose middle is pixel `stride` i, as a trunk's cell has its own.

    Shape: (N, 3, H, W), normalised -> (N, 128, ceil(H / stride), ceil(W / stride)), float32.
    Sources: Lowe 2004 (SIFT); Arandjelović and Zisserman 2012 (RootSIFT).
    """

    luma: Tensor
    directions: Tensor
    pooling: Tensor
    patches: Tensor

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.cell, self.stride = max(2, stride // 2), stride
        # The luma is that of the pixels up to a constant, which no difference sees.
        self.register_buffer("luma", (torch.tensor(LUMA) * torch.tensor(IMAGENET_STD)).view(3, 1, 1), persistent=False)
        angles = torch.arange(ORIENTATIONS) * (2 * math.pi / ORIENTATIONS)
        directions = torch.stack([angles.cos(), angles.sin()]).view(2, ORIENTATIONS, 1, 1)
        self.register_buffer("directions", directions, persistent=False)
        ramp = 1 - torch.arange(1 - self.cell, self.cell).abs() / self.cell  # 2 cell - 1 taps
        self.register_buffer("pooling", torch.outer(ramp, ramp).repeat(ORIENTATIONS, 1, 1, 1), persistent=False)
        places = torch.eye(CELLS * CELLS).view(CELLS * CELLS, 1, CELLS, CELLS)
        self.register_buffer("patches", places.repeat(ORIENTATIONS, 1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        histogram = self._histogram((x.float() * self.luma).sum(1, keepdim=True))  # N x 8 x H x W
        # Cells have their middles at -1.5, -0.5, 0.5 and 1.5 cells from the patch's. With this margin every patch whose
        # middle is in the picture has all of its cells, and no other patch does, whatever the picture's size.
        margin = 5 * self.cell // 2 - 1
        histogram = F.pad(histogram, (margin, margin, margin, margin))
        cells = F.conv2d(histogram, self.pooling.to(histogram.dtype), stride=self.cell, groups=ORIENTATIONS)
        d = F.conv2d(cells, self.patches.to(cells.dtype), stride=self.stride // self.cell,
                     groups=ORIENTATIONS).float()  # fmt: skip  # N x 128 x H/s x W/s
        norm = (d.square().sum(1, keepdim=True) + TINY).sqrt()
        d = (d / norm).clamp(max=CLIP)
        d = (d / d.sum(1, keepdim=True).clamp(min=CLIP) + TINY).sqrt()  # what is not flat sums to CLIP at least
        return d * (norm / (norm + FAINT))

    def _histogram(self, luma: Tensor) -> Tensor:
        """Gradient magnitude, shared among the directions. Shape: (N, 1, H, W) -> (N, 8, H, W)."""
        padded = F.pad(luma, (1, 1, 1, 1), mode="replicate")
        across = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
        down = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
        magnitude = (across.square() + down.square() + TINY).sqrt()
        cosine = (across * self.directions[0] + down * self.directions[1]).relu() / magnitude
        return magnitude * cosine.square().square().square()


class SiftBranch(nn.Module):
    """`BN(P d)` of the dense descriptors d, to be added to a map of the trunk; 0 at the start, because BN's gain is.

    Every view of the scale set has its own batch norm.

    Shape: (N, 3, H, W), normalised -> (N, C, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, channels: int, stride: int, views: int) -> None:
        super().__init__()
        self.descriptor = DenseRootSift(stride)
        self.project = nn.Conv2d(DESCRIPTOR, channels, 1, bias=False)
        self.norm = ScaleBatchNorm2d(channels, views)

    def forward(self, x: Tensor, view: int) -> Tensor:
        result: Tensor = self.norm(self.project(self.descriptor(x)), view)
        return result

    def start_neutral(self) -> None:
        for norm in (self.norm, *self.norm.scales):
            nn.init.zeros_(norm.weight)
