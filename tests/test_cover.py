"""Where the tiles cover the pictures they lie side by side: nothing is missed, searched for or chosen."""

from __future__ import annotations

import dataclasses
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_run import settings, stop_at, trained
from small_zoom import needles

from mvcr_cli.checkpoint import Checkpoint
from mvcr_cli.config import EvalConfig, ExportConfig, PredictConfig, ZoomConfig
from mvcr_cli.data import tiles as tiles_module
from mvcr_cli.data.huge import open_huge
from mvcr_cli.data.places import covering_scale, side_by_side
from mvcr_cli.data.preprocess import Preprocess
from mvcr_cli.data.tiles import MARGIN, TileBatch, TileReader, WholePicture
from mvcr_cli.engine import beginning, feed
from mvcr_cli.engine.beginning import zoom_of
from mvcr_cli.engine.evaluate import evaluate
from mvcr_cli.engine.export import export
from mvcr_cli.engine.predict import predict
from mvcr_cli.engine.zoom_step import zoom_loss
from mvcr_cli.models import TRUNKS, build, config_for
from mvcr_cli.models.zoom import ZoomResNet
from mvcr_cli.records import Prediction

COVERING: dict[str, Any] = {"zoom_mode": "on", "tiles": 9, "tile_px": 64, "imgsz": 48}  # 3 x 3 of 107 px cover 320
SHAPES = [(1800, 1200), (1200, 1800), (320, 320), (301, 77), (20, 2000), (150, 150), (149, 301), (7, 9)]


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
    folder = tmp_path_factory.mktemp("runs") / "covering"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed, "lessons", lambda epoch: int(epoch >= 1))  # there would be some, if anything were searched
        trained(data, folder, **COVERING)
    return folder


def covering(tiles: int, tile_px: int = 150) -> ZoomConfig:
    return ZoomConfig(tiles=tiles, candidates=tiles, tile_px=tile_px, covers=True)


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("tiles", [2, 9, 23, 24])
def test_every_pixel_lies_in_a_tile(size, tiles):
    boxes = side_by_side(size, covering(tiles))
    assert boxes.shape == (tiles, 4)
    seen = np.zeros((size[1], size[0]), bool)
    for left, top, right, bottom in boxes.tolist():
        assert right - left == bottom - top == round(150 * covering_scale(size, covering(tiles)))
        for first, last, length in ((left, right, size[0]), (top, bottom, size[1])):
            assert (first >= 0 and last <= length) or last - first > length
        seen[max(0, top) : bottom, max(0, left) : right] = True
    assert seen.all()


