"""Batch norms that are measured anew on whole pictures: exact means, nothing else moves, and runs keep their laws."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_run import shapes, stop_at, trained
from torch import Tensor, nn

from mvcr_cli.checkpoint import Checkpoint
from mvcr_cli.config import EvalConfig, ModelConfig, ZoomConfig
from mvcr_cli.data.loader import ZoomInput
from mvcr_cli.data.preprocess import Preprocess
from mvcr_cli.data.tiles import MARGIN, TileBatch
from mvcr_cli.engine.evaluate import evaluate
from mvcr_cli.engine.precise_bn import with_precise_norms
from mvcr_cli.models import TRUNKS, build, config_for
from mvcr_cli.models.mvcr import MultiScaleResNet, make_view
from mvcr_cli.models.zoom import ZoomResNet

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def small_trunk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TRUNKS, "10n", dataclasses.replace(TRUNKS["10n"], width=8))
        yield


def network_of(config: ModelConfig) -> MultiScaleResNet:
    torch.manual_seed(0)
    network = build(config)
    assert isinstance(network, MultiScaleResNet)
    return network.eval()


def differing(one: nn.Module, other: nn.Module) -> set[str]:
    pairs = zip(one.state_dict().items(), other.state_dict().values(), strict=True)
    return {name for (name, mine), theirs in pairs if not torch.equal(mine, theirs)}


def test_every_view_has_the_mean_of_its_own_statistics():
    network = network_of(config_for("mvcr10n", 3, scales=(1.0, 0.5)))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    batches = [torch.randn(4, 3, 128, 128) * spread for spread in (1, 3)]
    precise = with_precise_norms(network, [([], x) for x in batches], CPU)
    assert isinstance(precise, MultiScaleResNet) and not precise.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    changed = differing(network, precise)
    assert changed and all("running_" in name or "num_batches" in name for name in changed)
    for view, norm in enumerate((precise.bn1, precise.bn1.scales[0])):
        seen = [network.conv1(make_view(x, (1.0, 0.5)[view])) for x in batches]
        assert isinstance(norm, nn.BatchNorm2d)
        torch.testing.assert_close(norm.running_mean, torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0))
        torch.testing.assert_close(norm.running_var, torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0))
        assert norm.momentum == 0.1


def test_what_no_picture_passes_keeps_its_statistics():
    network = network_of(config_for("mvcr10n", 3, scales=(1.0, 0.5)))
    precise = with_precise_norms(network, [([], torch.randn(2, 3, 32, 32))], CPU)  # too small for the second view
    changed = differing(network, precise)
    assert changed and not any(".scales." in name for name in changed)


@pytest.mark.parametrize("candidates", [2, 5])
def test_of_a_zooming_network_glance_and_tiles_are_measured_and_its_scorer_is_not(candidates):
    zoom = ZoomConfig(tiles=2, candidates=candidates, covers=candidates == 2)
    network = network_of(dataclasses.replace(config_for("mvcr10n", 3, scales=(1.0,)), zoom=zoom))
    side = zoom.tile_px + 2 * MARGIN

    def picture(_: int) -> tuple[list[object], ZoomInput]:
        pixels = torch.randint(0, 256, (2, candidates, 3, side, side), dtype=torch.uint8)
        tiles = TileBatch(pixels, torch.zeros(2, candidates))
        return [], ZoomInput(torch.randn(2, 3, 64, 64), tiles, Preprocess(size=64))

    precise = with_precise_norms(network, map(picture, range(2)), CPU)  # type: ignore[arg-type]
    assert isinstance(precise, ZoomResNet)
    changed = differing(network, precise)
    assert {"bn1.running_mean", "bn1.scales.0.running_mean"} <= changed
    assert not any(name.startswith(("scorer", "finder")) for name in changed)


def state(run: Path) -> dict[str, Tensor]:
    return Checkpoint.load(run / "weights" / "last.safetensors").tensors


def test_a_run_keeps_what_it_validated_and_can_be_interrupted(tmp_path):
    data = shapes(tmp_path / "data")
    trained(data, tmp_path / "moving")
    trained(data, tmp_path / "precise", precise_bn=2)
    moving, precise = state(tmp_path / "moving"), state(tmp_path / "precise")
    changed = {name for name, tensor in moving.items() if not torch.equal(tensor, precise[name])}
    assert "bn1.running_var" in changed and all("running_" in name or "num_batches" in name for name in changed)
    report, *_ = evaluate(EvalConfig(run=tmp_path / "precise", workers=0))
    recorded = json.loads((tmp_path / "precise" / "eval.json").read_text())
    assert report.loss == pytest.approx(recorded["loss"], rel=1e-5)
    trained(data, tmp_path / "stopped", precise_bn=2, stop=stop_at(4, "SIGTERM"))
    trained(data, tmp_path / "stopped", precise_bn=2, resume=True, workers=2)
    for name, tensor in state(tmp_path / "stopped").items():
        assert torch.equal(tensor, precise[name])
