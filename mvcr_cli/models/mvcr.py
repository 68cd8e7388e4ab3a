"""MVCR: one residual trunk that looks at several views of a picture and lets the surest view decide.

    x_v = view v of the picture (scale set)             z_v = fc(pool(trunk_v(x_v))) + heads
    z   = z_1 + beta (sum_v w_v z_v - z_1)              w from each view's own confidence (`ConfidenceFusion`)

The convolutions are shared by all views, the batch norms are private to each. With the scale set (1,) the network is a
plain ResNet, which is how the baseline `resnet*` is made: the same code, the same names, one view.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mvcr_cli.config import ModelConfig
from mvcr_cli.models.resnet import BasicBlock, Bottleneck, ResNetTrunk
from mvcr_cli.models.scale_aware import AveragePool, GeM, ScaleBatchNorm2d
from mvcr_cli.models.scale_set import ConfidenceFusion, make_view

SMALLEST_VIEW = 48  # pixels; below, the last stage of an "imagenet" stem is a single cell


class MultiScaleResNet(ResNetTrunk):
    """The network of a `ModelConfig` with a residual trunk.

    Args:
        config: what to build.
        exact: start as the plain ResNet (for pretrained weights): no blur, average pooling, first view alone.
            Otherwise start as suits training from scratch: full blur, GeM with p = 3, all views.
    """

    def __init__(self, config: ModelConfig, *, exact: bool = False) -> None:
        block = Bottleneck if config.block == "bottleneck" else BasicBlock
        blur = (0.0 if exact else 1.0) if config.blur else None
        views = len(config.scales) + (config.zoom is not None)  # the tiles have a batch norm of their own
        super().__init__(block, config.depths, config.width, config.stem, views, blur)
        self.config = config
        self.pool = GeM(1.0 if exact else 3.0) if config.gem else AveragePool()
        self.drop = nn.Dropout(config.drop)
        self.fc = nn.Linear(self.channels[3], config.classes)
        self.head3 = nn.Linear(self.channels[1], config.classes, bias=False) if config.heads else None
        self.head4 = nn.Linear(self.channels[2], config.classes, bias=False) if config.heads else None
        self.fusion = ConfidenceFusion(0.0 if exact else 1.0) if len(config.scales) > 1 else None
        self._initialise(exact)

    def forward(self, x: Tensor) -> Tensor:
        """Fused logits. Shape: (N, 3, H, W), normalised -> (N, K)."""
        return self.forward_views(x)[0]

    def forward_views(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Fused logits and the logits of every view, the one at scale 1 first.

        Views that are too small for the stem to see anything are left out, which matters while training pictures grow.

        Shape: (N, 3, H, W) -> (N, K), at most S times (N, K).
        """
        seen = self.views_at(min(x.shape[-2:]))
        logits = [self.view_logits(make_view(x, self.config.scales[view]), view) for view in seen]
        return (logits[0] if self.fusion is None or len(logits) == 1 else self.fusion(logits)), logits

    def views_at(self, side: int) -> list[int]:
        """The views of a `side`-pixel picture that are looked at; the one at scale 1 comes first."""
        order = sorted(range(len(self.config.scales)), key=lambda view: self.config.scales[view] != 1)
        return [view for view in order if is_useful(side, self.config.scales[view], self.config.stem)]

    @torch.no_grad()
    def inherit_norms(self, side: int) -> None:
        """Give the views that are left out at this size the batch norm of the view at scale 1.

        So a view that joins when the pictures have grown starts from what was learned, and an evaluation before that
        does not listen to a view that never learned.
        """
        seen = self.views_at(side)
        left_out = [view for view in range(len(self.config.scales)) if view not in seen]
        if not left_out:
            return
        norms = scale_norms(self)
        for view in left_out:
            mine = [tensor for norm in norms for tensor in _norm_tensors(norm.of(view))]
            base = [tensor for norm in norms for tensor in _norm_tensors(norm.of(seen[0]))]
            torch._foreach_copy_(mine, base)

    def view_logits(self, x: Tensor, view: int) -> Tensor:
        """Logits of one view, already at its own size. Shape: (N, 3, h, w) -> (N, K)."""
        c3, c4, c5 = self.features(x, view)
        z: Tensor = self.fc(self.drop(self.pool(c5)))
        if self.head3 is not None and self.head4 is not None:
            z = z + self.head3(c3.mean((2, 3))) + self.head4(c4.mean((2, 3)))
        return z

    def _initialise(self, exact: bool) -> None:
        if self.fc.weight.is_meta:  # there is nothing to fill, and trying would load torch's compiler
            return
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, BasicBlock | Bottleneck) and not exact:
                # A block starts as its shortcut, which steadies the first steps (Goyal et al. 2017, arXiv 1706.02677).
                last = module.bn3 if isinstance(module, Bottleneck) else module.bn2
                for norm in (last, *last.scales):
                    nn.init.zeros_(norm.weight)
        for head in (self.head3, self.head4):
            if head is not None:
                nn.init.zeros_(head.weight)


def is_useful(side: int, scale: float, stem: str) -> bool:
    """Whether a view of a `side`-pixel picture is large enough to be looked at; the picture itself always is."""
    return scale >= 1 or side * scale >= (SMALLEST_VIEW / 2 if stem == "small" else SMALLEST_VIEW)


def _norm_tensors(norm: nn.BatchNorm2d) -> list[Tensor]:
    """Affine terms and running statistics of one private set."""
    return [tensor for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var) if tensor is not None]


def scale_norms(network: nn.Module) -> list[ScaleBatchNorm2d]:
    return [module for module in network.modules() if isinstance(module, ScaleBatchNorm2d)]
