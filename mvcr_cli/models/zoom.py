"""Glance and zoom: the whole picture at trunk size, and small tiles of it at native resolution, through one trunk.

    z_g = the plain network's verdict on the glance            e_i = pool(trunk(tile i)), own batch-norm set
    a_i = w . (tanh(V e_i) * sigmoid(U e_i))                   p = softmax(a) over the tiles of a picture
    z_t = fc(sum_i p_i e_i)                                    z = z_g + beta (z_t - z_g)

Which tiles are looked at is decided before: SIFT's detector and a grid propose them, and a small convolutional scorer
(`TileScorer`) ranks what was proposed and finds further ones where edges are everywhere. It learns from the attention,
and before the attention knows anything, from a rough verdict of its own on all candidates at once (`survey`).

Sources: gated attention, Ilse et al. 2018 (arXiv 1802.04712); selection by the attention's own scores, Bergner et al.
2023 (IPS, arXiv 2210.05358), here by a scorer a hundredth of the trunk's cost; the survey is a mixture of experts
(Jacobs et al. 1991) over places. Where the tiles cover the picture (`ZoomConfig.covers`) there is no choice, and the scorer
has no part.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mvcr_cli.config import ModelConfig
from mvcr_cli.models.mvcr import MultiScaleResNet

ATTENTION_WIDTH = 64
SCORER_WIDTHS = (12, 16)  # the cost of searching a picture goes with them


class GatedAttention(nn.Module):
    """One logit a tile. Shape: (N, T, C) -> (N, T)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.value = nn.Linear(channels, ATTENTION_WIDTH)
        self.gate = nn.Linear(channels, ATTENTION_WIDTH)
        self.score = nn.Linear(ATTENTION_WIDTH, 1)
        nn.init.zeros_(self.score.weight)  # every tile counts the same at first
        nn.init.zeros_(self.score.bias)

    def forward(self, e: Tensor) -> Tensor:
        hidden = torch.tanh(self.value(e)) * torch.sigmoid(self.gate(e))
        logits: Tensor = self.score(hidden)[..., 0]
        return logits


