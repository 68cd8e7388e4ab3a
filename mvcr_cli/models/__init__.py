"""The family: `mvcr*` with a scale set, `resnet*` as the same code with one view, and `cnn`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mvcr_cli.config import SACS_STAGES, Block, Layer, ModelConfig, Stem, check_preset
from mvcr_cli.errors import CheckpointError
from mvcr_cli.models.cnn import SmallCNN
from mvcr_cli.models.mvcr import MultiScaleResNet, is_useful, private_scales
from mvcr_cli.models.zoom import ZoomResNet

Network = MultiScaleResNet | SmallCNN


@dataclass(frozen=True)
class Trunk:
    block: Block
    depths: tuple[int, int, int, int]
    width: int


TRUNKS = {
    "10n": Trunk("basic", (1, 1, 1, 1), 32),
    "14n": Trunk("basic", (1, 2, 2, 1), 32),
    "10": Trunk("basic", (1, 1, 1, 1), 64),
    "18": Trunk("basic", (2, 2, 2, 2), 64),
    "34": Trunk("basic", (3, 4, 6, 3), 64),
    "50": Trunk("bottleneck", (3, 4, 6, 3), 64),
}
DEFAULT_SCALES = (1.0, 0.5)
DEFAULT_LAYERS: tuple[Layer, ...] = ("blur", "gem")


def config_for(name: str, classes: int, *, scales: tuple[float, ...] | None = None,
               stem: Stem = "imagenet", layers: tuple[Layer, ...] | None = None) -> ModelConfig:  # fmt: skip
    """The `ModelConfig` of a preset; `scales` and `layers` replace the preset's own."""
    check_preset(name)
    if name == "cnn":
        return ModelConfig(name=name, classes=classes, block=None, depths=(), width=32, drop=0.5)
    multi = name.startswith("mvcr")
    trunk = TRUNKS[name.removeprefix("mvcr" if multi else "resnet")]
    if layers is None:
        layers = DEFAULT_LAYERS if multi else ()
    return ModelConfig(
        name=name,
        classes=classes,
        block=trunk.block,
        depths=trunk.depths,
        width=trunk.width,
        scales=scales or (DEFAULT_SCALES if multi else (1.0,)),
        stem=stem,
        blur="blur" in layers,
        gem="gem" in layers,
        max="max" in layers,
        heads="heads" in layers,
        sacs=SACS_STAGES if "sacs" in layers else (),
        detail="detail" in layers,
        sift="sift" in layers,
    )


def useful_scales(scales: tuple[float, ...], imgsz: int, stem: Stem) -> tuple[float, ...]:
    """The scales whose views are large enough at this picture size."""
    return tuple(scale for scale in scales if is_useful(imgsz, scale, stem))


def plain_twin(name: str) -> str | None:
    """The plain ResNet of the same depth: `mvcr18` -> `resnet18`."""
    return name.replace("mvcr", "resnet") if name.startswith("mvcr") else None


def build(config: ModelConfig, *, exact: bool = False) -> Network:
    """The network of a config, randomly initialised; `exact`: see `MultiScaleResNet`."""
    if config.block is None:
        return SmallCNN(config)
    return MultiScaleResNet(config, exact=exact) if config.zoom is None else ZoomResNet(config, exact=exact)


def load_trunk(network: Network, state: dict[str, Tensor], of: ModelConfig | None = None) -> list[str]:
    """Load the weights of a ResNet (torchvision, timm or mvcr) into a network.

    A private batch norm goes to the same scale, or by its number when `of` does not tell the scales. Every one that `state`
    does not have starts as a copy of the plain one. What only a zooming network has is taken where both zoom; how often its
    own proposal has learned is counted anew.

    A last layer of another size is left as it is: the new classes are not those of the weights.

    Args:
        of: the network that `state` was taken from, when it is known.

    Returns: names that were not loaded from `state` (new parts and, if its size differs, `fc`).
    Raises: CheckpointError when `state` is no ResNet of this depth and width.
    """
    if of is not None:
        state = _renumbered(state, private_scales(of), private_scales(network.config))
    own = network.state_dict()
    loaded: dict[str, Tensor] = {}
    for name, tensor in own.items():
        source = state.get(name, state.get(_plain_name(name)))
        if source is not None and source.shape == tensor.shape and name != "lessons":
            loaded[name] = source
    missing = [name for name in own if name not in loaded]
    trunk = [name for name in missing if name.split(".")[0] in _TRUNK_PARTS and not name.endswith(_OPTIONAL)]
    # Views and tiles that this network does not have, and their vote, are no part of the trunk.
    foreign = [name for name in state if _plain_name(name) not in own and name.split(".")[0] not in _BESIDE_TRUNK]
    if trunk or foreign:
        example = (trunk or foreign)[0]
        raise CheckpointError(
            f"the weights do not fit {network.config.name}: {len(trunk)} tensors are missing or of another shape and "
            f"{len(foreign)} are unknown, for example {example!r}",
            "choose the model with the same depth and --layers, for example --model mvcr50 for ResNet-50 weights",
        )
    network.load_state_dict(loaded, strict=False)
    return missing


_OPTIONAL = ("blur.t", "conv2.alpha", "conv2.gate_weight", "conv2.gate_bias", "num_batches_tracked")
# The counter is not in files from before 2018, and decides nothing; the others start without effect.
_BESIDE_TRUNK = ("fc", "fusion", "attention", "scorer", "sketch", "finder", "lessons", "beta", "trust")
_TRUNK_PARTS = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "features", "dense")


def _renumbered(state: dict[str, Tensor], was: list[float | None], now: list[float | None]) -> dict[str, Tensor]:
    """The private batch norms under the numbers that their scales have now; those of other scales are left out."""
    renumbered = {}
    for name, tensor in state.items():
        head, private, tail = name.partition(".scales.")
        if private:
            old, _, parameter = tail.partition(".")
            scale = was[int(old) + 1] if old.isdecimal() and int(old) + 1 < len(was) else math.nan
            if scale not in now:
                continue
            name = f"{head}.scales.{now.index(scale) - 1}.{parameter}"
        renumbered[name] = tensor
    return renumbered


def _plain_name(name: str) -> str:
    """`layer1.0.bn1.scales.0.weight` -> `layer1.0.bn1.weight`."""
    head, found, tail = name.partition(".scales.")
    return f"{head}.{tail.split('.', 1)[1]}" if found else name


def parameter_count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def mac_count(network: nn.Module, side: int) -> int:
    """Multiply-accumulates of one picture of `side` pixels in convolutions and matrix products, by torch's counter."""
    device = next(network.parameters()).device
    was_training = network.training
    count = mac_count_of(lambda: network.eval()(torch.zeros(1, 3, side, side, device=device)))
    network.train(was_training)
    return count


def mac_count_of(work: Callable[[], object]) -> int:
    """Multiply-accumulates of any work, as `mac_count`."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        work()
    return counter.get_total_flops() // 2
