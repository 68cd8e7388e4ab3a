"""Optional layers: without effect at the start, each doing what its equation says, and exported as they are."""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
import torchvision
from numpy.typing import NDArray
from small_run import shapes, stop_at, trained
from torch import Tensor, nn

from mvcr_cli.checkpoint import Checkpoint
from mvcr_cli.config import IMAGENET_STD, EvalConfig, ExportConfig, ModelConfig, TrainConfig, parse_layers
from mvcr_cli.data.preprocess import Preprocess
from mvcr_cli.engine.contenders import plain_config
from mvcr_cli.engine.evaluate import evaluate
from mvcr_cli.engine.export import OPSET, export
from mvcr_cli.errors import CheckpointError, ConfigMismatch, UsageError
from mvcr_cli.models import build, config_for, load_trunk
from mvcr_cli.models.dense_sift import LUMA, DenseRootSift
from mvcr_cli.models.detail import DetailBranch
from mvcr_cli.models.mvcr import MultiScaleResNet
from mvcr_cli.models.resnet import Shortcut
from mvcr_cli.models.scale_aware import ScaleAwareConv2d
from mvcr_cli.models.scale_set import make_view

OWN = ("blur", "gem")  # of the mvcr presets
ALL = ("sacs", "detail", "sift")
SETS = [("heads",), ("sacs",), ("detail",), ("sift",), ("heads", *ALL)]
WEIGHTS = torch.tensor([0.299 * 0.229, 0.587 * 0.224, 0.114 * 0.225]).view(3, 1, 1)  # luma of normalised pixels
ODD = [(333, 257), (97, 64), (101, 131)]


