"""The scale set: which views of a picture the network sees, how they are made, and how their verdicts are fused."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def view_side(side: int, scale: float) -> int:
    """Pixels of the view of a `side`-pixel picture at `scale`."""
    return max(1, math.floor(side * scale + 0.5))


def resize_matrix(line: Tensor, target: Tensor | int, pixels: int, offset: Tensor | int = 0) -> Tensor:
    """Rows of triangle-filter weights: `resize_matrix(x, m, m) @ x` resizes a length-n signal to m samples.

    The filter is bilinear interpolation when enlarging and is stretched by n/m when shrinking (antialiased), the
    same as Pillow's BILINEAR and `F.interpolate(..., antialias=True)`. It is plain arithmetic on the length of `line`,
    so that an exported graph computes it for any input size.

    Args:
        line: a signal of n samples; only its length, device and dtype matter.
        target: m, samples that the signal is resized to.
        pixels: rows of the result, at least m, when the resized signal sits in a longer one.
        offset: first row of the resized signal in the longer one; rows outside are zero.

    Shape: (n,) -> (pixels, n).
    """
    ones = torch.ones_like(line)
    ratio = ones.sum() / target
    columns = ones.cumsum(0) - 0.5  # centres of the n samples
    rows = torch.arange(pixels, device=line.device, dtype=line.dtype) - offset
    centres = (rows + 0.5) * ratio
    weights = (1 - (columns[None] - centres[:, None]).abs() / ratio.clamp(min=1)).clamp(min=0)  # pixels x n
    inside = ((rows >= 0) & (rows < target)).to(line.dtype)[:, None]
    return weights / weights.sum(1, keepdim=True).clamp(min=1e-8) * inside


def make_view(x: Tensor, scale: float) -> Tensor:
    """The picture at `scale`, antialiased.

    Shape: (N, C, H, W) -> (N, C, H scale, W scale).
    """
    if scale == 1:
        return x
    inverse = 1 / scale
    if inverse == round(inverse) and x.shape[-1] % round(inverse) == 0 and x.shape[-2] % round(inverse) == 0:
        return F.avg_pool2d(x, round(inverse))
    height, width = (view_side(side, scale) for side in x.shape[-2:])
    down, across = resize_matrix(x[0, 0, :, 0], height, height), resize_matrix(x[0, 0, 0, :], width, width)
    return down @ x @ across.T


def sureness(logits: Tensor) -> Tensor:
    """How sure a verdict is: 1 minus its normalised entropy, from 0 (uniform) to 1 (certain). Shape: (..., K) -> (...)."""
    log_p = logits.float().log_softmax(-1)
    return 1 + (log_p.exp() * log_p).sum(-1) / math.log(max(2, logits.shape[-1]))


class ConfidenceFusion(nn.Module):
    """Views vote with how sure they are: a view at a scale that it cannot judge is ignored, not averaged in.

        c_v = sureness(z_v)
        w   = softmax_v(tau c_v)
        z   = z_1 + beta (sum_v w_v z_v - z_1)

    beta = 0 is the first view alone, which is exactly the plain network; tau is learned, in logarithm. With `surest`, z is
    that of the surest view, whatever beta and tau are: where one view is taught, they never learn.

    Shape: S tensors (N, K) -> (N, K).
    """

    def __init__(self, beta: float, tau: float = 8.0, *, surest: bool = False) -> None:
        super().__init__()
        self.surest = surest
        self.beta = nn.Parameter(torch.tensor(float(beta)))
        self.log_tau = nn.Parameter(torch.tensor(math.log(tau)))

    def forward(self, logits: list[Tensor]) -> Tensor:
        stacked = torch.stack([view.float() for view in logits])  # S x N x K
        weights = self._weights(stacked)
        fused = (weights[..., None] * stacked).sum(0)  # N x K
        return fused if self.surest else stacked[0] + self.beta * (fused - stacked[0])

    def shares(self, logits: list[Tensor]) -> Tensor:
        """How much every view counts in the verdict; they add up to 1. Shape: S tensors (N, K) -> (S, N)."""
        weights = self._weights(torch.stack([view.float() for view in logits]))
        if self.surest:
            return weights
        return torch.cat([1 - self.beta + self.beta * weights[:1], self.beta * weights[1:]])

    def _weights(self, stacked: Tensor) -> Tensor:
        """Shape: (S, N, K) -> (S, N)."""
        certain = sureness(stacked.detach())  # S x N
        if self.surest:
            order = torch.arange(len(stacked), device=stacked.device)
            return (order[:, None] == certain.argmax(0)[None]).to(stacked.dtype)
        return (self.log_tau.exp() * certain).softmax(0)
