"""Network, average and optimiser of one training, and the step that moves them."""

from __future__ import annotations

import contextlib
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from mvcr_cli.config import TrainConfig
from mvcr_cli.data.augment import foreign_scales, mix
from mvcr_cli.data.loader import Batch, stable_seed
from mvcr_cli.data.preprocess import Preprocess
from mvcr_cli.engine import autocast
from mvcr_cli.engine.loss import multi_scale_loss, soft_targets, unsure_loss
from mvcr_cli.engine.optim import WeightAverage, laid_out_like, load_optimiser_state, optimiser_state, set_lr
from mvcr_cli.engine.schedule import doubt_share, lr_factor
from mvcr_cli.engine.zoom_step import zoom_loss
from mvcr_cli.errors import DataError
from mvcr_cli.models import Network
from mvcr_cli.models.zoom import ZoomResNet
from mvcr_cli.paths import display_name

NONFINITE_CHECK_EVERY = 50  # on accelerators, where looking at the loss waits for the device


@dataclass
class Session:
    """What a training step changes. All of it goes into a state, and nothing else does."""

    config: TrainConfig
    network: Network
    average: WeightAverage
    optimiser: AdamW
    preprocess: Preprocess
    device: torch.device
    dtype: torch.dtype
    weights: Tensor | None
    scaler: torch.amp.GradScaler
    held: int = 0  # steps whose gradients wait for the optimiser

    def step(self, batch: Batch, step: int, progress: float) -> Tensor:
        """One forward and backward pass, and the optimiser's move when the accumulation is full.

        Returns: the loss, still on the device. Shape: ().
        Raises: DataError when the loss is not finite.
        """
        config = self.config
        assert config.lr is not None
        torch.manual_seed(stable_seed(config.seed, step, "step"))  # dropout is a function of the step
        x = self.preprocess.normalise(batch.images.to(self.device, non_blocking=True).permute(0, 3, 1, 2))
        target = soft_targets(batch.labels.to(self.device), self.network.config.classes, config.label_smoothing)
        x, target = mix(x, target, config.augment, random.Random(stable_seed(config.seed, step, "mix")))
        with autocast(self.device, self.dtype):
            if isinstance(self.network, ZoomResNet) and batch.tiles is not None:
                tiles = batch.tiles.to(self.device)
                loss = zoom_loss(self.network, x, tiles, target, self.weights, config, self.preprocess, progress)
            else:
                loss = self._loss(x, target, step, progress)
        if self.device.type == "cpu" or step % NONFINITE_CHECK_EVERY == 0:
            self._check(loss, batch, step, progress)
        set_lr(self.optimiser, config.lr * lr_factor(progress, config.warmup))
        self.scaler.scale(loss / config.accumulate).backward()  # type: ignore[no-untyped-call]
        self.held += 1
        if (step + 1) % config.accumulate == 0:
            self._move(step, batch.images.shape[1])
        return loss.detach()

    def _loss(self, x: Tensor, target: Tensor, step: int, progress: float) -> Tensor:
        """The loss of whole pictures and, with --unsure, of half of them at foreign scales: there no view can tell."""
        config, count = self.config, len(x)
        unsure = config.unsure * doubt_share(progress)
        if unsure:
            rng = random.Random(stable_seed(config.seed, step, "foreign"))
            foreign = foreign_scales(x[: max(1, count // 2)], rng)
            x = torch.cat((x, foreign)).contiguous(memory_format=torch.channels_last)
        fused, views = self.network.forward_views(x)
        known = [logits[:count] for logits in views]
        loss = multi_scale_loss(fused[:count], known, target, self.weights, config.distill)
        if unsure:
            loss = loss + unsure * unsure_loss(torch.cat([logits[count:] for logits in views]))
        return loss

    def flush(self, step: int, side: int) -> None:
        """Move by the gradients that wait, if any do: at the end of a run, or when the last picture was unreadable."""
        if self.held:
            self._move(step, side)

    def _move(self, step: int, side: int) -> None:
        self.scaler.unscale_(self.optimiser)
        if self.held < self.config.accumulate:  # their mean, as that of a full accumulation
            gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, self.config.accumulate / self.held)
        self.held = 0
        if self.config.clip:
            clip_grad_norm_(self.network.parameters(), self.config.clip)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad(set_to_none=True)
        self.network.inherit_norms(side)
        self.average.update(step // self.config.accumulate)

    def _check(self, loss: Tensor, batch: Batch, step: int, progress: float) -> None:
        value = loss.item()
        if value == value and abs(value) != float("inf"):
            return
        assert self.config.lr is not None
        names = ", ".join(display_name(path) for path in batch.paths[:8])
        lr = self.config.lr * lr_factor(progress, self.config.warmup)
        raise DataError(
            f"the loss is {value} at step {step} (learning rate {lr:.3g}); "
            f"the batch: {names}{' ...' if len(batch.paths) > 8 else ''}",
            "lower --lr, or look at these pictures; the weights saved before are intact",
        )

    def state(self) -> dict[str, Tensor]:
        """Every tensor that the next step depends on; gradients of a half-full accumulation included."""
        tensors = {f"model.{name}": tensor for name, tensor in self.network.state_dict().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.network.state_dict().items()}
        tensors |= optimiser_state(self.optimiser)
        gradients = {name: p.grad for name, p in self.network.named_parameters() if p.grad is not None}
        return tensors | {f"gradient.{name}": gradient for name, gradient in gradients.items()}

    def scaler_state(self) -> dict[str, Any]:
        return self.scaler.state_dict()

    def load_state(self, tensors: dict[str, Tensor], scaler: dict[str, Any], held: int) -> None:
        """Raises: RuntimeError, KeyError or ValueError when the tensors are not those of this network."""
        self.held = held
        self.network.load_state_dict(_part(tensors, "model."))
        self.average.network.load_state_dict(_part(tensors, "average."))
        load_optimiser_state(self.optimiser, tensors)
        parameters = dict(self.network.named_parameters())
        for name, gradient in _part(tensors, "gradient.").items():
            parameters[name].grad = laid_out_like(parameters[name], gradient)
        with contextlib.suppress(RuntimeError):  # the state of a disabled scaler is empty and refused
            self.scaler.load_state_dict(scaler)


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