def test_the_tiles_are_as_fine_as_their_number_allows():
    def coverable(size: tuple[int, int], tiles: int, side: int) -> bool:
        return -(-size[0] // side) * -(-size[1] // side) <= tiles

    for width, height in SHAPES:
        for tiles in (2, 9, 23, 24):
            side = round(150 * covering_scale((width, height), covering(tiles)))
            assert coverable((width, height), tiles, side)
            assert side == 150 or not coverable((width, height), tiles, side - 1)


@pytest.mark.parametrize(
    ("tiles", "tile_px", "sides", "covers"),
    [
        (24, 150, (1800, 1200), True),  # at half size
        (24, 300, (1800, 1200), True),  # at full size
        (24, 128, (1800, 1200), True),  # a little below
        (24, 112, (1800, 1200), False),
        (16, 150, (1800, 1200), False),
        (16, 112, (1500, 1500), False),
    ],
)
def test_a_run_searches_unless_its_tiles_cover_the_pictures_at_about_half_size(tiles, tile_px, sides, covers):
    asked = dataclasses.replace(settings(Path("d"), None), zoom_mode="on", tiles=tiles, tile_px=tile_px)
    zoom = zoom_of(asked, asked, sides)
    assert zoom is not None and zoom.covers == covers
    assert zoom.candidates == (tiles if covers else max(128, 8 * tiles))
    searching = zoom_of(dataclasses.replace(asked, tiles=None), asked, sides)  # nobody asked for so many
    assert searching is not None and not searching.covers


@pytest.mark.parametrize(
    ("size", "tiles", "grid"),
    [
        ((300, 300), 24, (5, 4)),
        ((640, 480), 24, (5, 4)),
        ((3000, 300), 100, (30, 3)),
        ((2000, 2000), 4096, (64, 64)),
        ((1800, 1200), 24, (6, 4)),
    ],
)
def test_tiles_to_spare_lie_as_densely_across_as_down(size, tiles, grid):
    boxes = side_by_side(size, covering(tiles))[: grid[0] * grid[1]]
    assert (len(set(boxes[:, 0].tolist())), len(set(boxes[:, 1].tolist()))) == grid


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_the_tiles_have_the_pixels_of_the_picture_to_its_edges(tmp_path, suffix):
    path = tmp_path / f"noise{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)).save(path)
    picture = np.asarray(Image.open(path))
    reader = TileReader(covering(6, 48), Preprocess(size=32), 0)  # columns at 0, 40 and 80, rows at 0 and 48
    with open_huge(path) as huge:
        for one in (huge, WholePicture(Image.open(path))):
            _, tiles = reader.look(one)
            corner, last = (tiles.pixels[index, MARGIN:-MARGIN, MARGIN:-MARGIN] for index in (0, 5))
            assert np.abs(corner.astype(int) - picture[:48, :48]).max() <= 2
            assert np.abs(last.astype(int) - picture[48:, 80:]).max() <= 2


@pytest.mark.parametrize("size", [(1000, 700), (900, 40), (40, 900), (1024, 512)])
@pytest.mark.parametrize("grey", [True, False])
def test_both_readers_cut_the_same_tiles_to_their_margins(tmp_path, size, grey):
    x, y = np.mgrid[: size[1], : size[0]]
    waves = [127 + 120 * np.sin((x * a + y * b) / 40) for a, b in ((1, 0), (0, 1), (1, 1))]
    Image.fromarray(np.stack(waves[:1] * 3 if grey else waves, 2).astype(np.uint8)).save(tmp_path / "waves.png")
    reader = TileReader(covering(6, 64), Preprocess(size=32), 0)
    with open_huge(tmp_path / "waves.png") as huge:
        _, in_pieces = reader.look(huge)
    _, whole = reader.look(WholePicture(Image.open(tmp_path / "waves.png")))
    assert in_pieces.pixels.shape[-1] == whole.pixels.shape[-1] == (1 if grey else 3)
    assert np.array_equal(in_pieces.boxes, whole.boxes)
    assert np.abs(in_pieces.pixels.astype(int) - whole.pixels).max() <= 8


def test_a_thin_picture_needs_no_more_memory_than_its_tiles(tmp_path):
    picture = WholePicture(Image.new("RGB", (60_000, 20)))
    tracemalloc.start()
    TileReader(covering(2, 64), Preprocess(size=32), 0).look(picture)
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()


def test_a_run_goes_on_as_it_began_whatever_is_chosen_now(data, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as before:
        before.setattr(beginning, "COVERED_UP_TO", 0.0)
        _, end = trained(data, run, stop=stop_at(2, "SIGTERM"), **COVERING)
    assert end.stopped_by == "SIGTERM"
    trained(data, run, resume=True, **COVERING)
    zoom = Checkpoint.load(run / "weights" / "last.safetensors").config.zoom
    assert zoom is not None and not zoom.covers and zoom.candidates == 128


def test_nothing_is_searched_for(run, data, monkeypatch):
    def searched(*_: object) -> None:
        raise AssertionError("searched")

    monkeypatch.setattr(tiles_module, "energies_and_scores", searched)
    monkeypatch.setattr(ZoomResNet, "rank", searched)
    monkeypatch.setattr(ZoomResNet, "survey", searched)
    trained(data, run.with_name("again"), **COVERING)
    files = [folder / "weights" / "last.safetensors" for folder in (run, run.with_name("again"))]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_it_is_said_what_the_tiles_cover(data, tmp_path):
    lines: list[str] = []
    trained(data, tmp_path / "run", say=lines.append, epochs=1, **COVERING)
    assert any(
        "9 tiles of 64 px side by side, which cover 320x320 px at 1/1.67 of their size" in line for line in lines
    )


def test_an_interrupted_run_ends_like_an_undisturbed_one(data, run, tmp_path):
    _, end = trained(data, tmp_path / "run", stop=stop_at(6, "SIGTERM"), **COVERING)
    assert end.stopped_by == "SIGTERM"
    trained(data, tmp_path / "run", resume=True, workers=2, **COVERING)
    for name in ("last", "best"):
        again, undisturbed = (folder / "weights" / f"{name}.safetensors" for folder in (tmp_path / "run", run))
        assert again.read_bytes() == undisturbed.read_bytes()


def test_evaluation_and_exported_files_do_what_the_run_does(run, tmp_path):
    pytest.importorskip("onnxruntime")
    report, *_ = evaluate(EvalConfig(run=run, workers=0))
    assert report.images == 8
    target = tmp_path / "net.onnx"
    assert export(ExportConfig(run=run, out=target)).max_probability_difference < 1e-5
    picture = str(tmp_path / "noise.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)).save(picture)
    (own,) = predict(PredictConfig(inputs=(picture,), run=run, explain=tmp_path / "why"))
    (theirs,) = predict(PredictConfig(inputs=(picture,), run=target))
    assert isinstance(own, Prediction) and isinstance(theirs, Prediction)
    weights = [{tile.box: tile.weight for tile in found.tiles} for found in (own, theirs)]
    assert weights[0].keys() == weights[1].keys() and len(weights[0]) == 9
    assert weights[1] == pytest.approx(weights[0], abs=1e-5)


def test_the_learned_search_has_no_lessons(run):
    network = Checkpoint.load(run / "weights" / "last.safetensors").network()
    assert isinstance(network, ZoomResNet) and int(network.lessons) == 0


@pytest.mark.parametrize(
    ("covers", "progressive", "sides"), [(True, True, [32, 64]), (True, False, [64, 64]), (False, True, [64, 64])]
)
def test_tiles_that_cover_grow_with_the_training(covers, progressive, sides, monkeypatch):
    zoom = ZoomConfig(tiles=2, candidates=2, tile_px=64, covers=covers)
    network = build(dataclasses.replace(config_for("mvcr10n", 2, scales=(1.0,)), zoom=zoom)).train()
    assert isinstance(network, ZoomResNet)
    seen: list[int] = []
    encode = network.encode

    def noted(tiles: torch.Tensor) -> torch.Tensor:
        seen.append(tiles.shape[-1])
        return encode(tiles)

    monkeypatch.setattr(network, "encode", noted)
    side = zoom.tile_px + 2 * MARGIN
    tiles = TileBatch(torch.randint(0, 256, (2, 2, 3, side, side), dtype=torch.uint8), torch.zeros(2, 2))
    config = settings(Path("d"), None, progressive=progressive)
    for progress in (0.0, 1.0):
        x, target = torch.randn(2, 3, 64, 64), torch.eye(2)
        zoom_loss(network, x, tiles, target, None, config, Preprocess(size=64), progress).backward()
    assert seen == sides
