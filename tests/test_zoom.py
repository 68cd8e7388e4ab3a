"""Glance and zoom: tiles do not depend on how a picture is read, and a run with tiles obeys the laws of one without."""

from __future__ import annotations

import dataclasses
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_run import settings, stop_at, trained
from small_zoom import SIDE, ZOOM, needle, needles

from mvcr_cli.checkpoint import Checkpoint
from mvcr_cli.config import MEBIBYTE, EvalConfig, ExportConfig, ModelConfig, PredictConfig, ZoomConfig
from mvcr_cli.data import tiles as tiles_module
from mvcr_cli.data.preprocess import Preprocess
from mvcr_cli.data.search import Search, plain_grey
from mvcr_cli.data.tiles import (
    BATCHES_HELD,
    MARGIN,
    TileBatch,
    TileReader,
    Tiles,
    cut_tiles,
    open_picture,
    propose,
)
from mvcr_cli.engine import feed, zoom_step
from mvcr_cli.engine.evaluate import evaluate, tile_reader
from mvcr_cli.engine.export import export
from mvcr_cli.engine.predict import predict
from mvcr_cli.engine.prepare import zoom_mode
from mvcr_cli.errors import CannotCreate, ConfigMismatch, UsageError
from mvcr_cli.models import TRUNKS, build, config_for
from mvcr_cli.models.sift import alignment, cell_energies, cell_px, find_peaks, salience
from mvcr_cli.models.zoom import SearchScorer, TileScorer, ZoomResNet, choose
from mvcr_cli.records import Prediction, record

GLANCE = Preprocess(size=48)


@pytest.fixture(scope="module", autouse=True)
def small_trunk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TRUNKS, "10n", dataclasses.replace(TRUNKS["10n"], width=8))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return needles(tmp_path_factory.mktemp("needles") / "data")


