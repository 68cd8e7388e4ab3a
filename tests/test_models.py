"""The networks against torchvision's, and the laws of the parts that torchvision does not have."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from mvcr_cli.config import PRESET_NAMES, ModelConfig, ZoomConfig
from mvcr_cli.errors import CheckpointError, UsageError
from mvcr_cli.models import (
    Network,
    build,
    config_for,
    load_trunk,
    mac_count,
    parameter_count,
    plain_twin,
    useful_scales,
)
from mvcr_cli.models.mvcr import MultiScaleResNet, private_scales, scale_norms
from mvcr_cli.models.scale_aware import AveragePool, GeM, MaxPool, SoftBlur
from mvcr_cli.models.scale_set import ConfidenceFusion, make_view, resize_matrix, view_side


def reference(name: str) -> torch.nn.Module:
    """torchvision's network with random weights and random batch-norm statistics, in evaluation mode."""
    torch.manual_seed(5)
    network: torch.nn.Module = getattr(torchvision.models, name)(weights=None).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.2)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    return network


@pytest.fixture(scope="module")
def references() -> dict[str, torch.nn.Module]:
    return {depth: reference(f"resnet{depth}") for depth in ("18", "50")}


def picture(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_close(mine: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    assert float((mine - theirs).abs().max() / theirs.abs().max()) < tolerance


@pytest.mark.parametrize("depth", ["18", "50"])
@pytest.mark.parametrize("family", ["resnet", "mvcr"])
@torch.inference_mode()
def test_public_weights_give_the_public_network(references, family, depth):
    theirs = references[depth]
    mine = build(config_for(family + depth, 1000), exact=True).eval()
    missing = load_trunk(mine, theirs.state_dict())
    x = picture(2, 3, 64, 72)
    assert_close(mine(x), theirs(x))
    assert not [name for name in missing if name.startswith(("conv1", "bn1.w", "fc"))]


@torch.inference_mode()
def test_weights_without_batch_counters_load(references):
    state = {k: v for k, v in references["18"].state_dict().items() if not k.endswith("num_batches_tracked")}
    mine = build(config_for("mvcr18", 1000), exact=True).eval()
    load_trunk(mine, state)
    x = picture(1, 3, 64, 64)
    assert_close(mine(x), references["18"](x))


@torch.inference_mode()
def test_other_classes_leave_the_last_layer_as_it_was(references):
    mine = build(config_for("mvcr18", 7), exact=True).eval()
    before = mine.fc.weight.clone()
    assert {"fc.weight", "fc.bias"} <= set(load_trunk(mine, references["18"].state_dict()))
    assert torch.equal(mine.fc.weight, before)
    assert mine(picture(1, 3, 64, 64)).shape == (1, 7)


def test_every_private_norm_starts_as_a_copy_of_the_plain_one(references):
    mine = build(config_for("mvcr18", 1000, scales=(1.0, 0.75, 0.5)), exact=True)
    load_trunk(mine, references["18"].state_dict())
    for norm in scale_norms(mine):
        for private in norm.scales:
            assert torch.equal(private.weight, norm.weight)
            assert torch.equal(private.running_mean, norm.running_mean)
            assert torch.equal(private.running_var, norm.running_var)


def test_own_weights_keep_their_private_norms():
    trained = build(config_for("mvcr10n", 3))
    for norm in scale_norms(trained):
        norm.scales[0].running_mean.fill_(0.25)
    mine = build(config_for("mvcr10n", 3), exact=True)
    assert load_trunk(mine, trained.state_dict()) == []
    assert all(
        torch.equal(a, b) for a, b in zip(mine.state_dict().values(), trained.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(("name", "depth"), [("mvcr10", "18"), ("resnet34", "18"), ("mvcr18", "50"), ("cnn", "18")])
def test_weights_of_another_depth_are_refused_untouched(references, name, depth):
    mine = build(config_for(name, 4))
    before = {key: tensor.clone() for key, tensor in mine.state_dict().items()}
    with pytest.raises(CheckpointError, match=name):
        load_trunk(mine, references[depth].state_dict())
    assert all(torch.equal(before[key], tensor) for key, tensor in mine.state_dict().items())


@torch.inference_mode()
@pytest.mark.parametrize("size", [32, 47])
def test_one_view_without_parts_is_the_plain_resnet(size):
    plain = config_for("resnet10n", 5)
    single = ModelConfig(name="mvcr10n", classes=5, block="basic", depths=(1, 1, 1, 1), width=32, scales=(1.0,))
    torch.manual_seed(1)
    a = build(plain).eval()
    b = build(single).eval()
    b.load_state_dict(a.state_dict())
    x = picture(2, 3, size, size)
    assert torch.equal(a(x), b(x))
    fused, views = b.forward_views(x)
    assert len(views) == 1
    assert torch.equal(fused, views[0])


@torch.inference_mode()
def test_norms_are_private_and_convolutions_are_not():
    torch.manual_seed(2)
    network = build(config_for("mvcr10n", 4, stem="small")).eval()
    x = picture(2, 3, 64, 64)
    _, before = network.forward_views(x)
    for norm in scale_norms(network):
        norm.scales[0].running_mean -= 0.3
        norm.scales[0].bias += 0.1
    _, after = network.forward_views(x)
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])
    network.conv1.weight += 0.05
    _, shared = network.forward_views(x)
    assert not torch.equal(after[0], shared[0])
    assert not torch.equal(after[1], shared[1])


def test_training_moves_the_statistics_of_each_view_by_its_own_pixels():
    network = build(config_for("mvcr10n", 4, stem="small")).train()
    network(picture(4, 3, 64, 64))
    norm = scale_norms(network)[0]
    assert not torch.equal(norm.running_mean, norm.scales[0].running_mean)
    assert norm.num_batches_tracked == norm.scales[0].num_batches_tracked == 1


@torch.inference_mode()
@pytest.mark.parametrize("scales", [(1.0, 0.5), (2.0, 1.0, 0.5), (1.0, 0.75)])
def test_without_beta_the_view_at_scale_one_decides(scales):
    network = build(config_for("mvcr10n", 4, scales=scales, stem="small"), exact=True).eval()
    torch.nn.init.normal_(network.fc.weight, 0, 0.5)
    x = picture(2, 3, 48, 48)
    fused, views = network.forward_views(x)
    assert len(views) == len(scales)
    assert torch.equal(fused, network.view_logits(x, scales.index(1.0)))
    assert torch.equal(fused, views[0])


@torch.inference_mode()
@pytest.mark.parametrize(("stem", "least"), [("imagenet", 48), ("small", 24)])
def test_views_too_small_for_the_stem_are_left_out(stem, least):
    network = build(config_for("mvcr10n", 4, stem=stem)).eval()
    for side, views in ((2 * least, 2), (2 * least - 2, 1), (16, 1)):
        fused, logits = network.forward_views(picture(1, 3, side, side))
        assert len(logits) == views
        assert torch.equal(fused, logits[0]) is (views == 1)
        assert useful_scales((1.0, 0.5), side, stem) == ((1.0, 0.5) if views == 2 else (1.0,))


def marked(*scales: float, zoom: bool = False) -> MultiScaleResNet:
    """Every private batch norm has its scale as its mean, and that of the tiles 9."""
    config = config_for("mvcr10n", 3, scales=scales, stem="small", layers=("sift",))
    network = build(replace(config, zoom=ZoomConfig(tiles=4, candidates=16) if zoom else None))
    assert isinstance(network, MultiScaleResNet)
    for norm in scale_norms(network):
        for number, scale in enumerate(private_scales(network.config)[: 1 + len(norm.scales)]):
            norm.of(number).running_mean.fill_(9 if scale is None else scale)
    return network


def means(network: MultiScaleResNet) -> set[tuple[float, ...]]:
    norms = scale_norms(network)
    return {tuple(float(norm.of(k).running_mean[0]) for k in range(1 + len(norm.scales))) for norm in norms}


@pytest.mark.parametrize(
    ("was", "now", "found"),
    [
        (((2, 1, 0.5), False), ((1, 0.5), False), {(1, 0.5)}),
        (((1, 0.5), False), ((2, 1, 0.5), False), {(1, 1, 0.5)}),
        (((1, 0.5), True), ((1, 0.5, 0.25), False), {(1, 0.5, 1)}),
        (((1, 0.5), True), ((1, 0.25), True), {(1, 1, 9), (1, 1)}),
    ],
)
def test_a_private_norm_goes_to_the_scale_that_it_was_of(was, now, found):
    trained, mine = marked(*was[0], zoom=was[1]), marked(*now[0], zoom=now[1])
    load_trunk(mine, trained.state_dict(), trained.config)
    assert means(mine) == found


def test_weights_of_more_views_start_a_network_with_fewer():
    trained = build(config_for("mvcr10n", 3, stem="small"))
    single = build(config_for("mvcr10n", 3, stem="small", scales=(1.0,)), exact=True)
    assert load_trunk(single, trained.state_dict()) == []
    assert torch.equal(single.fc.weight, trained.fc.weight)


@torch.inference_mode()
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_blur_keeps_constants_and_zero_strength_is_the_identity(strength):
    blur = SoftBlur(3, strength)
    constant = torch.full((1, 3, 9, 7), 2.5)
    torch.testing.assert_close(blur(constant), constant)
    x = picture(2, 3, 8, 6)
    assert torch.equal(blur(x), x) is (strength == 0)


@torch.inference_mode()
def test_full_blur_is_the_binomial_kernel():
    spot = torch.zeros(1, 1, 5, 5)
    spot[..., 2, 2] = 16
    expected = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])
    assert torch.equal(SoftBlur(1, 1.0)(spot)[0, 0, 1:4, 1:4], expected)


