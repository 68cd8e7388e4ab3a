"""What a training step and a verdict of a zooming network do beyond those of a plain one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mvcr_cli.config import TrainConfig
from mvcr_cli.data.preprocess import Preprocess
from mvcr_cli.data.tiles import MARGIN, TileBatch
from mvcr_cli.engine.loss import cross_entropy, multi_scale_loss
from mvcr_cli.models.zoom import ZoomResNet, ZoomVerdict, choose

CHANCE = 0.25  # share of a training picture's tiles that is drawn, so that the scorer hears of all kinds
NOISE = 0.5  # on the scores
NOISY_SHARE = 0.3  # of the training, in which it fades out
BRIGHTNESS = 0.2


def ranks(network: ZoomResNet, tiles: TileBatch, preprocess: Preprocess) -> Tensor:
    """How promising all candidates are, computed a picture at a time. Shape: (N, C)."""
    pairs = zip(tiles.pixels, tiles.prior, strict=True)
    return torch.stack([network.rank(preprocess.normalise(bag), prior) for bag, prior in pairs])


def survey(network: ZoomResNet, tiles: TileBatch, preprocess: Preprocess) -> tuple[Tensor, Tensor]:
    """Ranks of all candidates and the scorer's own verdicts, with gradients, in the memory of one picture.

    Shape: (N, C), (N, K).
    """

    def one(bag: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
        return network.survey(preprocess.normalise(bag), prior)

    pairs = zip(tiles.pixels, tiles.prior, strict=True)
    found = [checkpoint(one, *pair, use_reentrant=False, preserve_rng_state=False) for pair in pairs]
    return torch.stack([rank for rank, _ in found]), torch.stack([verdict for _, verdict in found])


def pick(tiles: TileBatch, chosen: Tensor) -> TileBatch:
    """The chosen candidates, (N, T)."""
    pixels = torch.stack([bag[indices] for bag, indices in zip(tiles.pixels, chosen, strict=True)])
    return TileBatch(pixels, tiles.prior.gather(1, chosen))


def without_margin(tiles: Tensor, down: int = 0, across: int = 0) -> Tensor:
    """The inner part of tiles, shifted by up to `MARGIN` pixels. Shape: (..., s, s) -> (..., t, t)."""
    side = tiles.shape[-1] - 2 * MARGIN
    return tiles[..., MARGIN + down : MARGIN + down + side, MARGIN + across : MARGIN + across + side]


def zoom_loss(network: ZoomResNet, x: Tensor, tiles: TileBatch, target: Tensor, weights: Tensor | None,
              config: TrainConfig, preprocess: Preprocess, progress: float) -> Tensor:  # fmt: skip
    """The glance's loss, the bag's, that of both together, the scorer's own, and its distance from the attention.

    Glance and bag each learn from their own verdict; how much each counts is learned without touching them, for a
    glance that knows the training pictures by heart would silence the tiles.

    Shape: x (N, 3, H, W), target (N, K) -> ().
    """
    scores, sketched = survey(network, tiles, preprocess)
    noise = NOISE * max(0.0, 1 - progress / NOISY_SHARE)
    indices = choose(scores.detach(), network.zoom.tiles, chance=CHANCE, noise=noise)
    down, across = torch.randint(-MARGIN, MARGIN + 1, (2,)).tolist()
    shown = _lit(
        _normalised(without_margin(pick(tiles, indices).pixels, down, across), preprocess), config.augment.trivial
    )
    verdict = network.forward_zoom(x, shown)
    row_weights = None if weights is None else target @ weights
    loss = multi_scale_loss(verdict.glance, verdict.views, target, weights, config.distill)
    loss = loss + cross_entropy(verdict.bag, target, row_weights)
    apart = verdict.glance.detach()
    together = apart + network.beta * (verdict.bag.detach() - apart)
    loss = loss + cross_entropy(together, target, row_weights)
    loss = loss + cross_entropy(sketched, target, row_weights)
    ranking = scores.gather(1, indices).log_softmax(-1)
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
class Glimpse:
    """A verdict and the tiles that it rests on; `chosen` (N, T) are indices of candidates."""

    verdict: ZoomVerdict
    chosen: Tensor


def look(network: ZoomResNet, x: Tensor, tiles: TileBatch, preprocess: Preprocess) -> Glimpse:
    """The verdict of a network in evaluation mode. Shape: x (N, 3, H, W)."""
    chosen = choose(ranks(network, tiles, preprocess), network.zoom.tiles)
    shown = _normalised(without_margin(pick(tiles, chosen).pixels), preprocess)
    return Glimpse(network.forward_zoom(x, shown), chosen)