@pytest.fixture(scope="module")
def lessons() -> Iterator[None]:
    """The network's own proposal is renewed before the second epoch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed, "lessons", lambda epoch: int(epoch >= 1))
        yield


@pytest.fixture(scope="module")
def undisturbed(data: Path, lessons: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    trained(data, run, **ZOOM)
    return run


def weights(run: Path) -> list[bytes]:
    return [(run / "weights" / f"{name}.safetensors").read_bytes() for name in ("last", "best")]


def test_strips_have_the_cells_of_the_whole():
    octaves = 3
    rows = alignment(octaves) // 2
    half = torch.rand(4 * rows + 7, 211, generator=torch.Generator().manual_seed(0))
    whole = cell_energies(half, octaves)
    strips = [cell_energies(half[top : top + rows], octaves) for top in range(0, half.shape[0], rows)]
    for octave in range(octaves):
        torch.testing.assert_close(torch.cat([strip[octave] for strip in strips]), whole[octave])


def test_grey_strips_are_searched_in_one_channel_until_one_has_a_colour():
    finder = SearchScorer(TileScorer().eval(), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    x = torch.rand(1, 130, 97, generator=torch.Generator().manual_seed(0)).repeat(3, 1, 1)
    x[0, 70:80] = 0.9
    seen = []

    def noted(rows):
        seen.append(rows.shape[1])
        return finder(rows)

    search = Search(noted, 1, (194, 260))
    for top in range(0, 130, 26):
        strip = x[:, top : top + 26]
        search.add(strip if (strip[0] != strip[1]).any() else strip[:1])
    assert set(seen) == {1, 3}
    torch.testing.assert_close(search.scores()[0], finder(x[None])[0])


def test_the_copy_of_a_strip_is_grey_only_where_all_of_it_is():
    strip = np.full((20, 30, 3), 7, np.uint8)
    assert plain_grey(strip).shape == (20, 30, 1)
    strip[3, 5, 2] = 8  # between the pixels of the first look
    assert plain_grey(strip).shape == (20, 30, 3)


def test_strips_have_the_scores_of_the_whole():
    finder = TileScorer().eval()
    x = torch.rand(3, 130, 97, generator=torch.Generator().manual_seed(0))
    search = Search(finder, 2, (194, 260))
    with torch.no_grad():
        for top in range(0, 130, 26):
            search.add(x[:, top : top + 26])
        first, second = search.scores()
        torch.testing.assert_close(first, finder(x[None])[0])
        torch.testing.assert_close(second, finder(torch.nn.functional.avg_pool2d(x[None], 2, ceil_mode=True))[0])


@pytest.mark.parametrize("channels", [1, 3])
def test_the_search_has_the_scores_of_the_scorer(channels):
    torch.manual_seed(0)
    scorer = TileScorer().train()
    scorer(torch.randn(4, 3, 60, 60) + 1)  # running statistics that are not those of the beginning
    for norm in (scorer.bn1, scorer.bn2, scorer.bn3):
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    x, mean, std = torch.rand(2, channels, 70, 61), torch.tensor(GLANCE.mean), torch.tensor(GLANCE.std)
    normalised = (x - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    found = SearchScorer(scorer, GLANCE.mean, GLANCE.std)(x)
    torch.testing.assert_close(found, scorer.eval()(normalised), rtol=1e-4, atol=1e-5)


def test_one_object_is_one_peak():
    half = torch.zeros(200, 200)
    half[61:81, 121:141] = 1  # symmetric: several of its cells have the same energy
    (energy,) = cell_energies(half, 1)
    ((row, column),) = find_peaks(energy, salience(energy), 10)
    assert max(abs(row * cell_px(0) / 2 - 71), abs(column * cell_px(0) / 2 - 131)) < 8


def test_nothing_stands_out_of_a_blank_picture_and_the_grid_covers_it(tmp_path):
    Image.new("RGB", (500, 300), (90, 90, 90)).save(tmp_path / "blank.png")
    zoom = ZoomConfig(tiles=4, candidates=40)
    with open_picture(tmp_path / "blank.png") as picture:
        boxes, _ = propose(picture, zoom, None)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    assert boxes.shape == (40, 4)
    assert len(np.unique(np.floor(centres / 100), axis=0)) == 15  # 5 x 3 squares of 100 pixels, none left out


@pytest.mark.parametrize("shape", ["disc", "ring"])
def test_what_stands_out_is_proposed_and_cut_as_it_is(tmp_path, shape):
    image, (x, y) = needle(shape, 7)
    image.save(tmp_path / "needle.png")
    zoom = ZoomConfig(tiles=4, candidates=20)
    with open_picture(tmp_path / "needle.png") as picture:
        boxes, prior = propose(picture, zoom, None)
        tiles = cut_tiles(picture, boxes, prior, zoom)
    assert prior[0] == 0 and (prior[1:] <= 0).all() and prior[-1] < -1  # an empty place of the grid
    left, top, right, bottom = boxes[0].tolist()
    assert (right - left, bottom - top) == (32, 32)
    assert left <= x - 10 and x + 10 <= right and top <= y - 10 and y + 10 <= bottom
    pixels = np.asarray(image)[top - MARGIN : bottom + MARGIN, left - MARGIN : right + MARGIN, :1]
    assert np.array_equal(tiles.pixels[0], pixels)  # one channel: the picture is grey
    assert sorted(set((boxes[:, 2] - boxes[:, 0]).tolist())) == [32, 64]


def test_the_finder_adds_what_it_scores_highest(tmp_path):
    """A finder that looks for darkness proposes a dark place without edges, where the detector sees the specks elsewhere."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    pixels = 255 * (1 - np.exp(-((rows - 120) ** 2 + (columns - 220) ** 2) / 6000))
    for place in (30, 130, 230, 280):
        pixels[place : place + 12, 20:32] = 128
    Image.fromarray(pixels.astype(np.uint8)).convert("RGB").save(tmp_path / "dark.png")
    finder = TileScorer().eval()
    for parameter in finder.parameters():
        torch.nn.init.zeros_(parameter)
    for norm in (finder.bn1, finder.bn2, finder.bn3):
        torch.nn.init.ones_(norm.weight)
    with torch.no_grad():
        for convolution in (finder.conv1, finder.conv2, finder.conv3, finder.score):
            convolution.weight[0] = -1.0 if convolution is finder.conv1 else 1.0 / convolution.weight[0].numel()
    zoom = ZoomConfig(tiles=2, candidates=12, learned=0.25, grid=0.75, octaves=1)
    with open_picture(tmp_path / "dark.png") as picture:
        found, _ = propose(picture, zoom, SearchScorer(finder, GLANCE.mean, GLANCE.std))
    centre = (found[0, :2] + found[0, 2:]) / 2
    assert np.abs(centre - (220, 120)).max() <= 20  # inside of it


def test_the_best_and_some_by_chance_are_chosen():
    scores = torch.arange(10.0).repeat(2, 1)
    assert choose(scores, 3).tolist() == [[9, 8, 7]] * 2
    torch.manual_seed(0)
    drawn = choose(scores, 4, chance=0.5)
    assert drawn[:, :2].tolist() == [[9, 8]] * 2
    assert all(len(set(row)) == 4 for row in drawn.tolist())


def zooming(classes: int, zoom: ZoomConfig) -> ZoomResNet:
    torch.manual_seed(0)
    network = build(dataclasses.replace(config_for("mvcr10n", classes), zoom=zoom))
    assert isinstance(network, ZoomResNet)
    return network


