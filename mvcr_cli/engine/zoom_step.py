"""What a training step and a verdict of a zooming network do beyond those of a plain one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mvcr_cli.config import TrainConfig
from mvcr_cli.data.preprocess import Preprocess
from mvcr_cli.data.tiles import MARGIN
from mvcr_cli.engine.loss import cross_entropy, multi_scale_loss
from mvcr_cli.models.zoom import ZoomResNet, ZoomVerdict, choose

CHANCE = 0.25  # share of a training picture's tiles that is drawn, so that the scorer hears of all kinds
NOISY_SHARE = 0.3  # of the training, in which noise on the scores fades out
BRIGHTNESS = 0.2


def scores_of(network: ZoomResNet, tiles: Tensor, preprocess: Preprocess) -> Tensor:
    """The scorer's values of all candidates, a picture at a time. Shape: (N, C, 3, s, s) uint8 -> (N, C)."""
    return torch.stack([network.scorer.tiles(preprocess.normalise(bag)).float() for bag in tiles])


def pick(tiles: Tensor, chosen: Tensor) -> Tensor:
    """Shape: (N, C, 3, s, s), (N, T) -> (N, T, 3, s, s)."""
    return torch.stack([bag[indices] for bag, indices in zip(tiles, chosen, strict=True)])


def without_margin(tiles: Tensor, down: int = 0, across: int = 0) -> Tensor:
    """The inner part of tiles, shifted by up to `MARGIN` pixels. Shape: (..., s, s) -> (..., t, t)."""
    side = tiles.shape[-1] - 2 * MARGIN
    return tiles[..., MARGIN + down : MARGIN + down + side, MARGIN + across : MARGIN + across + side]


def zoom_loss(network: ZoomResNet, x: Tensor, tiles: Tensor, target: Tensor, weights: Tensor | None,
              config: TrainConfig, preprocess: Preprocess, progress: float) -> Tensor:  # fmt: skip
    """The glance's loss, the bag's, that of both together, and the scorer's distance from the attention.

    Glance and bag each learn from their own verdict; how much each counts is learned without touching them, for a
    glance that knows the training pictures by heart would silence the tiles.

    Shape: (N, 3, H, W), (N, C, 3, s, s) uint8, (N, K) -> ().
    """
    with torch.no_grad():
        scores = scores_of(network, tiles, preprocess)
    noise = float(scores.std()) * max(0.0, 1 - progress / NOISY_SHARE)
    chosen = pick(tiles, choose(scores, network.zoom.tiles, chance=CHANCE, noise=noise))
    down, across = torch.randint(-MARGIN, MARGIN + 1, (2,)).tolist()
    shown = _lit(_normalised(without_margin(chosen, down, across), preprocess), config.augment.trivial)
    verdict = network.forward_zoom(x, shown)
    row_weights = None if weights is None else target @ weights
    loss = multi_scale_loss(verdict.glance, verdict.views, target, weights, config.distill)
    loss = loss + cross_entropy(verdict.bag, target, row_weights)
    apart = verdict.glance.detach()
    together = apart + network.beta * (verdict.bag.detach() - apart)
    loss = loss + cross_entropy(together, target, row_weights)
    ranking = scores_of(network, chosen, preprocess).log_softmax(-1)
    return loss + F.kl_div(ranking, verdict.weights.detach(), reduction="batchmean")


def _normalised(tiles: Tensor, preprocess: Preprocess) -> Tensor:
    """Shape: (N, T, 3, t, t) uint8 -> float32."""
    return preprocess.normalise(tiles.flatten(0, 1)).view(tiles.shape)


def _lit(tiles: Tensor, probability: float) -> Tensor:
    """The tiles of some pictures brighter or darker, and with more or less contrast. Shape: (N, T, 3, t, t)."""
    draws = torch.rand(3, tiles.shape[0], 1, 1, 1, 1).to(tiles.device)
    gain = 1 + BRIGHTNESS * (2 * draws[0] - 1)
    lift = BRIGHTNESS * (2 * draws[1] - 1)
    return torch.where(draws[2] < probability, tiles * gain + lift, tiles)


@dataclass(frozen=True)
class Look:
    """A verdict and the tiles that it rests on; `chosen` (N, T) are indices of candidates."""

    verdict: ZoomVerdict
    chosen: Tensor


def look(network: ZoomResNet, x: Tensor, tiles: Tensor, preprocess: Preprocess) -> Look:
    """The verdict of a network in evaluation mode. Shape: (N, 3, H, W), (N, C, 3, s, s) uint8."""
    chosen = choose(scores_of(network, tiles, preprocess), network.zoom.tiles)
    shown = _normalised(without_margin(pick(tiles, chosen)), preprocess)
    return Look(network.forward_zoom(x, shown), chosen)
