"""What decided, as a picture: maps come from what the verdict comes from, and files do not get in each other's way."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_run import shapes

from mvcr_cli.config import PredictConfig
from mvcr_cli.data.preprocess import Preprocess
from mvcr_cli.engine.contenders import untrained
from mvcr_cli.engine.explain import PANEL, activation_maps, for_panel
from mvcr_cli.engine.predict import predict
from mvcr_cli.errors import CannotCreate, UsageError
from mvcr_cli.models import TRUNKS, build, config_for
from mvcr_cli.models.mvcr import MultiScaleResNet
from mvcr_cli.records import Prediction


@pytest.fixture(scope="module", autouse=True)
def small_trunk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TRUNKS, "10n", dataclasses.replace(TRUNKS["10n"], width=8))
        yield


def a_network(look: str = "all", taught: tuple[float, ...] | None = None, **options: Any) -> MultiScaleResNet:
    """One whose norms all differ."""
    torch.manual_seed(0)
    network = build(dataclasses.replace(config_for("mvcr10n", 3, stem="small", **options), taught=taught)).eval()
    assert isinstance(network, MultiScaleResNet)
    network.look = look  # type: ignore[assignment]
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.2)
    return network


@pytest.mark.parametrize(
    "options",
    [{}, {"look": "1"}, {"taught": (1.0,)}, {"scales": (2.0, 1.0, 0.5)}, {"layers": ("detail",)},
     {"layers": ("sift", "sacs", "gem")}, {"layers": ("detail", "sift"), "taught": (1.0,)}],
)  # fmt: skip
def test_the_maps_are_of_the_features_that_the_verdict_comes_from(options):
    network, x = a_network(**options), torch.randn(2, 3, 96, 96)
    seen: list[torch.Tensor] = []
    network.layer4[-1].register_forward_hook(lambda _module, _inputs, output: seen.append(output))  # type: ignore[index,operator,union-attr]
    with torch.no_grad():
        network(x)
        decided, seen = list(seen), []
        network.layer4[-1]._forward_hooks.clear()  # type: ignore[index,operator,union-attr]
        network.layer4[-1].register_forward_hook(lambda _module, _inputs, output: seen.append(output))  # type: ignore[index,operator,union-attr]
        maps = activation_maps(network, x, np.array([0, 2]))
    assert [len(of) for of in maps] == [len(decided)] * 2
    assert len(decided) == len(seen) and all(map(torch.equal, decided, seen))


def test_a_network_without_views_has_nothing_to_explain(tmp_path):
    untrained(config_for("cnn", 2), Preprocess(size=32)).save(tmp_path / "best.safetensors")
    picture = str(shapes(tmp_path / "data", images=1) / "circle" / "000.png")
    config = PredictConfig(inputs=(picture,), run=tmp_path / "best.safetensors", explain=tmp_path / "why", workers=1)
    with pytest.raises(UsageError, match="cnn"):
        list(predict(config))
    assert not (tmp_path / "why").exists()


def test_explanations_never_become_inputs(tmp_path):
    untrained(config_for("mvcr10n", 2), Preprocess(size=48)).save(tmp_path / "best.safetensors")
    data = shapes(tmp_path / "data", images=1)
    config = PredictConfig(inputs=(str(data),), run=tmp_path / "best.safetensors", explain=data / "why", workers=1)
    with pytest.raises(CannotCreate, match="among the pictures"):
        list(predict(config))
    assert not (data / "why").exists()


def test_pictures_of_the_same_name_have_explanations_of_their_own(tmp_path):
    untrained(config_for("mvcr10n", 2), Preprocess(size=48)).save(tmp_path / "best.safetensors")
    data = shapes(tmp_path / "data", images=2)
    config = PredictConfig(inputs=(str(data),), run=tmp_path / "best.safetensors", explain=tmp_path / "why", workers=1)
    found = [item for item in predict(config) if isinstance(item, Prediction)]
    assert len({item.explanation for item in found}) == len(list((tmp_path / "why").iterdir())) == 4


def test_a_picture_waits_for_its_explanation_no_larger_than_it_is_shown():
    for size in ((40, 30), (1500, 900), (5000, 3), (2048, 4096)):
        kept = for_panel(Image.new("RGB", size))
        assert min(max(size), PANEL) <= max(kept.size) < 2 * PANEL