def test_the_survey_is_a_mixture_of_the_verdicts_of_all_places():
    network = zooming(3, ZoomConfig(tiles=2, candidates=5)).eval()
    tiles, prior = torch.rand(2, 5, 3, 40, 40), torch.randn(2, 5)
    half = torch.nn.functional.avg_pool2d(tiles.flatten(0, 1), 2).unflatten(0, (2, 5))
    rank, verdict = network.survey(half, prior)
    for picture in range(2):
        torch.testing.assert_close(rank[picture], network.rank(tiles[picture], prior[picture]))
        features = network.scorer.features(half[picture]).permute(0, 2, 3, 1).flatten(0, 2)
        counts = torch.stack([network.scorer.score(place[:, None, None])[0, 0, 0] for place in features]).softmax(0)
        said = torch.stack([network.sketch(place[:, None, None])[:, 0, 0] for place in features]).softmax(1)
        torch.testing.assert_close(verdict[picture].exp(), counts @ said)


def test_the_scorer_learns_what_to_choose_before_the_attention_knows_anything():
    """One tile of twenty decides, and SIFT's detector says nothing of it; the survey alone brings it to the top."""
    network = zooming(2, ZoomConfig(tiles=2, candidates=20))
    optimiser = torch.optim.AdamW([*network.scorer.parameters(), *network.sketch.parameters()], 1e-2)
    y = torch.arange(8) % 2
    for _ in range(60):
        half = torch.rand(8, 20, 3, 20, 20)
        where = torch.randint(20, (8,))
        for bag, place, label in zip(half, where, y.tolist(), strict=True):
            bag[place, :, 4:16, 4:16] = 2.0 if label else -1.0
        ranks, verdicts = network.survey(half, torch.zeros(8, 20))
        loss = torch.nn.functional.nll_loss(verdicts, y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert (ranks.argmax(1) == where).float().mean() >= 0.75


def test_an_attention_without_preference_teaches_the_scorer_nothing():
    ranking = torch.tensor([[3.0, 0.0, -1.0], [3.0, 0.0, -1.0]])
    even = torch.full((2, 3), 1 / 3)
    assert float(zoom_step._distance(ranking, even)) == pytest.approx(0, abs=1e-5)
    sure = torch.tensor([[0.0, 1.0, 0.0]] * 2)
    expected = -ranking.log_softmax(1)[:, 1].mean()
    torch.testing.assert_close(zoom_step._distance(ranking, sure), expected)


def test_ranking_leaves_nothing_in_the_cache_of_autocast(data, tmp_path):
    """Up to torch 2.10, weights that are cast without gradients and kept would be without them in the survey, too."""
    network = zooming(2, ZoomConfig(tiles=2, candidates=5)).train()
    tiles = TileBatch(torch.randint(0, 256, (2, 5, 3, 40, 40), dtype=torch.uint8), torch.zeros(2, 5))
    seen = []
    ranking = network.rank

    def rank(bag, prior):
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled(), torch.is_grad_enabled()))
        return ranking(bag, prior)

    network.rank = rank  # type: ignore[method-assign]
    x, target = torch.rand(2, 3, 48, 48), torch.eye(2)
    with torch.autocast("cpu", torch.bfloat16):
        loss = zoom_step.zoom_loss(network, x, tiles, target, None, settings(data, tmp_path / "run"), GLANCE, 0.5)
        assert torch.is_autocast_cache_enabled()
    loss.backward()
    assert set(seen) == {(True, False, False)}
    assert all(weight.grad is not None and weight.grad.any() for weight in network.scorer.parameters())


def test_the_finder_searches_alike_in_training_and_in_use():
    network = zooming(2, ZoomConfig(tiles=2, candidates=20)).train()
    network.scorer(torch.rand(4, 3, 40, 40))  # moves its running statistics
    network.teach_finder(network.scorer)
    x = torch.rand(1, 3, 60, 60)
    found = network.finder(x)
    assert torch.equal(found, network.eval().finder(x))
    assert torch.equal(found, network.scorer(x))


def test_the_zoom_travels_with_the_model_and_old_models_have_none():
    config = dataclasses.replace(config_for("mvcr10n", 2), zoom=ZoomConfig(tiles=5))
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    plain = config_for("mvcr10n", 2).to_dict()
    assert "zoom" not in plain and ModelConfig.from_dict(plain).zoom is None
    with pytest.raises(UsageError):
        ModelConfig.from_dict({**config.to_dict(), "zoom": {"tiles": 0}})