class TileScorer(nn.Module):
    """How promising a place is, from the picture at half size: three small convolutions without padding.

    One value looks at 17 x 17 pixels of the half-size picture (34 native ones) and the next is 4 (8 native) further, so
    that a picture in strips gives the same values as whole. A tile's score is its best value. Without batch norm, what all
    places have in common, such as brightness, would hide what they differ in.

    Shape: (N, 3, h, w), normalised -> (N, (h - 13) // 4, (w - 13) // 4).
    """

    REACH = 17
    STRIDE = 4

    def __init__(self) -> None:
        super().__init__()
        widths = SCORER_WIDTHS
        self.conv1, self.bn1 = nn.Conv2d(3, widths[0], 5, 2, bias=False), nn.BatchNorm2d(widths[0])
        self.conv2, self.bn2 = nn.Conv2d(widths[0], widths[1], 3, 2, bias=False), nn.BatchNorm2d(widths[1])
        self.conv3, self.bn3 = nn.Conv2d(widths[1], widths[1], 3, bias=False), nn.BatchNorm2d(widths[1])
        self.score = nn.Conv2d(widths[1], 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.score(self.features(x))[:, 0]
        return scores

    def features(self, x: Tensor) -> Tensor:
        """What the places look like. Shape: (N, 3, h, w) -> (N, C, h', w')."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        return F.relu(self.bn3(self.conv3(x)), inplace=True)

    @classmethod
    def shape(cls, of: torch.Size) -> tuple[int, int, int]:
        """What `forward` gives for a picture of a shape."""
        rows, columns = ((side - cls.REACH) // cls.STRIDE + 1 for side in of[-2:])
        return of[0], rows, columns


class SearchScorer(nn.Module):
    """A `TileScorer` for searching whole pictures, at half the cost: its convolutions do what is linear beside them.

        conv((x - mean) / std), without padding, is a convolution of x, and so is a batch norm of it in use

    Args:
        mean, std: of the normalised pixels that the scorer was trained on, one value a channel.

    Shape: (N, 1 or 3, h, w) in [0, 1] -> (N, (h - 13) // 4, (w - 13) // 4), as `TileScorer` up to rounding.
    """

    def __init__(self, scorer: TileScorer, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        scorer = copy.deepcopy(scorer).cpu().eval().requires_grad_(False)
        first, second, third = (
            fuse_conv_bn_eval(convolution, norm)
            for convolution, norm in (
                (scorer.conv1, scorer.bn1),
                (scorer.conv2, scorer.bn2),
                (scorer.conv3, scorer.bn3),
            )
        )
        assert first.bias is not None
        first.weight /= torch.tensor(std).view(3, 1, 1)
        first.bias -= (first.weight * torch.tensor(mean).view(3, 1, 1)).sum((1, 2, 3))
        # Of a grey picture all three channels are equal, which is one channel with the sum of their weights.
        self.colour, self.grey = first, copy.deepcopy(first)
        self.grey.weight = nn.Parameter(first.weight.sum(1, keepdim=True), requires_grad=False)
        self.grey.in_channels = 1
        self.layers = nn.Sequential(nn.ReLU(True), second, nn.ReLU(True), third, nn.ReLU(True), scorer.score)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        first = self.grey if x.shape[1] == 1 else self.colour
        scores: Tensor = self.layers(first(x.contiguous(memory_format=torch.channels_last)))[:, 0]
        return scores


@dataclass(frozen=True)
class ZoomVerdict:
    """What a picture's glance and tiles say.

    Shape: logits, glance, bag (N, K); views: S times (N, K); weights (N, T), rows sum to 1; features (N, T, C).
    """

    logits: Tensor
    glance: Tensor
    views: list[Tensor]
    bag: Tensor
    weights: Tensor
    features: Tensor


class ZoomResNet(MultiScaleResNet):
    """A `MultiScaleResNet` that also looks at tiles; `forward` alone is the glance.

    `finder` is a frozen copy of `scorer` that searches whole pictures. It changes a few times a run only, so that what
    it found may be kept, and travels in the checkpoint, so that every command proposes the same tiles.
    """

    lessons: Tensor

    def __init__(self, config: ModelConfig, *, exact: bool = False) -> None:
        assert config.zoom is not None
        super().__init__(config, exact=exact)
        self.zoom = config.zoom
        self.attention = GatedAttention(self.channels[3])
        self.scorer = TileScorer()
        self.sketch = nn.Conv2d(SCORER_WIDTHS[1], config.classes, 1)  # a rough verdict on every place of the scorer
        self.finder = TileScorer().requires_grad_(False).eval()
        self.register_buffer("lessons", torch.tensor(0))  # how often the finder has learned
        self.beta = nn.Parameter(torch.tensor(0.5))
        self.trust = nn.Parameter(torch.tensor(1.0))  # in SIFT's detector, beside the scorer

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.finder.eval()
        return self

    def teach_finder(self, scorer: TileScorer) -> None:
        """From now on whole pictures are searched with a copy of `scorer`."""
        self.finder.load_state_dict(scorer.state_dict())
        self.lessons += 1

    def learned_proposal(self, mean: Sequence[float], std: Sequence[float]) -> SearchScorer | None:
        """What finds tiles beside SIFT's detector and the grid, on the CPU, where pictures are; None before it has learned."""
        return SearchScorer(self.finder, mean, std) if int(self.lessons) else None

    def rank(self, tiles: Tensor, prior: Tensor) -> Tensor:
        """How promising the candidates of one picture are. Shape: (C, 3, s, s), (C,) -> (C,)."""
        scores: Tensor = self.scorer(F.avg_pool2d(tiles, 2)).amax((1, 2))
        return scores.float() + self.trust * prior

    def survey(self, half: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        """`rank`, and verdicts on the pictures from all candidates: of every place, as much as its score says.

            log p = logsumexp_i (log softmax(s)_i + log softmax(sketch(f_i)))        over the places i of all tiles

        Unlike the attention it needs no choice of tiles, so it can teach the scorer what to choose.

        Args:
            half: candidates at half their size, normalised, (N, C, 3, h, w).
            prior: (N, C).

        Shape: (N, C), (N, K).
        """
        f = self.scorer.features(half.flatten(0, 1))
        s = self.scorer.score(f)[:, 0].float().unflatten(0, half.shape[:2])  # N x C x h' x w'
        said = self.sketch(f).float().log_softmax(1).unflatten(0, half.shape[:2])  # N x C x K x h' x w'
        counts = s.flatten(1).log_softmax(1).view_as(s)
        return s.amax((2, 3)) + self.trust * prior, (said + counts[:, :, None]).logsumexp((1, 3, 4))

    def encode(self, tiles: Tensor) -> Tensor:
        """Features of tiles. Shape: (M, 3, t, t) -> (M, C)."""
        features: Tensor = self.pool(self.features(tiles, len(self.taught))[2])
        return features

    def judge_bag(self, e: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and attention weights of bags of tile features. Shape: (N, T, C) -> (N, K), (N, T)."""
        weights = self.attention(e.float()).softmax(-1)
        pooled = (weights[..., None] * e).sum(1)
        logits: Tensor = self.fc(self.drop(pooled))
        return logits, weights

    def forward_zoom(self, x: Tensor, tiles: Tensor) -> ZoomVerdict:
        """The verdict on pictures and the tiles that were chosen.

        Args:
            x: glances, (N, 3, H, W), normalised.
            tiles: (N, T, 3, t, t), normalised.
        """
        glance, views = self.forward_views(x)
        e = self.encode(tiles.flatten(0, 1)).view(*tiles.shape[:2], -1)  # N x T x C
        bag, weights = self.judge_bag(e)
        logits = glance + self.beta * (bag - glance)
        return ZoomVerdict(logits, glance, views, bag, weights, e)


def choose(scores: Tensor, count: int, *, chance: float = 0.0, noise: float = 0.0) -> Tensor:
    """Indices of the tiles to look at: the highest scores, and a share drawn from the rest by chance.

    Args:
        chance: share of the chosen that is drawn.
        noise: Gumbel noise on the scores, in units of the scores.

    Shape: (N, C) -> (N, count).
    """
    drawn = round(count * chance)
    if noise:
        scores = scores - noise * torch.rand_like(scores).clamp(1e-9, 1 - 1e-7).log().neg().log()
    best = scores.topk(count - drawn, 1).indices
    if not drawn:
        return best
    lot = torch.rand_like(scores).scatter_(1, best, -1.0)
    return torch.cat((best, lot.topk(drawn, 1).indices), 1)
