"""The detail view: a thin branch that sees the picture at twice the trunk's size."""

from __future__ import annotations

from torch import Tensor, nn

from mvcr_cli.config import Stem
from mvcr_cli.models.resnet import STEMS, BasicBlock

WIDTHS = (16, 32, 64)


class DetailBranch(nn.Module):
    """Fine detail for a trunk that looks at half the picture's size.

    A thin ResNet of 3x3 convolutions runs on the whole picture; its maps join the trunk where they meet it cell for
    cell, behind stages 1 and 2, through 1x1 convolutions that are 0 at the start, so that the trunk starts as it was:

        c_k <- c_k + P_k d_k,    P_k = 0 at the start,    k = 1, 2

    Rounding up at every stride of two, both sides count the same cells whatever the picture's size.

    Args:
        channels1, channels2: of the trunk's stages 1 and 2.
        stem: the trunk's, whose stride the branch follows.

    Shape: (N, 3, H, W) -> maps of the trunk's stages 1 and 2 for (N, 3, H/2, W/2).
    Sources: Big-Little Net, Chen et al. 2019 (arXiv 1807.03848), which merges at every stage; here as a side branch
    that a pretrained trunk does not notice at the start.
    """

    def __init__(self, channels1: int, channels2: int, stem: Stem) -> None:
        super().__init__()
        first, second, third = WIDTHS
        again = [_reduce(first, first, 2)] if stem == "imagenet" else []
        self.stem = nn.Sequential(_reduce(3, first, STEMS[stem][1]), *again)
        self.fine = BasicBlock(first, first, 1, 1, None)
        self.middle = BasicBlock(first, second, 2, 1, None)
        self.coarse = BasicBlock(second, third, 2, 1, None)
        self.join1 = nn.Conv2d(second, channels1, 1, bias=False)
        self.join2 = nn.Conv2d(third, channels2, 1, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.fine(self.stem(x), 0)  # N x 16 x H/4 x W/4; "small" stem: half that stride; "fine": a quarter
        middle = self.middle(x, 0)  # N x 32 x H/8 x W/8
        return self.join1(middle), self.join2(self.coarse(middle, 0))

    def start_neutral(self) -> None:
        for join in (self.join1, self.join2):
            nn.init.zeros_(join.weight)


def _reduce(channels: int, out: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out), nn.ReLU(inplace=True))