def test_the_glance_alone_is_the_plain_network():
    plain = build(config_for("mvcr10n", 3)).eval()
    zooming = build(dataclasses.replace(config_for("mvcr10n", 3), zoom=ZoomConfig())).eval()
    assert isinstance(zooming, ZoomResNet)
    zooming.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 3, 96, 96)
    assert torch.equal(plain(x), zooming(x))
    with torch.no_grad():
        zooming.beta.zero_()
        assert torch.equal(zooming.forward_zoom(x, torch.randn(2, 4, 3, 32, 32)).logits, plain(x))


def test_tiles_in_another_order_give_the_same_verdict():
    network = build(dataclasses.replace(config_for("mvcr10n", 3), zoom=ZoomConfig())).eval()
    assert isinstance(network, ZoomResNet)
    torch.nn.init.normal_(network.attention.score.weight)
    x, tiles = torch.randn(1, 3, 64, 64), torch.randn(1, 5, 3, 32, 32)
    with torch.no_grad():
        one, other = network.forward_zoom(x, tiles), network.forward_zoom(x, tiles.flip(1))
    assert float((one.weights.max() - one.weights.min()).abs()) > 1e-4
    torch.testing.assert_close(one.logits, other.logits)
    torch.testing.assert_close(one.weights, other.weights.flip(1))


@pytest.mark.parametrize("changes", [{"workers": 2}, {"workers": 1, "memory_mb": 512}])
def test_the_same_seed_gives_the_same_bits(data, undisturbed, tmp_path, changes):
    trained(data, tmp_path / "run", **ZOOM, **changes)
    assert weights(tmp_path / "run") == weights(undisturbed)


# Asked after each of three steps and twice more in a validation: 2 stops in the first epoch, 6 and 7 around the renewal.
@pytest.mark.parametrize("question", [2, 6, 7])
def test_an_interrupted_run_ends_like_an_undisturbed_one(data, undisturbed, tmp_path, question):
    run = tmp_path / "run"
    _, end = trained(data, run, stop=stop_at(question, "SIGTERM"), **ZOOM)
    assert end.stopped_by == "SIGTERM"
    trained(data, run, resume=True, workers=2, **ZOOM)
    assert weights(run) == weights(undisturbed)


def test_the_finder_is_renewed_and_evaluation_repeats_the_validation(data, undisturbed):
    network = Checkpoint.load(undisturbed / "weights" / "last.safetensors").network()
    assert isinstance(network, ZoomResNet) and int(network.lessons) == 1
    reader = tile_reader(network, GLANCE, 0)
    assert reader is not None and isinstance(reader.finder, SearchScorer)
    x = torch.rand(1, 3, 64, 60)
    normalised = GLANCE.normalise(x * 255)
    torch.testing.assert_close(reader.finder(x), network.finder(normalised))
    report, results, problems = evaluate(EvalConfig(run=undisturbed, workers=0))
    recorded = json.loads((undisturbed / "eval.json").read_text())
    assert not problems and len(results) == 8
    assert report.loss == pytest.approx(recorded["loss"], rel=1e-5)
    assert report.confusion == tuple(map(tuple, recorded["confusion"]))


