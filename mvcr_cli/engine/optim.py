"""The optimiser, its parameter groups, and the average of the weights that is evaluated and kept."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from mvcr_cli.engine.schedule import ema_decay
from mvcr_cli.models import Network

NEW_PART_BOOST = 10.0


def make_optimiser(network: Network, lr: float, weight_decay: float, new_parts: set[str]) -> AdamW:
    """AdamW with decay on matrices and filters only; parts that pretrained weights did not fill learn ten times faster.

    Every group keeps its share of the peak learning rate in `scale`; `set_lr` multiplies it by the schedule.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        groups.setdefault((parameter.ndim >= 2, name in new_parts), []).append(parameter)
    settings = [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0, "scale": NEW_PART_BOOST if new else 1.0}
        for (decays, new), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
    fused = next(network.parameters()).device.type in ("cpu", "cuda")
    return AdamW(settings, lr=lr, betas=(0.9, 0.99), fused=fused)


def set_lr(optimiser: AdamW, lr: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = lr * group["scale"]


def optimiser_state(optimiser: AdamW) -> dict[str, Tensor]:
    """The moments as flat named tensors: `opt.<parameter>.<moment>`."""
    return {
        f"opt.{index}.{name}": torch.as_tensor(value)
        for index, values in optimiser.state_dict()["state"].items()
        for name, value in values.items()
    }


def load_optimiser_state(optimiser: AdamW, tensors: dict[str, Tensor]) -> None:
    """The counterpart of `optimiser_state`. Raises: ValueError when a parameter's moments are not complete."""
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("opt."):
            _, index, name = key.split(".", 2)
            like = parameters[int(index)]
            moments = state.setdefault(int(index), {})
            if tensor.shape != (() if name == "step" else like.shape):
                raise ValueError(f"{key} has another shape than its parameter")
            moments[name] = tensor if name == "step" else laid_out_like(like, tensor)
    if any(moments.keys() != {"step", "exp_avg", "exp_avg_sq"} for moments in state.values()):
        raise ValueError("the moments of a parameter are not complete")
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def laid_out_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A copy on the parameter's device and in its memory format, which a file does not keep.

    The fused optimiser walks through memory: a moment in another format would be that of other weights.
    """
    return torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False).copy_(tensor)


class WeightAverage:
    """Exponential moving average of weights and batch-norm statistics, in float32, one fused operation a step.

    Args:
        decay: share of the old average that a step keeps; 0 makes the average the network itself.
    """

    def __init__(self, network: Network, decay: float) -> None:
        self.decay = decay
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        pairs = list(zip(self.network.state_dict().values(), network.state_dict().values(), strict=True))
        self._averaged = [(mine, theirs) for mine, theirs in pairs if mine.is_floating_point()]
        self._copied = [(mine, theirs) for mine, theirs in pairs if not mine.is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        weight = 1 - ema_decay(step, self.decay)
        mine, theirs = zip(*self._averaged, strict=True)
        torch._foreach_lerp_(mine, theirs, weight)
        for counter, source in self._copied:
            counter.copy_(source)
