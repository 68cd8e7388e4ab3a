"""How a trained network is looked through: once, through all its views, until one is sure, or through other views.

A network that was taught at one scale can be looked through at many: of objects at a foreign size, some view shows them
at the taught one, and it is the surest.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from mvcr_cli.checkpoint import Checkpoint
from mvcr_cli.config import factor_text, parse_views
from mvcr_cli.errors import UsageError
from mvcr_cli.models import Network


def network_looking(checkpoint: Checkpoint, views: str) -> Network:
    """The checkpoint's network, in evaluation mode on the CPU, which looks at pictures as asked; see `parse_views`.

    Raises: UsageError when it cannot look so.
    """
    look, scales = parse_views(views)
    if scales is not None:
        checkpoint = through(checkpoint, scales)
    if look == "auto" and checkpoint.config.zoom is not None:
        raise UsageError("--views auto: a network that zooms always looks at its tiles", "choose --views all or 1")
    network = checkpoint.network()
    network.look = look
    return network


def through(checkpoint: Checkpoint, scales: tuple[float, ...]) -> Checkpoint:
    """The same weights, looked through views of these scales, of which the surest decides.

    Raises: UsageError when the network has no such views.
    """
    config = checkpoint.config
    if config.block is None:
        raise UsageError(f"--views: the model {config.name} has one view", "leave --views out")
    if config.zoom is not None:
        raise UsageError("--views: a network that zooms sees other scales in its tiles", "choose --views all or 1")
    taught = config.scales if config.taught is None else config.taught
    if missing := [factor_text(scale) for scale in taught if scale not in scales]:
        raise UsageError(f"--views: the network was taught at {', '.join(missing)} as well", "name that scale too")
    config = replace(config, scales=scales, taught=taught, surest=len(scales) > 1)
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if not name.startswith("fusion.")}
    if len(scales) > 1:  # these count for nothing when the surest view decides
        tensors |= {"fusion.beta": torch.tensor(1.0), "fusion.log_tau": torch.tensor(math.log(8))}
    return replace(checkpoint, config=config, tensors=tensors)


def first_view(checkpoint: Checkpoint) -> Checkpoint:
    """The view at scale 1 alone, as a network of one view: about a plain ResNet's cost, and a plain ResNet's names."""
    config = replace(checkpoint.config, scales=(1.0,), taught=None, surest=False)
    tensors = {
        name: tensor
        for name, tensor in checkpoint.tensors.items()
        if ".scales." not in name and not name.startswith("fusion.")
    }
    return replace(checkpoint, config=config, tensors=tensors)
