"""MVCR: one residual trunk that looks at several views of a picture and lets the surest view decide.

    x_v = view v of the picture (scale set)             z_v = fc(pool(trunk_v(x_v))) + heads
    z   = z_1 + beta (sum_v w_v z_v - z_1)              w from each view's own confidence (`ConfidenceFusion`)

The convolutions are shared by all views, the batch norms are private to each scale that is taught; a scale that is only
looked through borrows those of the nearest. With the scale set (1,) the network is a plain ResNet, which is how the
baseline `resnet*` is made: the same code, the same names, one view.

Three optional layers, each without effect at the start of a pretrained network: `ScaleAwareConv2d` in some stages, a
`SiftBranch` beside stage 2 of every view, and a `DetailBranch` that sees the whole picture while the trunk's view at
scale 1 is half as large.

The same weights can be looked through in three ways (`Look`): "1" is the view at scale 1 alone, at about a plain
ResNet's cost; "all" fuses every view; "auto" begins with the cheapest view and goes on only while no view is sure.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mvcr_cli.config import Look, ModelConfig, Stem
from mvcr_cli.models.dense_sift import SiftBranch
from mvcr_cli.models.detail import DetailBranch
from mvcr_cli.models.resnet import LAYER2_STRIDE, BasicBlock, Bottleneck, ResNetTrunk
from mvcr_cli.models.scale_aware import AveragePool, GeM, MaxPool, ScaleBatchNorm2d
from mvcr_cli.models.scale_set import ConfidenceFusion, make_view, sureness, view_side

SMALLEST_VIEW = {"imagenet": 48, "small": 24, "fine": 12}  # pixels; below, the last stage is a single cell


class MultiScaleResNet(ResNetTrunk):
    """The network of a `ModelConfig` with a residual trunk.

    Args:
        config: what to build.
        exact: start as the plain ResNet (for pretrained weights): no blur, average pooling, first view alone.
            Otherwise start as suits training from scratch: full blur, GeM with p = 3, all views, half of SACS.
    """

    def __init__(self, config: ModelConfig, *, exact: bool = False) -> None:
        block = Bottleneck if config.block == "bottleneck" else BasicBlock
        blur = (0.0 if exact else 1.0) if config.blur else None
        self.taught = taught_views(config)
        sacs = dict.fromkeys(config.sacs, 0.0 if exact else 0.5)
        norms = len(private_scales(config))
        super().__init__(block, config.depths, config.width, config.stem, norms, blur, sacs)
        self.config = config
        self.norm_of = [_nearest(scale, [config.scales[view] for view in self.taught]) for scale in config.scales]
        self.pool = MaxPool() if config.max else GeM(1.0 if exact else 3.0) if config.gem else AveragePool()
        self.drop = nn.Dropout(config.drop)
        self.fc = nn.Linear(self.channels[3], config.classes)
        self.head3 = nn.Linear(self.channels[1], config.classes, bias=False) if config.heads else None
        self.head4 = nn.Linear(self.channels[2], config.classes, bias=False) if config.heads else None
        many = len(config.scales) > 1
        self.fusion = ConfidenceFusion(0.0 if exact else 1.0, surest=config.surest) if many else None
        first, second = self.channels[:2]
        self.detail = DetailBranch(first, second, config.stem) if config.detail else None
        self.sift = SiftBranch(second, LAYER2_STRIDE[config.stem], len(self.taught)) if config.sift else None
        self.look: Look = "all"
        self.sure = config.sure
        self._initialise(exact)

    def forward(self, x: Tensor) -> Tensor:
        """Fused logits. Shape: (N, 3, H, W), normalised -> (N, K)."""
        if self.look == "auto" and not self.training:
            return self.forward_until_sure(x)[0]
        return self.forward_views(x)[0]

    def forward_views(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Fused logits and the logits of every view, the one at scale 1 first; in training, of the views that are taught.

        Views that are too small for the stem to see anything are left out, which matters while training pictures grow.

        Shape: (N, 3, H, W) -> (N, K), at most S times (N, K).
        """
        side = min(x.shape[-2:])
        seen = self.taught_at(side) if self.training else self.views_at(side)
        if self.look == "1" and not self.training:
            seen = seen[:1]
        logits = [self.look_at(x, view) for view in seen]
        return (logits[0] if self.fusion is None or len(logits) == 1 else self.fusion(logits)), logits

    def forward_until_sure(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The verdict of the surest view, cheapest views first, no more of them once one is sure enough.

        Returns: logits, and the pixels of the views looked at as a multiple of those of the view at scale 1; what a detail
        branch looks at is not counted. Shapes: (N, K), (N,).
        """
        count, open_ = x.shape[0], torch.arange(x.shape[0], device=x.device)
        best = x.new_full((count,), -math.inf)
        logits, cost = x.new_zeros(count, self.config.classes), x.new_zeros(count)
        for view in sorted(self.views_at(min(x.shape[-2:])), key=lambda view: self.config.scales[view]):
            scale = self.config.scales[view]
            verdict = self.look_at(x[open_], view).to(logits.dtype)
            cost[open_] += scale * scale
            certain = sureness(verdict)
            surer = certain > best[open_]
            best[open_[surer]], logits[open_[surer]] = certain[surer], verdict[surer]
            open_ = open_[best[open_] < self.sure]
            if not len(open_):
                break
        return logits, cost

    def shares(self, logits: list[Tensor], views: list[int]) -> Tensor:
        """How much each of `views` counts in the verdict, given its logits; NaN where "auto" would not look at it.

        Shape: S times (N, K) -> (S, N); those of a picture add up to 1.
        """
        if self.fusion is None or len(logits) == 1:
            return logits[0].new_ones(1, len(logits[0]))
        if self.look != "auto":
            return self.fusion.shares(logits)
        certain = sureness(torch.stack(logits))  # S x N
        shares, best = torch.full_like(certain, math.nan), torch.full_like(certain[0], -math.inf)
        open_, surest = torch.ones_like(best, dtype=torch.bool), torch.zeros_like(best, dtype=torch.long)
        for place in sorted(range(len(views)), key=lambda place: self.config.scales[views[place]]):
            shares[place, open_] = 0
            surer = open_ & (certain[place] > best)
            best[surer], surest[surer] = certain[place, surer], place
            open_ = open_ & (best < self.sure)
        return shares.scatter(0, surest[None], 1.0)

    def views_at(self, side: int) -> list[int]:
        """The views of a `side`-pixel picture that are looked at; the one at scale 1 comes first."""
        order = sorted(range(len(self.config.scales)), key=lambda view: self.config.scales[view] != 1)
        side = trunk_side(side, self.config.detail)
        return [view for view in order if is_useful(side, self.config.scales[view], self.config.stem)]

    def taught_at(self, side: int) -> list[int]:
        """Those of `views_at` that learn labels."""
        return [view for view in self.views_at(side) if view in self.taught]

    @torch.no_grad()
    def inherit_norms(self, side: int) -> None:
        """Give the taught views that are left out at this size the batch norm of the view at scale 1.

        So a view that joins when the pictures have grown starts from what was learned, and an evaluation before that
        does not listen to a view that never learned.
        """
        seen = self.views_at(side)
        left_out = [self.norm_of[view] for view in self.taught if view not in seen]
        if not left_out:
            return
        norms = scale_norms(self)
        for number in left_out:
            mine = [tensor for norm in norms for tensor in _norm_tensors(norm.of(number))]
            base = [tensor for norm in norms for tensor in _norm_tensors(norm.of(self.norm_of[seen[0]]))]
            torch._foreach_copy_(mine, base)

    def look_at(self, x: Tensor, view: int) -> Tensor:
        """Logits of one view of whole pictures. Shape: (N, 3, H, W) -> (N, K)."""
        own, detail = self.view_of(x, view)
        return self.view_logits(own, view, detail)

    def view_of(self, x: Tensor, view: int) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """One view of whole pictures at its own size, and the detail branch's maps for it. Shape: (N, 3, H, W)."""
        scale = self.config.scales[view]
        if self.detail is None:
            return make_view(x, scale), None
        return make_view(x, scale / 2), self.detail(x) if scale == 1 else None

    def view_logits(self, x: Tensor, view: int, detail: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Logits of one view, already at its own size, with the detail branch's maps. Shape: (N, 3, h, w) -> (N, K)."""
        return self.judge(*self.view_features(x, view, detail))

    def judge(self, c3: Tensor, c4: Tensor, c5: Tensor) -> Tensor:
        """Logits of one view from its maps of stages 2, 3 and 4. Shape: -> (N, K)."""
        z: Tensor = self.fc(self.drop(self.pool(c5)))
        if self.head3 is not None and self.head4 is not None:
            z = z + self.head3(c3.mean((2, 3))) + self.head4(c4.mean((2, 3)))
        return z

    def view_features(self, x: Tensor, view: int,
                      detail: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Maps of stages 2, 3 and 4 of one view, with all that runs beside the trunk; `x` as for `view_logits`."""
        beside1, beside2 = detail or (None, None)
        if self.sift is not None:
            described = self.sift(x, self.norm_of[view])
            beside2 = described if beside2 is None else beside2 + described
        return self.features(x, self.norm_of[view], beside1, beside2)

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
        for branch in (self.detail, self.sift):
            if branch is not None:
                branch.start_neutral()


def trunk_side(side: int, detail: bool) -> int:
    """Pixels of the view at scale 1 of a `side`-pixel picture: beside a detail branch the trunk sees half of them."""
    return view_side(side, 0.5) if detail else side


def is_useful(side: int, scale: float, stem: Stem) -> bool:
    """Whether a view of a `side`-pixel picture is large enough to be looked at; the picture itself always is."""
    return scale >= 1 or side * scale >= SMALLEST_VIEW[stem]


def taught_views(config: ModelConfig) -> list[int]:
    """Positions in the scale set of the views that are taught, in the order of their batch norms: scale 1 first."""
    taught = config.scales if config.taught is None else config.taught
    return sorted((config.scales.index(scale) for scale in taught), key=lambda view: config.scales[view] != 1)


def private_scales(config: ModelConfig) -> list[float | None]:
    """What the private batch norms are for, in their order: the taught scales, and None for the tiles of a large picture."""
    taught: list[float | None] = [config.scales[view] for view in taught_views(config)]
    return taught + [None] * (config.zoom is not None)


def _nearest(scale: float, taught: list[float]) -> int:
    """Position of the taught scale nearest in octaves."""
    return min(range(len(taught)), key=lambda number: abs(math.log2(scale / taught[number])))


def _norm_tensors(norm: nn.BatchNorm2d) -> list[Tensor]:
    """Affine terms and running statistics of one private set."""
    return [tensor for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var) if tensor is not None]


def scale_norms(network: nn.Module) -> list[ScaleBatchNorm2d]:
    """Those that have a private set for more than one view."""
    return [module for module in network.modules() if isinstance(module, ScaleBatchNorm2d) and len(module.scales)]