def picture(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(layers: tuple[str, ...], name: str = "mvcr10n", *, exact: bool = False, stem: str = "small",
            **changes: object) -> MultiScaleResNet:  # fmt: skip
    torch.manual_seed(4)
    config = replace(config_for(name, 5, stem=stem, layers=(*OWN, *layers)), **changes)  # type: ignore[arg-type]
    made = build(config, exact=exact).eval()
    assert isinstance(made, MultiScaleResNet)
    return made


def away_from_neutral(made: nn.Module) -> nn.Module:
    """Random weights everywhere, so that every part counts."""
    torch.manual_seed(6)
    for name, parameter in made.named_parameters():
        if parameter.ndim < 2 or "join" in name or "gate" in name:
            nn.init.normal_(parameter, 0.3, 0.1)
    return made


@pytest.fixture(scope="module")
def public() -> dict[str, dict[str, Tensor]]:
    """State dicts of torchvision's networks, with batch-norm statistics that matter."""
    states = {}
    for depth in ("18", "50"):
        torch.manual_seed(5)
        made = getattr(torchvision.models, f"resnet{depth}")(weights=None)
        for module in made.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
        states[depth] = made.state_dict()
    return states


@torch.inference_mode()
@pytest.mark.parametrize("layers", SETS, ids="+".join)
@pytest.mark.parametrize("name", ["mvcr18", "resnet50"])
def test_public_weights_load_and_the_network_is_as_without_the_layers(public, name, layers):
    with_layers, without = (
        build(config_for(name, 1000, layers=(*(OWN if name == "mvcr18" else ()), *layers)), exact=True),
        build(config_for(name, 1000), exact=True),
    )
    new = load_trunk(with_layers, public[name[-2:]])
    load_trunk(without, public[name[-2:]])
    kinds = {
        "heads": "head3.weight",
        "sacs": "conv2.alpha",
        "detail": "detail.join1.weight",
        "sift": "sift.norm.weight",
    }
    assert all(any(part.endswith(kinds[layer]) for part in new) for layer in layers)
    x = picture(1, 3, 101, 68)
    expected = without.eval()(make_view(x, 0.5) if "detail" in layers else x)
    assert float((with_layers.eval()(x) - expected).abs().max() / expected.abs().max()) < 1e-6
    away_from_neutral(with_layers)
    assert float((with_layers(x) - expected).abs().max() / expected.abs().max()) > 1e-2


@torch.inference_mode()
@pytest.mark.parametrize("layer", ALL)
@pytest.mark.parametrize("stem", ["imagenet", "small", "fine"])
def test_each_layer_matters_once_it_has_learned(layer, stem):
    made, x = network((layer,), exact=True, stem=stem), picture(2, 3, 97, 64)
    before = made(x)
    parts = {"sacs": "conv2.alpha", "detail": "join2.weight", "sift": "sift.norm.weight"}
    for name, parameter in made.named_parameters():
        if name.endswith(parts[layer]):
            parameter.data.fill_(0.2)
    assert float((made(x) - before).abs().max() / before.abs().max()) > 1e-4


@pytest.mark.parametrize("layers", SETS, ids="+".join)
def test_the_gradient_reaches_every_parameter_by_the_second_step(layers):
    made = network(layers, exact=True).train()
    made.fusion.beta.data.fill_(0.5)  # the other view votes
    new = {name: p for name, p in made.named_parameters()
           if name.startswith(("detail", "sift")) or ".alpha" in name or ".gate" in name}  # fmt: skip
    firsts = ("alpha", "join1.weight", "join2.weight", "sift.norm.weight", "sift.norm.bias", "scales.0.weight",
              "scales.0.bias")  # fmt: skip
    optimiser = torch.optim.SGD(made.parameters(), 0.1)
    for step in range(2):
        optimiser.zero_grad()
        F.cross_entropy(made(picture(4, 3, 96, 96, seed=step)), torch.tensor([0, 1, 2, 3])).backward()
        silent = {name for name, p in new.items() if p.grad is None or not bool(p.grad.any())}
        assert not {name for name in silent if step or name.endswith(firsts)}
        assert all(bool(torch.isfinite(p.grad).all()) for p in new.values() if p.grad is not None)
        optimiser.step()


def halved(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means over 2x2 in the plain way, of what is there at odd edges. Shape: (C, H, W)."""
    height, width = x.shape[1:]
    rows = [
        [x[:, i : i + 2, j : j + 2].mean((1, 2)) for j in range(0, width, 2)] for i in range(0, height, 2)
    ]  # fmt: skip
    return np.array(rows).transpose(2, 0, 1)


@torch.inference_mode()
@pytest.mark.parametrize("size", [(8, 6), (9, 7), (5, 12)])
def test_a_scale_aware_convolution_is_its_equation(size):
    layer = ScaleAwareConv2d(3, 4, 0.7).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 0, 0.5)
    x = picture(1, 3, *size).double()
    coarse = torch.from_numpy(halved(x[0].numpy()))[None]
    fine = F.conv2d(x, layer.weight, padding=1)
    change = F.conv2d(coarse, layer.weight, padding=1) - torch.from_numpy(halved(fine[0].numpy()))[None]
    gate = 1 / (1 + (-(coarse * layer.gate_weight).sum(1, keepdim=True) - layer.gate_bias).exp())
    scaled = change * gate * layer.alpha[None, :, None, None]
    expected = fine + F.interpolate(scaled, size=size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(layer(x), expected)


@torch.inference_mode()
def test_a_scale_aware_convolution_stays_in_half_precision():
    """One float32 factor would make every later map float32."""
    layer = ScaleAwareConv2d(8, 8, 0.5)
    x = picture(2, 8, 14, 14)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert float((half.float() - layer(x)).abs().max()) < 0.05 * float(layer(x).abs().max())


@torch.inference_mode()
@pytest.mark.parametrize("layers", SETS, ids="+".join)
def test_every_layer_keeps_the_trunk_in_half_precision(layers):
    made, x = away_from_neutral(network(layers)), picture(2, 3, 96, 96)
    kinds = []
    made.layer3[0].conv1.register_forward_hook(lambda module, args, result: kinds.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        half = made(x)
    assert set(kinds) == {torch.bfloat16}
    full = made(x)
    assert float((half.float() - full).abs().max()) < 0.1 * float(full.abs().max())


@torch.inference_mode()
@pytest.mark.parametrize("stem", ["imagenet", "small", "fine"])
@pytest.mark.parametrize("size", [(64, 64), (65, 47), (33, 90), (70, 71), (37, 102)])
def test_maps_of_the_branches_meet_the_trunk_cell_for_cell(size, stem):
    made = network(("detail", "sift"), stem=stem)
    seen: dict[str, torch.Size] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> None:
            seen.setdefault(name, result.shape)  # of the view at scale 1, which comes first

        return hook

    for name in ("layer1", "layer2"):
        getattr(made, name)[-1].register_forward_hook(note(name))
    x = picture(1, 3, *size)
    made(x)
    first, second = made.detail(x)
    assert (first.shape, second.shape) == (seen["layer1"], seen["layer2"])
    assert made.sift(make_view(x, 0.5), 0).shape == seen["layer2"]


@torch.inference_mode()
@pytest.mark.parametrize("stem", ["imagenet", "small", "fine"])
def test_a_spot_answers_at_the_same_cell_in_the_trunk_and_in_the_branches(stem):
    """Where a change of one patch of the picture changes each map most."""
    made = away_from_neutral(network(("detail", "sift"), stem=stem))
    plain, marked = picture(1, 3, 128, 128), picture(1, 3, 128, 128)
    marked[:, :, 64:72, 80:88] += 9 * picture(1, 3, 8, 8, seed=2)

    def centre(change: Tensor) -> list[float]:
        heat = change.square().sum((0, 1))
        axes = (torch.arange(side) for side in heat.shape)
        return [float((heat.sum(1 - axis) * line).sum() / heat.sum()) / heat.shape[axis]
                for axis, line in enumerate(axes)]  # fmt: skip

    view = [make_view(x, 0.5) for x in (plain, marked)]
    trunk = made.features(view[1], 0)[0] - made.features(view[0], 0)[0]
    detail = made.detail(marked)[1] - made.detail(plain)[1]
    sift = made.sift(view[1], 0) - made.sift(view[0], 0)
    for change in (trunk, detail, sift):
        assert centre(change) == pytest.approx((67.5 / 128, 83.5 / 128), abs=0.06)


def root_sift(luma: NDArray[np.float64], y: int, x: int, cell: int) -> NDArray[np.float64]:
    """One RootSIFT descriptor by the book: angles, linear interpolation in direction, row and column; 128 numbers."""
    padded = np.pad(luma, 1, mode="edge")
    down, across = padded[2:, 1:-1] - padded[:-2, 1:-1], padded[1:-1, 2:] - padded[1:-1, :-2]
    magnitude, angle = np.hypot(across, down), np.arctan2(down, across) / (2 * np.pi / 8) % 8
    histogram = np.zeros((8, 4, 4))
    for i, j in np.ndindex(luma.shape):
        row, column = (i - y) / cell + 1.5, (j - x) / cell + 1.5
        for r in range(4):
            for c in range(4):
                share = max(0, 1 - abs(row - r)) * max(0, 1 - abs(column - c))
                low = int(angle[i, j])
                part = angle[i, j] - low
                histogram[low % 8, r, c] += share * (1 - part) * magnitude[i, j]
                histogram[(low + 1) % 8, r, c] += share * part * magnitude[i, j]
    d = histogram.ravel()
    d = np.minimum(d / np.linalg.norm(d), 0.2)
    return np.sqrt(d / d.sum())


def texture(height: int, width: int, seed: int = 0) -> Tensor:
    """Smooth noise with structure at several scales. Shape: (1, 3, H, W)."""
    return sum(F.interpolate(picture(1, 3, height // step + 1, width // step + 1, seed=seed + step), (height, width),
                             mode="bicubic", align_corners=False) for step in (3, 7, 15))  # fmt: skip


@torch.inference_mode()
@pytest.mark.parametrize("stride", [2, 4, 8])
def test_dense_descriptors_are_those_of_the_book(stride):
    x = texture(40, 36)
    dense = DenseRootSift(stride)(x)[0].numpy()
    luma = (x[0] * WEIGHTS).sum(0)
    for i, j in ((0, 0), (2, 1), (dense.shape[1] - 1, dense.shape[2] - 1)):
        expected = root_sift(luma.double().numpy(), i * stride, j * stride, max(2, stride // 2))
        assert np.corrcoef(dense[:, i, j], expected)[0, 1] > 0.98


@torch.inference_mode()
def test_a_strong_corner_does_not_drown_the_rest():
    """One spot holds more than 0.2 of the descriptor in some numbers; by the book they are cut."""
    x = 0.05 * texture(32, 32)
    x[:, :, 17:20, 17:20] += 5
    dense = DenseRootSift(8)(x)[0, :, 2, 2].numpy()
    expected = root_sift((x[0] * WEIGHTS).sum(0).double().numpy(), 16, 16, 4)
    assert float(np.abs(dense - expected).max()) < 0.025


@torch.inference_mode()
def test_colours_of_equal_brightness_have_no_edge():
    step = torch.tensor([LUMA[2], 0.0, -LUMA[0]]) / torch.tensor(IMAGENET_STD)
    x = torch.zeros(1, 3, 32, 32)
    x[..., 16:] = step.view(1, 3, 1, 1)
    assert float(DenseRootSift(8)(x).max()) < 1e-3
    assert float(DenseRootSift(8)(x.abs()).max()) > 0.3


@torch.inference_mode()
@pytest.mark.parametrize("direction", range(8))
def test_a_ramp_answers_in_its_direction_alone(direction):
    angle = direction * math.pi / 4
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(48.0), indexing="ij")
    ramp = (x * math.cos(angle) + y * math.sin(angle)).expand(1, 3, 48, 48)
    d = DenseRootSift(8)(ramp)[0, :, 2:4, 2:4].reshape(8, 16, 4)
    assert bool((d.argmax(0) == direction).all())
    # A half shows what its neighbours have: 0.06 of the power, and its root in a RootSIFT.
    assert float(d[(direction + 1) % 8].max()) < 0.3 * float(d[direction].min())
    assert float(d[(direction + 4) % 8].max()) < 1e-4


@torch.inference_mode()
def test_a_grating_answers_across_its_stripes_both_ways():
    stripes = torch.sin(torch.arange(64.0) * 2 * math.pi / 8).expand(1, 3, 64, 64)
    for pictured, pair in ((stripes, {0, 4}), (stripes.transpose(2, 3), {2, 6})):
        share = DenseRootSift(8)(pictured)[0, :, 2:6, 2:6].square().reshape(8, -1).sum(1)
        assert set(share.topk(2).indices.tolist()) == pair
        assert float(share.topk(2).values.sum() / share.sum()) > 0.85


@torch.inference_mode()
@pytest.mark.parametrize("stride", [2, 4, 8])
def test_a_mirrored_picture_has_mirrored_descriptors(stride):
    """Only so when the patch of cell i has its middle exactly at pixel `stride` i."""
    layer, x = DenseRootSift(stride), texture(8 * stride + 1, 6 * stride + 1)
    d, flipped = (layer(each)[0].view(8, 4, 4, 9, 7) for each in (x, x.flip(3)))
    directions = [(4 - k) % 8 for k in range(8)]
    torch.testing.assert_close(flipped.flip(2, 4)[directions], d, rtol=1e-3, atol=1e-4)
    d, turned = (layer(each)[0].view(8, 4, 4, *size) for each, size in ((x, (9, 7)), (x.transpose(2, 3), (7, 9))))
    directions = [(2 - k) % 8 for k in range(8)]
    torch.testing.assert_close(turned.permute(0, 2, 1, 4, 3)[directions], d, rtol=1e-3, atol=1e-4)


@torch.inference_mode()
def test_descriptors_have_length_one_and_ignore_contrast_and_brightness():
    layer, x = DenseRootSift(8), texture(48, 48)
    d = layer(x)
    torch.testing.assert_close(d.square().sum(1), torch.ones(1, 6, 6), rtol=0, atol=2e-3)
    torch.testing.assert_close(layer(0.5 * x + 1), d, rtol=0, atol=1e-3)
    assert float(layer(torch.full((1, 3, 32, 32), 1.7)).max()) < 1e-5
    assert float(layer(1e-7 * x).max()) < 0.2 * float(d.max())  # noise of rounding is not blown up


def test_descriptors_of_a_flat_picture_have_a_finite_gradient():
    x = torch.zeros(1, 3, 16, 16, requires_grad=True)
    DenseRootSift(8)(x).sum().backward()
    assert bool(torch.isfinite(x.grad).all())


@torch.inference_mode()
def test_beside_a_detail_branch_the_trunk_sees_half_the_picture():
    made, plain = network(("detail",)), network(())
    load_trunk(plain, {name: t for name, t in made.state_dict().items() if not name.startswith("detail")})
    x = picture(3, 3, 96, 96)
    fused, views = made.forward_views(x)
    expected, same = plain.forward_views(make_view(x, 0.5))
    assert len(views) == len(same) == 2
    torch.testing.assert_close(fused, expected)
    assert len(made.forward_views(picture(1, 3, 94, 94))[1]) == 1  # views are left out by the trunk's size
    for join in (made.detail.join1, made.detail.join2):
        nn.init.normal_(join.weight, 0, 0.3)
    changed = made.forward_views(x)[1]
    assert not torch.allclose(changed[0], views[0])  # scale 1 has the detail, the other view has not
    torch.testing.assert_close(changed[1], views[1])
    made.look, made.sure = "auto", 2.0  # never sure: all views
    assert made(x).shape == (3, 5)


def onnx_outputs(made: nn.Module, pictures: list[Tensor]) -> list[Tensor]:
    """What the exported network says of each picture; it is traced with the first."""
    buffer = io.BytesIO()
    axes = {"x": {0: "N", 2: "H", 3: "W"}, "z": {0: "N"}}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(made, (pictures[0],), buffer, dynamo=False, opset_version=OPSET, input_names=["x"],
                          output_names=["z"], dynamic_axes=axes)  # fmt: skip
    session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(session.run(None, {"x": x.numpy()})[0]) for x in pictures]


def assert_same(made: nn.Module, pictures: list[Tensor]) -> None:
    for x, exported in zip(pictures, onnx_outputs(made, pictures), strict=True):
        torch.testing.assert_close(exported.softmax(-1), made(x).softmax(-1), atol=1e-4, rtol=0)
        assert float((exported - made(x)).abs().max()) < 1e-4 * float(made(x).abs().max())


@torch.inference_mode()
@pytest.mark.parametrize("layers", [("sacs",), ("sift",)], ids="+".join)
def test_an_exported_view_takes_every_size(layers):
    made = away_from_neutral(network(layers, scales=(1.0,)))
    assert_same(made, [picture(2, 3, 128, 96), *(picture(1, 3, *size) for size in ODD)])


@torch.inference_mode()
@pytest.mark.parametrize(("size", "stem"), list(zip(ODD, ("imagenet", "small", "fine"), strict=True)))
def test_an_exported_network_with_all_layers_and_views_agrees_at_an_odd_size(size, stem):
    assert_same(away_from_neutral(network(ALL, stem=stem)), [picture(1, 3, *size)])


def test_a_checkpoint_keeps_the_layers_and_an_old_one_has_none(tmp_path):
    made = away_from_neutral(network(ALL))
    kept = Checkpoint(
        config=made.config, classes=tuple("abcde"), preprocess=Preprocess(size=96), tensors=made.state_dict()
    )
    kept.save(tmp_path / "w.safetensors")
    again = Checkpoint.load(tmp_path / "w.safetensors")
    assert again.config == made.config
    assert (again.config.sacs, again.config.detail, again.config.sift) == ((2, 3), True, True)
    x = picture(1, 3, 96, 96)
    with torch.inference_mode():
        assert torch.equal(again.network()(x), made(x))
    old = {key: value for key, value in config_for("mvcr10n", 5).to_dict().items() if key not in (*ALL,)}
    assert ModelConfig.from_dict(old) == config_for("mvcr10n", 5)


def test_own_weights_with_layers_fit_a_network_with_the_same_layers_only():
    made = network(ALL)
    assert load_trunk(network(ALL), made.state_dict()) == []
    with pytest.raises(CheckpointError) as caught:
        load_trunk(network(("sacs",)), made.state_dict())
    assert "--layers" in caught.value.hint


def test_layers_replace_those_of_the_preset():
    assert config_for("mvcr18", 3, layers=OWN) == config_for("mvcr18", 3)
    bare = config_for("mvcr18", 3, layers=("gem",))
    assert (bare.blur, bare.gem, bare.heads) == (False, True, False)
    assert config_for("resnet18", 3, layers=("heads",)).heads


def test_the_plain_twin_has_no_layers():
    plain = plain_config(config_for("mvcr18", 3, layers=ALL))
    assert plain == config_for("resnet18", 3)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("sacs", ("sacs",)),
        ("sift, detail", ("detail", "sift")),
        ("sacs,sift,sacs", ("sacs", "sift")),
        ("none", ()),
        ("heads,blur", ("blur", "heads")),
    ],
)
def test_layers_are_a_list_of_names(text, layers):
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "sac", "sacs,", "all", "sacs sift", "none,sift", "gem,max"])
def test_what_is_no_layer_is_refused(text):
    with pytest.raises(UsageError, match="--layers"):
        parse_layers(text)
    with pytest.raises(UsageError, match="cnn"):
        TrainConfig(data=Path("d"), model="cnn", layers=("sacs",))


@pytest.mark.parametrize(
    "change", [{"sacs": (0,)}, {"sacs": (5,)}, {"sacs": (2, 2)}, {"sacs": (2.0,)}, {"sacs": (True,)}, {"detail": 1},
               {"sift": "yes"}, {"name": "cnn", "block": None, "depths": (), "sift": True},
               {"name": "cnn", "block": None, "depths": (), "sacs": (1,)}],
)  # fmt: skip
def test_a_config_with_impossible_layers_is_refused(change):
    with pytest.raises((UsageError, ValueError, TypeError)):
        ModelConfig.from_dict(config_for("mvcr10n", 3).to_dict() | change)


def test_a_run_with_all_layers_trains_goes_on_evaluates_and_exports(tmp_path):
    data, run = shapes(tmp_path / "data"), tmp_path / "run"
    options = {"layers": ALL, "imgsz": 96, "epochs": 2}
    trained(data, run, stop=stop_at(4), **options)
    with pytest.raises(ConfigMismatch, match="layers"):
        trained(data, run, resume=True, **options | {"layers": ("sacs",)})
    _, end = trained(data, run, resume=True, **options)
    model = json.loads((run / "config.json").read_text())["model"]
    assert (model["sacs"], model["detail"], model["sift"], model["stem"]) == ([2, 3], True, True, "small")
    report, _, _ = evaluate(EvalConfig(run=run, device="cpu", workers=1))
    assert report.top1.value == end.best_accuracy
    exported = export(ExportConfig(run=run, images=8))
    assert exported.top1_agreement == 1
    assert exported.max_probability_difference < 1e-4


def test_a_run_that_learns_doubt_pools_the_maximum_and_goes_on_so(tmp_path):
    data, run = shapes(tmp_path / "data"), tmp_path / "run"
    trained(data, run, stop=stop_at(3), unsure=0.3, epochs=2)
    trained(data, run, resume=True, unsure=0.3, epochs=2)
    model = json.loads((run / "config.json").read_text())["model"]
    assert (model["max"], model["gem"], model["blur"], model["surest"]) == (True, False, True, True)


def test_a_branch_costs_what_it_is_said_to_cost():
    """Parameters of the thin branch beside an 18-layer trunk."""
    assert 85_000 < sum(p.numel() for p in DetailBranch(64, 128, "imagenet").parameters()) < 95_000


@pytest.mark.parametrize("channels", [3, 8, 16])
def test_a_narrow_shortcut_is_the_strided_convolution(channels):
    shortcut = Shortcut(channels, 16, 2, 1).train()
    x = torch.randn(2, channels, 9, 64).contiguous(memory_format=torch.channels_last).requires_grad_()
    found = shortcut(x, 0)
    wanted = F.conv2d(x.double(), shortcut[0].weight.double(), None, 2)
    wanted = F.batch_norm(wanted, None, None, training=True)
    assert torch.allclose(found.double(), wanted, atol=1e-5)
    weights = torch.randn_like(found)
    (gradient,) = torch.autograd.grad((found * weights).sum(), x, retain_graph=True)
    (expected,) = torch.autograd.grad((wanted * weights).sum(), x)
    assert torch.allclose(gradient, expected, atol=1e-5)