@torch.inference_mode()
def test_maximum_pooling_does_not_count_how_much_of_the_picture_an_object_covers():
    small, large = torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16)
    small[..., 4:6, 4:6], large[..., 2:14, 2:14] = 2.0, 2.0
    assert torch.equal(MaxPool()(small), MaxPool()(large))
    assert not torch.allclose(GeM(3.0)(small), GeM(3.0)(large), rtol=0.5)
    assert isinstance(build(config_for("mvcr10n", 2, layers=("max",))).pool, MaxPool)


def test_gem_runs_from_the_average_to_the_maximum():
    x = picture(2, 5, 6, 4).abs() + 0.1
    torch.testing.assert_close(GeM(1.0)(x), AveragePool()(x))
    pooled = [GeM(p)(x) for p in (1.0, 3.0, 10.0)]
    assert bool((pooled[0] <= pooled[1]).all())
    assert bool((pooled[1] <= pooled[2]).all())
    torch.testing.assert_close(GeM(60.0)(x), x.amax((2, 3)), rtol=0.06, atol=0)


def test_gem_of_an_empty_map_has_a_finite_gradient():
    x = torch.zeros(1, 2, 3, 3, requires_grad=True)
    GeM(3.0)(x).sum().backward()
    assert bool(torch.isfinite(x.grad).all())


