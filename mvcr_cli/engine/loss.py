"""What the network is taught: the fused verdict, every view's own verdict, and agreement from large views to small."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mvcr_cli.models.scale_set import sureness

BALANCED = 5  # times as many pictures in the largest class as in the smallest


def soft_targets(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Labels as distributions, with `smoothing` spread evenly. Shape: (N,) -> (N, K)."""
    one_hot = F.one_hot(labels, classes).float()
    return one_hot * (1 - smoothing) + smoothing / classes


def taught_sureness(classes: int, smoothing: float) -> float:
    """How sure a network becomes of what it knows, from 0 to 1: as sure as smoothed labels are."""
    target = soft_targets(torch.tensor([0]), classes, smoothing)
    return float(sureness(target.clamp(min=1e-12).log()))


def multi_scale_loss(fused: Tensor, views: list[Tensor], target: Tensor, weights: Tensor | None,
                     distill: float) -> Tensor:  # fmt: skip
    """`CE(z) + mean_v [ CE(z_v) + distill KL(sg z || z_v) ]`, halved; with one view plainly `CE(z)`.

    Args:
        fused, views: logits, (N, K).
        target: (N, K) distributions.
        weights: (K,) class weights with mean 1 over the training set, or None.
        distill: weight of the cross-scale distillation.

    Sources: ensemble distillation across resolutions, RS-Nets (arXiv 2007.09558); here the teacher is the
    confidence-weighted fusion.
    """
    row_weights = None if weights is None else target @ weights  # N
    loss = cross_entropy(fused, target, row_weights)
    if len(views) == 1:
        return loss
    teacher = fused.detach().float().log_softmax(-1)
    for logits in views:
        loss = loss + cross_entropy(logits, target, row_weights) / len(views)
        if distill:
            student = logits.float().log_softmax(-1)
            divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
            loss = loss + distill * divergence / len(views)
    return loss / 2


def cross_entropy(logits: Tensor, target: Tensor, row_weights: Tensor | None) -> Tensor:
    """Mean cross-entropy against distributions, in float32. Shape: (N, K), (N, K) -> ()."""
    losses = -(target * logits.float().log_softmax(-1)).sum(-1)  # N
    return losses.mean() if row_weights is None else (losses * row_weights).mean()


def unsure_loss(logits: Tensor) -> Tensor:
    """Divergence of the verdicts from "I cannot tell", KL(uniform || p), in float32. Shape: (N, K) -> ()."""
    return -logits.float().log_softmax(-1).mean() - math.log(logits.shape[-1])


def class_weights(counts: list[int], balance: str) -> Tensor | None:
    """Weights proportional to 1 / sqrt(count), with mean 1 over the pictures; None where no balancing is wanted.

    `auto` balances when the largest class has more than five times the pictures of the smallest.
    """
    if balance == "none" or (balance == "auto" and max(counts) <= BALANCED * min(counts)):
        return None
    n = torch.tensor(counts, dtype=torch.float32)
    weights = n.clamp(min=1).rsqrt()  # a class may have all its pictures in validation
    return weights * n.sum() / (weights * n).sum()
