"""Batch-norm statistics of the averaged weights, measured anew as evaluation will use them.

While training, they are moving averages over pictures that are augmented and still grow, of weights that still move.

Sources: "PreciseBN", Wu & Johnson 2021 (arXiv 2105.07576).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import nn

from mvcr_cli.data.folder import Sample
from mvcr_cli.data.loader import Input
from mvcr_cli.engine.evaluate import probabilities_of
from mvcr_cli.models import Network
from mvcr_cli.models.zoom import TileScorer

BATCH = 32  # pictures


@torch.no_grad()
def with_precise_norms(
    network: Network, batches: Iterable[tuple[list[Sample], Input]], device: torch.device
) -> Network:
    """A copy in evaluation mode: every batch norm holds the means of its statistics over the batches, each view's by itself.

    Those that no picture passes, and the tile scorer's, which rank places and not pictures, keep theirs.
    """
    network = copy.deepcopy(network).train()
    for part in network.modules():
        if isinstance(part, nn.Dropout | TileScorer):
            part.eval()
    norms = [part for part in network.modules() if isinstance(part, nn.BatchNorm2d) and part.training]
    before = [copy.deepcopy(norm.state_dict()) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches
    for _, x in batches:
        probabilities_of(network, x, device, torch.float32)
    for norm, old in zip(norms, before, strict=True):
        norm.momentum = 0.1
        if not norm.num_batches_tracked:
            norm.load_state_dict(old)
    return network.eval()