@torch.inference_mode()
def test_a_sure_view_outvotes_an_unsure_one_wherever_it_stands():
    unsure, sure = torch.tensor([[0.1, 0.0, 0.0]]), torch.tensor([[0.0, 9.0, 0.0]])
    fusion = ConfidenceFusion(1.0)
    for views in ([unsure, sure], [sure, unsure], [unsure, sure, unsure]):
        fused = fusion(views)
        assert fused.argmax() == 1
        torch.testing.assert_close(fused, sure, rtol=0, atol=0.2)


@torch.inference_mode()
def test_equal_views_fuse_to_themselves_and_the_order_of_the_others_is_free():
    first, a, b = (3 * picture(4, 6, seed=seed) for seed in range(3))
    fusion = ConfidenceFusion(0.7)
    torch.testing.assert_close(fusion([a, a, a]), a)
    torch.testing.assert_close(fusion([first, a, b]), fusion([first, b, a]))
    assert torch.equal(ConfidenceFusion(0.0)([first, a, b]), first)


def test_the_vote_teaches_the_temperature_and_not_the_confidence():
    views = [picture(3, 4, seed=seed).requires_grad_() for seed in range(2)]
    fusion = ConfidenceFusion(1.0)
    fusion(views)[:, 0].sum().backward()
    assert fusion.log_tau.grad is not None
    assert fusion.log_tau.grad != 0
    # A view's weight is a constant of its gradient, so only the class that is asked for gets one.
    assert all(bool((view.grad[:, 1:] == 0).all()) for view in views if view.grad is not None)


@torch.inference_mode()
def test_one_class_is_no_division_by_zero():
    assert bool(torch.isfinite(ConfidenceFusion(1.0)([torch.zeros(2, 1), torch.ones(2, 1)])).all())


@torch.inference_mode()
@pytest.mark.parametrize("scale", [0.5, 0.75, 0.25, 0.3, 1.5, 2.0, 1 / 16])
@pytest.mark.parametrize("size", [(64, 64), (47, 33), (32, 90)])
def test_a_view_is_an_antialiased_resize(scale, size):
    x = picture(1, 3, *size)
    target = [view_side(side, scale) for side in size]
    mine = make_view(x, scale)
    inverse = 1 / scale
    if inverse == round(inverse) and not any(side % round(inverse) for side in size):
        expected = F.avg_pool2d(x, round(inverse))  # the area mean, cheaper than the triangle and free of aliasing too
    else:
        expected = F.interpolate(x, size=target, mode="bilinear", antialias=True, align_corners=False)
    assert mine.shape[-2:] == tuple(target)
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-5)


