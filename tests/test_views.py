"""The same weights looked through other views: the surest decides, and every command agrees."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mvcr_cli.__main__ import main
from mvcr_cli.checkpoint import Checkpoint
from mvcr_cli.config import ZoomConfig, parse_views
from mvcr_cli.data.folder import scan
from mvcr_cli.data.preprocess import Preprocess
from mvcr_cli.engine.evaluate import split_record
from mvcr_cli.engine.views import network_looking, through
from mvcr_cli.errors import UsageError
from mvcr_cli.models import build, config_for
from mvcr_cli.models.mvcr import MultiScaleResNet
from mvcr_cli.models.scale_set import sureness
from mvcr_cli.paths import write_json

SIDE = 64


def checkpoint(name: str = "mvcr10n", scales: tuple[float, ...] = (1.0,), **other: object) -> Checkpoint:
    torch.manual_seed(3)
    config = replace(
        config_for(name, 3, stem="small"), **({"scales": scales, "width": 8} if name != "cnn" else {}), **other
    )  # type: ignore[arg-type]
    network = build(config)
    for parameter in network.parameters():  # so that views differ
        torch.nn.init.normal_(parameter, 0.05, 0.2)
    return Checkpoint(
        config=config, classes=("a", "b", "c"), preprocess=Preprocess(size=SIDE), tensors=network.state_dict()
    )


def pictures(count: int = 6) -> torch.Tensor:
    return torch.rand(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 4 - 2


@pytest.mark.parametrize("text", ["2..1/2", "1/2, 1, 2", "2,1.5,1"])
def test_a_scale_set_is_one_however_it_is_written(text):
    look, scales = parse_views(text)
    assert look == "all" and scales is not None
    assert 1.0 in scales and scales == tuple(sorted(scales, reverse=True))
    assert parse_views(f"auto:{text}") == ("auto", scales)


@pytest.mark.parametrize("text", ["some", "2,1/2", "32,1", "", "1..3", "auto:", "auto:auto", "auto: x"])
def test_what_is_no_way_to_look_is_refused_with_the_ways_there_are(text):
    with pytest.raises(UsageError, match="none of 1, all, auto, and no scale set") as caught:
        parse_views(text)
    assert "2..1/2" in caught.value.hint


@torch.inference_mode()
@pytest.mark.parametrize("name", ["mvcr10n", "resnet10n"])
def test_weights_that_were_taught_at_one_scale_are_looked_through_at_many(name):
    made = checkpoint(name)
    network, plain = network_looking(made, "2..1/2"), made.network()
    x = pictures()
    fused, views = network.forward_views(x)
    assert torch.equal(views[0], plain(x))
    assert len(views) == 5
    chosen = torch.stack([sureness(view) for view in views]).argmax(0)
    assert torch.allclose(fused, torch.stack(views)[chosen, torch.arange(len(x))], atol=1e-6)


@torch.inference_mode()
def test_the_cheapest_view_is_looked_at_first_and_alone_when_it_is_sure():
    network = network_looking(checkpoint(), "auto:2,1,1/2")
    assert isinstance(network, MultiScaleResNet)
    x = pictures()
    network.sure = 0.0
    assert torch.equal(network(x), network.look_at(x, network.config.scales.index(0.5)))
    network.sure = 1.1
    assert torch.allclose(network(x), network_looking(checkpoint(), "2,1,1/2")(x), atol=1e-6)


@torch.inference_mode()
def test_the_views_that_were_taught_keep_their_batch_norms():
    made = checkpoint(scales=(1.0, 0.5))
    network, before = network_looking(made, "2,1,1/2"), made.network()
    x = pictures()
    wanted = dict(zip((1.0, 0.5), before.forward_views(x)[1], strict=True))
    found = dict(zip((1.0, 2.0, 0.5), network.forward_views(x)[1], strict=True))
    assert all(torch.equal(found[scale], wanted[scale]) for scale in wanted)


def test_looking_at_scale_1_alone_by_name_is_looking_once():
    made = checkpoint()
    x = pictures()
    with torch.inference_mode():
        assert torch.equal(network_looking(made, "1.0")(x), network_looking(made, "1")(x))


@pytest.mark.parametrize(
    ("made", "views", "message"),
    [
        (lambda: checkpoint(scales=(1.0, 0.5)), "2,1", "taught at 1/2 as well"),
        (lambda: checkpoint("cnn"), "2,1", "has one view"),
        (lambda: checkpoint(zoom=ZoomConfig(tiles=2, candidates=8)), "2,1", "in its tiles"),
        (lambda: checkpoint(zoom=ZoomConfig(tiles=2, candidates=8)), "auto", "always looks at its tiles"),
    ],
)
def test_a_network_that_cannot_look_so_says_why(made, views, message):
    with pytest.raises(UsageError, match=message):
        network_looking(made(), views)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    rng = np.random.default_rng(0)
    for number in range(9):
        path = data / "abc"[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(path)
    made = tmp_path / "run"
    (made / "weights").mkdir(parents=True)
    index = scan(data)
    write_json(made / "split.json", split_record((), index.samples, index.classes))
    write_json(made / "config.json", {})
    checkpoint().save(made / "weights" / "best.safetensors")
    return tmp_path


def said(argv: list[str], capfd: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    out, err = capfd.readouterr()
    assert caught.value.code == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    return [row for row in rows if row["record"] != "summary"]


def test_eval_predict_and_the_exported_file_agree(run, capfd):
    weights, data, views = str(run / "run"), str(run / "data"), ["--views", "2..1/2"]
    (report,) = said(["eval", data, "--run", weights, "--json", *views], capfd)
    assert report["views"] == "2..1/2"
    predict = ["predict", data, "--format", "jsonl", "--topk", "3"]
    many = said([*predict, "--run", weights, *views], capfd)
    once = said([*predict, "--run", weights], capfd)
    assert [row["topk"] for row in many] != [row["topk"] for row in once]
    said(["export", "--run", weights, "--out", str(run / "x.onnx"), "--json", *views], capfd)
    exported = said([*predict, "--run", str(run / "x.onnx")], capfd)
    for mine, other in zip(many, exported, strict=True):
        assert mine["label"] == other["label"]
        assert mine["probability"] == pytest.approx(other["probability"], abs=1e-4)


def test_the_curve_over_scale_looks_so_too(run, capfd):
    curves = [
        said(
            ["eval", str(run / "data"), "--run", str(run / "run"), "--scales", "1/2..2", "--json", *views],
            capfd,
        )
        for views in ([], ["--views", "2..1/2"])
    ]
    assert [curve[0]["views"] for curve in curves] == ["all", "2..1/2"]


def test_the_engine_does_not_change_the_checkpoint_it_was_given():
    made = checkpoint()
    names = set(made.tensors)
    assert "fusion.beta" in through(made, (2.0, 1.0)).tensors
    assert set(made.tensors) == names and made.config.scales == (1.0,)
