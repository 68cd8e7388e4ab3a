"""Glance and zoom beside everything else: weights, resuming, exported files from strangers, benchmark, settings."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from small_run import settings, stop_at, trained
from small_zoom import ZOOM, needle, needles

from mvcr_cli.checkpoint import Checkpoint
from mvcr_cli.config import AugmentConfig, BenchmarkConfig, ExportConfig, PredictConfig, TrainConfig, ZoomConfig
from mvcr_cli.data.preprocess import Preprocess
from mvcr_cli.data.tiles import TileReader, open_picture, propose
from mvcr_cli.data.trail import Trail
from mvcr_cli.engine import export as export_module
from mvcr_cli.engine import prepare
from mvcr_cli.engine.benchmark import benchmark
from mvcr_cli.engine.contenders import plain_config, untrained
from mvcr_cli.engine.export import export
from mvcr_cli.engine.export_zoom import OnnxZoomPredictor
from mvcr_cli.engine.onnx_predictor import Worker
from mvcr_cli.engine.predict import predict
from mvcr_cli.engine.prepare import fit_tile, zoom_mode
from mvcr_cli.errors import BadImage, CheckpointError, DataError, UsageError
from mvcr_cli.models import TRUNKS, build, config_for, load_trunk, parameter_count
from mvcr_cli.models.zoom import ZoomResNet
from mvcr_cli.records import BenchmarkRow, LoaderReport


@pytest.fixture(scope="module", autouse=True)
def small_trunk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TRUNKS, "10n", dataclasses.replace(TRUNKS["10n"], width=8))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return needles(tmp_path_factory.mktemp("needles") / "data")


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "zoom"
    trained(data, folder, **ZOOM, epochs=1)
    return folder


def zooming(**changes: Any) -> ZoomResNet:
    zoom = ZoomConfig(tiles=4, candidates=16)
    network = build(dataclasses.replace(config_for("mvcr10n", 2, **changes), zoom=zoom))
    assert isinstance(network, ZoomResNet)
    return network


# Weights


def test_weights_of_a_network_that_zooms_fit_one_that_does_not():
    state = zooming().state_dict()
    plain = build(config_for("mvcr10n", 2))
    assert load_trunk(plain, state) == []
    assert torch.equal(plain.state_dict()["layer4.0.conv1.weight"], state["layer4.0.conv1.weight"])


def test_a_network_begun_from_one_that_zooms_has_its_own_lessons_before_it():
    first, then = zooming(), zooming()
    first.lessons += 3
    assert load_trunk(then, first.state_dict()) == ["lessons"]
    assert int(then.lessons) == 0 and then.learned_proposal((0, 0, 0), (1, 1, 1)) is None
    assert torch.equal(then.scorer.conv1.weight, first.scorer.conv1.weight)


# Settings


@pytest.mark.parametrize(
    ("change", "option"),
    [({"model": "cnn"}, "cnn"), ({"unsure": 0.5}, "--unsure"), ({"augment": AugmentConfig(mixup=0.2)}, "--mixup"),
     ({"augment": AugmentConfig(cutmix=0.2)}, "--cutmix")],
)  # fmt: skip
def test_what_no_network_can_zoom_beside_is_refused_at_once(change, option):
    with pytest.raises(UsageError, match=option):
        TrainConfig(data=Path("d"), zoom_mode="on", **change)
    assert zoom_mode(TrainConfig(data=Path("d"), **change), 5000, 128) == "off"


def test_settings_of_tiles_that_auto_would_not_use_are_refused(data, tmp_path):
    with pytest.raises(UsageError, match="--tiles"):
        trained(data, tmp_path / "run", tiles=4)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match="--mixup"):
        zoom_mode(TrainConfig(data=Path("d"), tile_px=64, augment=AugmentConfig(mixup=0.2)), 5000, 128)
    with pytest.raises(UsageError, match="--memory"):
        zoom_mode(TrainConfig(data=Path("d"), memory_mb=2048), 500, 128)


def test_a_zoom_that_the_recipe_prevents_is_said(data, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "ZOOM_FROM", 100)
    lines: list[str] = []
    trained(data, tmp_path / "run", say=lines.append, epochs=1, augment=AugmentConfig(mixup=0.2))
    assert [line for line in lines if line.startswith("zoom")] == [
        "zoom: off although the pictures are large: it does not go with --mixup and --cutmix"
    ]


def test_the_longer_side_decides_whichever_way_the_pictures_lie(tmp_path):
    """Half of them lie and half stand: the median width alone says nothing."""
    for label, size in (("a", (400, 100)), ("b", (100, 400))):
        (tmp_path / label).mkdir()
        for number in range(8):
            Image.fromarray(np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)).save(
                tmp_path / label / f"{number}.png"
            )
    prepared = prepare.prepare(settings(tmp_path, None))
    assert prepared.longer == 400


def test_a_fitted_tile_is_one_that_a_network_may_have():
    for imgsz in (16, 48, 224, 2048, 8192):
        ZoomConfig(tile_px=fit_tile(imgsz))


@pytest.mark.parametrize("bomb", [{"candidates": 65_536, "tile_px": 1024}, {"octaves": 6, "tile_px": 1024}])
def test_tiles_that_would_fill_the_memory_are_refused(bomb):
    with pytest.raises(UsageError):
        ZoomConfig(**bomb)


# Runs


def test_a_picture_that_kills_the_process_is_named_by_the_next_one(data, tmp_path, monkeypatch):
    """The name stands in the trail while the picture is read."""
    run, noted = tmp_path / "run", []
    look = TileReader.look

    def spy(reader: TileReader, picture: Any) -> Any:
        noted.extend(Trail(run / ".reading").left_behind())
        return look(reader, picture)

    monkeypatch.setattr(TileReader, "look", spy)
    trained(data, run, **ZOOM, epochs=1)
    assert {Path(name).name for name in noted} == {path.name for path in data.rglob("*.png")}


def test_a_run_from_before_there_was_zoom_goes_on(data, tmp_path):
    run = tmp_path / "run"
    trained(data, run, stop=stop_at(2, "SIGTERM"))
    stored = json.loads((run / "config.json").read_text())
    for name in ("zoom_mode", "tiles", "tile_px", "memory_mb", "layers"):
        del stored["train"][name]
    (run / "config.json").write_text(json.dumps(stored))
    _, end = trained(data, run, resume=True)
    assert end.stopped_by == "finished"


@pytest.mark.parametrize("side", [1, 5, 30, 50, 75])
def test_a_picture_smaller_than_a_tile_is_in_its_tiles_whole(side, tmp_path):
    pixels = np.random.default_rng(side).integers(1, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "small.png")
    with open_picture(str(tmp_path / "small.png")) as picture:
        boxes, _ = propose(picture, ZoomConfig(tiles=2, candidates=8), None)
    for left, top, right, bottom in boxes.tolist():
        if right - left >= side:
            assert left <= 0 and top <= 0 and right >= side and bottom >= side
        assert max(left, 0) < min(right, side) and max(top, 0) < min(bottom, side)


def test_a_narrow_grey_picture_has_a_glance_and_tiles(tmp_path):
    Image.fromarray(np.arange(50, dtype=np.uint8)[:, None]).save(tmp_path / "line.png")
    reader = TileReader(ZoomConfig(tiles=2, candidates=8), Preprocess(size=48), 0)
    with open_picture(str(tmp_path / "line.png")) as picture:
        glance, tiles = reader.look(picture)
    assert glance.size == (1, 50) and tiles.pixels.shape == (8, 40, 40, 1)


def test_pictures_that_none_can_read_say_why(data, tmp_path, monkeypatch):
    """Such as those that need another package."""

    def refuse(reader: TileReader, picture: Any) -> Any:
        raise BadImage("too_many_pixels", "pip install")

    monkeypatch.setattr(TileReader, "look", refuse)
    with pytest.raises(DataError, match=r"none of the validation pictures.*too_many_pixels, pip install"):
        trained(data, tmp_path / "run", **ZOOM, epochs=1)


# Exported files


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnxruntime")
    target, written = tmp_path_factory.mktemp("exported") / "net.onnx", []
    with pytest.MonkeyPatch.context() as patch:
        whole = export_module.write_whole
        patch.setattr(export_module, "write_whole", lambda path, raw: written.append(path.name) or whole(path, raw))
        report = export(ExportConfig(run=run, out=target, images=4))
    assert report.files == tuple(
        str(target.parent / name) for name in ("net.onnx", "net.encoder.onnx", "net.finder.onnx")
    )
    assert written[-1] == "net.onnx" and len(written) == 3  # the one that the others belong to comes last
    return target


def test_files_of_two_exports_are_not_mixed(run, data, exported, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    best = other / "weights" / "best.safetensors"
    checkpoint = Checkpoint.load(best)
    tensors = checkpoint.tensors | {"beta": checkpoint.tensors["beta"] + 1}
    dataclasses.replace(checkpoint, tensors=tensors).save(best)
    export(ExportConfig(run=other, out=tmp_path / "net.onnx", images=4))
    shutil.copy(exported.with_name("net.encoder.onnx"), tmp_path / "net.encoder.onnx")
    with pytest.raises(CheckpointError, match="not of one export"):
        list(predict(PredictConfig(inputs=(str(data),), run=tmp_path / "net.onnx", workers=1)))


class Answers(Worker):
    """A file that answers what a stranger wants."""

    def __init__(self, facts: Any, *answers: NDArray[Any]) -> None:
        self.facts, self.shown, self.answers = facts, "x.onnx", answers

    def run(self, count: int, **inputs: NDArray[np.generic]) -> list[NDArray[np.generic]]:
        return list(self.answers[:count])


def strange(**changes: NDArray[Any]) -> OnnxZoomPredictor:
    """A predictor whose files give what they should but for `changes`; four of sixteen tiles, two classes."""
    config = zooming().config
    facts = {
        "classes": ["a", "b"],
        "preprocess": Preprocess(size=48).to_dict(),
        "model": config.to_dict(),
        "lessons": 1,
    }
    scores = np.zeros((1, 36, 36), np.float32)
    good = {"rows": np.full((1, 2), 0.5), "weights": np.full((1, 4), 0.25), "own": np.full((1, 4, 2), 0.5),
            "features": np.zeros((1, 4, 8), np.float32), "chosen": np.arange(4)[None], "fine": scores,
            "coarse": np.zeros((1, 16, 16), np.float32)} | changes  # fmt: skip
    finder = Answers(facts)
    by_side = {320 // 2: good["fine"], 320 // 4: good["coarse"]}
    finder.run = lambda count, strip: [by_side[strip.shape[-1]]]  # type: ignore[method-assign]
    bag = Answers(facts, good["rows"], good["weights"], good["own"])
    return OnnxZoomPredictor(bag, Answers(facts, good["features"], good["chosen"]), finder)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("picture") / "ring.png"
    needle("ring", 3)[0].save(path)
    return str(path)


def test_files_that_give_what_they_should_are_taken(picture):
    predictor = strange()
    (verdict,) = predictor.judge([predictor.read(picture)])
    assert len(verdict.tiles) == 4 and verdict.probabilities.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    "change",
    [
        {"chosen": np.array(3)}, {"chosen": np.arange(3)[None]}, {"chosen": np.array([[0, 1, 2, 16]])},
        {"chosen": np.array([[0, 1, 2, np.nan]])}, {"weights": np.full((1, 4), np.nan)}, {"weights": np.array(1.0)},
        {"own": np.full((1, 4, 2), np.inf)}, {"own": np.zeros((1, 4, 3))}, {"rows": np.full((1, 2), np.nan)},
        {"fine": np.array(1.0)}, {"fine": np.zeros((1, 36, 30), np.float32)}, {"coarse": np.zeros(5)},
    ],
)  # fmt: skip
def test_files_that_give_anything_else_are_refused(picture, change):
    predictor = strange(**change)
    with pytest.raises(CheckpointError, match=r"^x\.onnx "):
        predictor.judge([predictor.read(picture)])


# Benchmark


def test_a_run_that_zooms_is_timed_with_its_tiles_beside_a_twin_that_does_not(data, tmp_path):
    config = dataclasses.replace(config_for("mvcr10n", 2, stem="small"), zoom=ZoomConfig(tiles=4, candidates=16))
    untrained(config, Preprocess(size=48)).save(tmp_path / "best.safetensors")
    plain = plain_config(config)
    assert plain is not None and plain == config_for("resnet10n", 2, stem="small")
    bench = BenchmarkConfig(run=tmp_path / "best.safetensors", data=data, batches=(2,), rounds=1, threads=1, workers=1)
    said: list[str] = []
    *rows, loader = benchmark(bench, say=said.append)
    assert isinstance(loader, LoaderReport) and loader.images > 0
    assert all(isinstance(row, BenchmarkRow) and row.train_p50_ms for row in rows if row.views == "all")
    assert [(row.model, row.views, row.backend) for row in rows] == [
        ("mvcr10n", "all", "eager"), ("mvcr10n", "1", "eager"), ("resnet10n", "all", "eager"),
    ]  # fmt: skip
    own, once, twin = rows
    assert own.parameters == parameter_count(build(config)) and twin.parameters == parameter_count(build(plain))
    assert once.mac > 1.5 * twin.mac  # four tiles of 32 px beside a glance of 48
    assert any("4 of 16 tiles" in line for line in said)
