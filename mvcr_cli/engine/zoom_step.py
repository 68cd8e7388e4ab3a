"""What a training step and a verdict of a zooming network do beyond those of a plain one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mvcr_cli.config import TrainConfig
from mvcr_cli.data.preprocess import Preprocess
from mvcr_cli.data.tiles import MARGIN, TileBatch
from mvcr_cli.engine.loss import cross_entropy, multi_scale_loss
from mvcr_cli.engine.schedule import size_at
from mvcr_cli.models.scale_set import make_view, sureness
from mvcr_cli.models.zoom import ZoomResNet, ZoomVerdict, choose

CHANCE = 0.25  # share of a training picture's tiles that is drawn, so that the scorer hears of all kinds
NOISE = 0.5  # on the scores
NOISY_SHARE = 0.3  # of the training, in which it fades out
BRIGHTNESS = 0.2
SURVEYED = 16_000_000  # pixels of candidates in a step; the memory of the survey goes with them


def ranks(network: ZoomResNet, tiles: TileBatch, preprocess: Preprocess) -> Tensor:
    """How promising all candidates are, computed a picture at a time. Shape: (N, C)."""
    pairs = zip(tiles.pixels, tiles.prior, strict=True)
    return torch.stack([network.rank(preprocess.normalise(bag), prior) for bag, prior in pairs])


@torch.no_grad()
def _ranks_in_use(network: ZoomResNet, tiles: TileBatch, preprocess: Preprocess) -> Tensor:
    """`ranks` as they will be in use, for a network that is training. Shape: (N, C).

    Autocast's cache stays out of it: up to torch 2.10 it would keep the weights that were cast here, where no gradient
    is recorded, for the rest of the step, and the scorer would learn nothing.
    """
    device = tiles.pixels.device.type
    network.scorer.eval()
    with torch.autocast(device, enabled=torch.is_autocast_enabled(device), cache_enabled=False):
        scores = ranks(network, tiles, preprocess)
    network.scorer.train()
    return scores


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
    """The glance's loss, the bag's, that of both together, and where tiles are searched for the scorer's own and its
    distance from the attention.

    Glance and bag each learn from their own verdict; how much each counts is learned without touching them, for a
    glance that knows the training pictures by heart would silence the tiles.

    Shape: x (N, 3, H, W), target (N, K) -> ().
    """
    searches = not network.zoom.covers
    if searches:
        scores = _ranks_in_use(network, tiles, preprocess)
        noise = NOISE * max(0.0, 1 - progress / NOISY_SHARE)
        indices = choose(scores, network.zoom.tiles, chance=CHANCE, noise=noise)
    pixels = pick(tiles, indices).pixels if searches else tiles.pixels
    down, across = torch.randint(-MARGIN, MARGIN + 1, (2,)).tolist()
    shown = _lit(_normalised(without_margin(pixels, down, across), preprocess), config.augment.trivial)
    if config.progressive and not searches:
        side = network.zoom.tile_px
        smaller = make_view(shown.flatten(0, 1), size_at(progress, side) / side)
        shown = smaller.view(*shown.shape[:3], *smaller.shape[-2:])
    verdict = network.forward_zoom(x, shown)
    row_weights = None if weights is None else target @ weights
    loss = multi_scale_loss(verdict.glance, verdict.views, target, weights, config.distill)
    loss = loss + cross_entropy(verdict.bag, target, row_weights)
    apart = verdict.glance.detach()
    together = apart + network.beta * (verdict.bag.detach() - apart)
    loss = loss + cross_entropy(together, target, row_weights)
    if not searches:
        return loss
    ranking, rough = _survey(network, tiles, indices, preprocess)
    loss = loss + cross_entropy(rough, target, row_weights)
    return loss + _distance(ranking, verdict.weights.detach())


def _distance(ranking: Tensor, weights: Tensor) -> Tensor:
    """Divergence of the scorer's preference from the attention's, as far as the attention prefers any tile.

    While it knows nothing its weights are equal, and to teach these would undo what the survey teaches.

    Shape: (N, T), (N, T), rows sum to 1 -> ().
    """
    apart = F.kl_div(ranking.log_softmax(-1), weights, reduction="none").sum(-1)
    return (sureness(weights.clamp(min=1e-12).log()) * apart).mean()


def _survey(network: ZoomResNet, tiles: TileBatch, chosen: Tensor,
            preprocess: Preprocess) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Ranks of the chosen (N, T), and verdicts from all candidates (N, K), or as many as fit beside the chosen."""
    count, candidates = tiles.prior.shape
    side = tiles.pixels.shape[-1]
    fitting = max(chosen.shape[1], min(candidates, SURVEYED // (count * side * side)))
    lot = torch.rand_like(tiles.prior).scatter_(1, chosen, -1.0)
    some = pick(tiles, torch.cat((chosen, lot.topk(fitting - chosen.shape[1], 1).indices), 1))
    half = torch.stack([F.avg_pool2d(preprocess.normalise(bag), 2) for bag in some.pixels])
    rank, verdict = network.survey(half, some.prior)
    return rank[:, : chosen.shape[1]], verdict


def _normalised(tiles: Tensor, preprocess: Preprocess) -> Tensor:
    """Shape: (N, T, 3, t, t) uint8 -> float32."""
    return preprocess.normalise(tiles.flatten(0, 1)).view(tiles.shape)


def _lit(tiles: Tensor, probability: float) -> Tensor:
    """The tiles of some pictures brighter or darker, and with more or less contrast. Shape: (N, T, 3, t, t)."""
    draws = torch.rand(3, tiles.shape[0], 1, 1, 1, 1).to(tiles.device)
    strength = BRIGHTNESS * (draws[2] < probability)
    gain = 1 + strength * (2 * draws[0] - 1)
    lift = strength * (2 * draws[1] - 1)
    return torch.addcmul(lift, tiles, gain)


@dataclass(frozen=True)
class Glimpse:
    """A verdict and the tiles that it rests on; `chosen` (N, T) are indices of candidates."""

    verdict: ZoomVerdict
    chosen: Tensor


def look(network: ZoomResNet, x: Tensor, tiles: TileBatch, preprocess: Preprocess) -> Glimpse:
    """The verdict of a network in evaluation mode. Shape: x (N, 3, H, W)."""
    if network.zoom.covers:
        chosen = torch.arange(network.zoom.tiles, device=x.device).expand(len(x), -1)
    else:
        chosen = choose(ranks(network, tiles, preprocess), network.zoom.tiles)
        tiles = pick(tiles, chosen)
    shown = _normalised(without_margin(tiles.pixels), preprocess)
    return Glimpse(network.forward_zoom(x, shown), chosen)