@torch.inference_mode()
def test_the_whole_view_is_the_picture_itself():
    x = picture(1, 3, 20, 20)
    assert make_view(x, 1.0) is x


@pytest.mark.parametrize(("source", "target"), [(333, 224), (1, 50), (500, 3), (7, 7), (3, 1), (64, 65)])
def test_filter_rows_sum_to_one_and_resize_as_pillow_does(source, target):
    signal = picture(1, 1, 1, source).double()
    matrix = resize_matrix(signal[0, 0, 0], target, target)
    assert matrix.shape == (target, source)
    torch.testing.assert_close(matrix.sum(1), torch.ones(target, dtype=torch.float64))
    expected = F.interpolate(signal, size=(1, target), mode="bilinear", antialias=True, align_corners=False)
    torch.testing.assert_close(matrix @ signal[0, 0, 0], expected[0, 0, 0], rtol=0, atol=1e-6)


def test_a_framed_filter_is_zero_outside_its_frame():
    line = torch.zeros(20)
    inner = resize_matrix(line, 6, 6)
    framed = resize_matrix(line, 6, 10, offset=2)
    torch.testing.assert_close(framed[2:8], inner)
    assert not framed[:2].any()
    assert not framed[8:].any()


def test_sizes_and_costs_are_those_of_the_papers():
    with torch.device("meta"):
        plain, deep = build(config_for("resnet18", 1000)), build(config_for("resnet50", 1000))
        assert mac_count(plain, 224) == 1_814_073_344
    assert parameter_count(plain) == 11_689_512
    assert parameter_count(deep) == 25_557_032
    assert plain.channels == [64, 128, 256, 512]
    assert deep.channels == [256, 512, 1024, 2048]


def test_counting_leaves_the_network_as_it_was():
    network = build(config_for("mvcr10n", 3, stem="small")).train()
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    macs = mac_count(network, 64)
    assert network.training
    assert all(torch.equal(before[key], tensor) for key, tensor in network.state_dict().items())
    single = mac_count(build(config_for("resnet10n", 3, stem="small")), 64)
    assert 1.2 < macs / single < 1.4  # a second view at half the side costs a quarter more


@pytest.mark.parametrize("name", PRESET_NAMES)
def test_every_preset_builds_and_its_config_survives_a_round_trip(name):
    config = config_for(name, 3, stem="small")
    assert ModelConfig.from_dict(config.to_dict()) == config
    with torch.device("meta"):
        network = build(config)
    assert parameter_count(network) > 0
    twin = plain_twin(name)
    assert (twin is None) == (not name.startswith("mvcr"))
    assert twin is None or twin in PRESET_NAMES


def outputs(name: str, size: int, stem: str) -> Tensor:
    network: Network = build(config_for(name, 3, stem=stem)).eval()
    with torch.inference_mode():
        return network(picture(2, 3, size, size))


@pytest.mark.parametrize("name", ["mvcr10n", "resnet10n", "cnn"])
@pytest.mark.parametrize("size", [16, 17, 32, 101])
@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_any_size_gives_finite_logits(name, size, stem):
    logits = outputs(name, size, stem)
    assert logits.shape == (2, 3)
    assert bool(torch.isfinite(logits).all())


@pytest.mark.parametrize(
    "change",
    [
        {"classes": 0},
        {"classes": 2.0},
        {"classes": True},
        {"depths": (1, 1, 1)},
        {"depths": "1111"},
        {"depths": (1, 1, 1, 10**9)},
        {"scales": ()},
        {"scales": (0.5,)},
        {"scales": (1.0, math.nan)},
        {"scales": (1.0,) * 100},
        {"width": 0},
        {"block": "other"},
        {"stem": "other"},
        {"drop": 1.0},
        {"surprise": 1},
    ],
)
def test_a_config_that_describes_no_network_is_refused(change):
    with pytest.raises((UsageError, ValueError, TypeError)):
        ModelConfig.from_dict(config_for("mvcr10n", 3).to_dict() | change)


def test_views_that_are_left_out_follow_the_view_that_is_seen() -> None:
    network = build(config_for("mvcr10n", 2))
    assert isinstance(network, MultiScaleResNet)
    norm = scale_norms(network)[0]
    torch.nn.init.uniform_(norm.weight)
    norm.running_mean.add_(1)
    network.inherit_norms(128)  # both views are seen: nothing moves
    assert not torch.equal(norm.of(1).weight, norm.weight)
    network.inherit_norms(64)
    assert torch.equal(norm.of(1).weight, norm.weight)
    assert torch.equal(norm.of(1).running_mean, norm.running_mean)