def test_a_prediction_names_the_tiles_that_decided(undisturbed, tmp_path):
    image, _ = needle("ring", 40)
    image.resize((SIDE, SIDE - 40)).save(tmp_path / "ring.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    inputs = (str(tmp_path / "ring.png"), str(tmp_path / "bad.png"))
    found, bad = predict(PredictConfig(inputs=inputs, run=undisturbed, explain=tmp_path / "why"))
    assert isinstance(found, Prediction) and not isinstance(bad, Prediction)
    row = record(found)
    assert len(row["tiles"]) == 4 and set(row["tiles"][0]) == {"box", "weight", "label", "probability"}
    assert sum(tile["weight"] for tile in row["tiles"]) == pytest.approx(1)
    assert [tile["weight"] for tile in row["tiles"]] == sorted((tile["weight"] for tile in row["tiles"]), reverse=True)
    for left, top, right, bottom in (tile["box"] for tile in row["tiles"]):
        assert 0 <= left < right <= SIDE and 0 <= top < bottom <= SIDE - 40
    with Image.open(row["explanation"]) as overlay:
        assert overlay.width >= 1024 and overlay.height > 896  # with the verdict below
    assert json.dumps(row, allow_nan=False)


def reader(tile_px: int, candidates: int = 128) -> TileReader:
    return TileReader(ZoomConfig(tiles=4, candidates=candidates, tile_px=tile_px), GLANCE, 0)


def test_small_tiles_leave_the_batch_as_it_is_and_large_ones_do_not():
    assert reader(64).at_once(32) == 32
    for tile_px in (112, 224, 512, 1024):
        batch = reader(tile_px).at_once(1000)
        held = BATCHES_HELD * batch * 128 * 3 * (tile_px + 2 * MARGIN) ** 2
        assert batch == 1 or 256 * MEBIBYTE < held <= 512 * MEBIBYTE
    assert reader(512).at_once(32) == 1


@pytest.mark.parametrize("command", ["eval", "predict"])
def test_pictures_in_advance_stay_within_the_bytes_of_their_candidates(command, data, undisturbed, monkeypatch):
    zoom = Checkpoint.load(undisturbed / "weights" / "best.safetensors").config.zoom
    assert zoom is not None
    room = 9  # pictures: two at once, four read in advance
    monkeypatch.setattr(tiles_module, "CANDIDATE_BYTES", room * zoom.candidates * 3 * (zoom.tile_px + 2 * MARGIN) ** 2)
    alive: set[int] = set()
    most, looked = [0], TileReader.look

    def look(self: TileReader, picture: Any) -> tuple[Image.Image, Tiles]:
        glance, tiles = looked(self, picture)
        alive.add(id(tiles))
        most.append(len(alive))
        weakref.finalize(tiles, alive.discard, id(tiles))
        return glance, tiles

    monkeypatch.setattr(TileReader, "look", look)
    if command == "eval":
        report, *_ = evaluate(EvalConfig(data=data, run=undisturbed, device="cpu", workers=2, batch=16))
        assert report.images == 32
    else:
        config = PredictConfig(inputs=(str(data),), run=undisturbed, device="cpu", workers=2, batch=16)
        assert len(list(predict(config))) == 32
    assert 1 < max(most) <= room


def test_a_plain_network_explains_with_a_map_a_view(data, tmp_path):
    trained(data, tmp_path / "run", zoom_mode="off", imgsz=96, scales=(1.0, 0.5), epochs=1)
    picture = str(data / "disc" / "000.png")
    (found,) = predict(PredictConfig(inputs=(picture,), run=tmp_path / "run", explain=tmp_path / "why"))
    row = record(found)
    assert "tiles" not in row
    with Image.open(row["explanation"]) as sheet:
        assert 3 * 1024 < sheet.width < 4 * 1024 < 4 * sheet.height  # the picture and two views, with captions


def test_large_pictures_turn_the_zoom_on(data):
    auto = settings(data, None)
    assert zoom_mode(auto, 1500, 128) == "on"
    assert zoom_mode(auto, 1000, 128) == "off"
    assert zoom_mode(auto, 1500, 512) == "off"
    assert zoom_mode(settings(data, None, model="cnn"), 1500, 128) == "off"


def test_turning_the_zoom_on_is_said(data, tmp_path):
    lines: list[str] = []
    trained(data, tmp_path / "run", say=lines.append, epochs=1, **ZOOM)
    assert any(line.startswith("zoom: on") and "4 of 128 tiles of 32 px" in line for line in lines)
    lines.clear()
    trained(data, tmp_path / "plain", say=lines.append, epochs=1)
    assert not any(line.startswith("zoom") for line in lines)


def test_the_exported_files_do_what_the_run_does(data, undisturbed, tmp_path):
    pytest.importorskip("onnxruntime")
    target = tmp_path / "net.onnx"
    report = export(ExportConfig(run=undisturbed, out=target))
    assert report.images == 8 and report.top1_agreement == 1 and report.max_probability_difference < 1e-5
    assert sorted(path.name for path in tmp_path.glob("*.onnx")) == ["net.encoder.onnx", "net.finder.onnx", "net.onnx"]
    picture = str(tmp_path / "noise.png")  # no two tiles are equally good
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)).save(picture)
    (own,) = predict(PredictConfig(inputs=(picture,), run=undisturbed))
    (theirs,) = predict(PredictConfig(inputs=(picture,), run=target))
    assert isinstance(own, Prediction) and isinstance(theirs, Prediction)
    assert {tile.box for tile in theirs.tiles} == {tile.box for tile in own.tiles}
    assert theirs.tiles[0].weight == pytest.approx(own.tiles[0].weight, abs=1e-5)
    with pytest.raises(CannotCreate):
        export(ExportConfig(run=undisturbed, out=target))
    (tmp_path / "net.finder.onnx").unlink()
    with pytest.raises(ConfigMismatch, match="beside it"):
        list(predict(PredictConfig(inputs=(picture,), run=target)))
    with pytest.raises(UsageError):
        export(ExportConfig(run=undisturbed, out=tmp_path / "net.pt2", format="torch"))
