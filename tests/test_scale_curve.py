"""Accuracy against object scale: how pictures are shown at a factor, and what a curve says."""

from __future__ import annotations

import json
import math
import shutil
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_run import shapes, trained

from mvcr_cli.checkpoint import Checkpoint
from mvcr_cli.config import EvalConfig, factor_text, parse_factors
from mvcr_cli.data.folder import scan
from mvcr_cli.data.loader import PixelCache, evaluation_batches
from mvcr_cli.data.preprocess import Preprocess
from mvcr_cli.engine.evaluate import evaluate
from mvcr_cli.engine.scale_curve import batch_at, curve_of, octave_weights, paired_mean, scale_curve, summarise
from mvcr_cli.errors import ConfigMismatch, DataError, UsageError
from mvcr_cli.paths import to_json
from mvcr_cli.records import ScaleCurveReport, record
from mvcr_cli.report.scale_plot import OTHER, OWN, Axes, scale_png

HALF = 2**-0.5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    trained(data, path, epochs=4)
    return path


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of another network at another size that knows one class more, with the others in other places."""
    root = shapes(tmp_path_factory.mktemp("more") / "shapes", images=8)
    shutil.copytree(root / "circle", root / "anything")
    for number, path in enumerate(sorted((root / "anything").iterdir())):
        Image.new("RGB", (40, 40), (20 * number, 255, 0)).save(path)
    path = tmp_path_factory.mktemp("runs") / "larger"
    trained(root, path, model="cnn", imgsz=64, epochs=1)
    return path


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures that the runs have not seen, larger than their inputs, one of them a JPEG."""
    root = tmp_path_factory.mktemp("other") / "x"
    shapes(root, images=3, first=50)
    for path in sorted(root.rglob("*.png")):
        Image.open(path).resize((150, 120)).save(path)
    Image.open(path).resize((1000, 800)).save(root / "square" / "large.jpg")
    return root


def check(run: Path, data: Path | None, scales: tuple[float, ...] = (0.5, 1.0, 2.0), **options):
    return scale_curve(EvalConfig(data=data, run=run, scales=scales, device="cpu", workers=1, **options))


@pytest.mark.parametrize(
    ("text", "factors"),
    [
        ("1/4..4", (0.25, 2**-1.5, 0.5, HALF, 1, 2**0.5, 2, 2**1.5, 4)),
        ("1/4,1/2,1,2,4", (0.25, 0.5, 1, 2, 4)),
        (" 4, 1 ,1/4 ", (0.25, 1, 4)),
        ("0.5..1", (0.5, HALF, 1)),
        ("1/2..1,1,3,1", (0.5, HALF, 1, 3)),
        ("1/16..16", tuple(2 ** (half / 2) for half in range(-8, 9))),
        ("1.5,1", (1, 1.5)),
        ("2/4 .. 1", (0.5, HALF, 1)),
    ],
)
def test_scales_are_a_range_of_half_octaves_or_a_list(text, factors):
    assert parse_factors(text) == factors
    assert EvalConfig(scales=parse_factors(text)).scales == factors


@pytest.mark.parametrize(
    "text", ["", ",", "1,", "1..", "..4", "1/4...4", "0", "1/0", "0/2", "x", "1,nan", "inf", "1e2", "1/3..4", "1..1",
             "1/3..3", "3..4", "1/4..1..4", "-1", "1/-2", "1/2/2", "١"],
)  # fmt: skip
def test_what_is_no_list_of_scales_is_refused(text):
    with pytest.raises(UsageError, match="--scales") as caught:
        parse_factors(text)
    assert "--scales 1/4..4" in caught.value.hint


@pytest.mark.parametrize("scales", [(0.25, 0.5), (1.0,), (1.0, 16.01), (0.06, 1.0)])
def test_scales_that_cannot_be_measured_are_refused(scales):
    with pytest.raises(UsageError, match="--scales is"):
        EvalConfig(scales=scales)


def test_against_needs_scales():
    with pytest.raises(UsageError) as caught:
        EvalConfig(against=Path("b"))
    assert "--scales" in caught.value.hint


def test_factors_are_written_as_people_write_them():
    factors = (1 / 16, 0.25, 2**-1.5, 1 / 3, HALF, 0.75, 1, 2**0.5, 1.5, 2, 2**1.5, 16)
    assert [factor_text(factor) for factor in factors] == [
        "1/16", "1/4", "0.35", "1/3", "0.71", "3/4", "1", "1.41", "1.5", "2", "2.83", "16",
    ]  # fmt: skip


@pytest.mark.parametrize("fit", ["pad", "stretch"])
@pytest.mark.parametrize("shape", [(90, 60), (33, 47), (1, 300)])
def test_factor_1_is_the_ordinary_input_bit_for_bit(shape, fit):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape[::-1], 3), dtype=np.uint8))
    preprocess = Preprocess(size=48, fit=fit)
    assert torch.equal(preprocess.tensor(image, 1.0), preprocess.tensor(image))


@pytest.mark.parametrize("factor", [1 / 16, 0.25, HALF, 1.0, 2**0.5, 3.0])
@pytest.mark.parametrize("fit", ["pad", "stretch"])
def test_the_picture_covers_its_share_in_the_middle_and_zeros_the_rest(factor, fit):
    """No pixel of the picture is 0 after normalisation, so what is not 0 is the picture."""
    preprocess = Preprocess(size=48, fit=fit)
    x = preprocess.tensor(Image.new("RGB", (80, 40), (255, 255, 255)), factor)
    wide = math.floor(48 * factor + 0.5)
    high = wide if fit == "stretch" else math.floor(40 * wide / 80 + 0.5)
    canvas = max(48, wide)
    assert x.shape == (3, canvas, canvas)
    rows, columns = (x != 0).all(0).any(1).nonzero()[:, 0], (x != 0).all(0).any(0).nonzero()[:, 0]
    assert (len(rows), len(columns)) == (high, wide)
    for found, size in ((rows, high), (columns, wide)):
        assert found.tolist() == list(range((canvas - size) // 2, (canvas - size) // 2 + size))
    assert int((x == 0).sum()) == 3 * (canvas**2 - high * wide)


def test_an_enlarged_picture_shows_the_detail_that_it_has():
    """Stripes of two pixels vanish at factor 1, and are sharp where their own size is reached."""
    stripes = np.zeros((128, 128, 3), dtype=np.uint8)
    stripes[:, ::4] = stripes[:, 1::4] = 255
    preprocess, image = Preprocess(size=32), Image.fromarray(stripes)
    assert float(preprocess.tensor(image)[0, 8:-8, 8:-8].std()) < 0.05
    assert torch.equal(preprocess.tensor(image, 4.0), Preprocess(size=128).tensor(image))


def test_batches_are_those_of_ordinary_evaluation_at_1_and_read_more_of_a_jpeg_when_larger(other):
    samples = scan(other).samples
    preprocess = Preprocess(size=48)
    plain = list(evaluation_batches(samples, preprocess, 4, 1, PixelCache(0)))
    same = list(evaluation_batches(samples, preprocess, 4, 1, PixelCache(0), 1.0))
    for (ours, x), (theirs, y) in zip(plain, same, strict=True):
        assert ours == theirs
        assert torch.equal(x, y)
    jpeg = [sample for sample in samples if sample.path.endswith(".jpg")]
    ((_, x),) = evaluation_batches(jpeg, preprocess, 4, 1, PixelCache(0), 8.0)
    with Image.open(jpeg[0].path) as image:
        torch.testing.assert_close(x[0], preprocess.tensor(image, 8.0))


def test_a_larger_canvas_has_no_more_pixels_in_a_batch():
    assert [batch_at(32, 64, 64 * factor) for factor in (1, 2, 4, 8)] == [32, 8, 2, 1]
    assert batch_at(7, 100, 141) == 3


@pytest.mark.parametrize("factors", [(0.25, HALF, 1.0, 1.5, 4.0), (0.5, 1.0), (1.0, 3.0)])
def test_the_area_of_a_constant_is_the_constant(factors):
    assert octave_weights(factors).sum() == pytest.approx(1, abs=1e-12)
    hits = np.tile(np.array([True, True, False, True]), (len(factors), 1))
    assert curve_of("r", Preprocess(size=32), factors, hits).area == pytest.approx(0.75)


def test_the_area_is_the_integral_over_log2_scale_of_straight_lines():
    """Accuracy 0 at 1/4, 1 at 1, 1 at 2, straight between: (2 octaves x 1/2 + 1 octave) / 3."""
    hits = np.array([[False], [True], [True]])
    curve = curve_of("r", Preprocess(size=100), (0.25, 1.0, 2.0), hits)
    assert curve.area == pytest.approx(2 / 3)
    assert (curve.worst_factor, curve.worst_accuracy, curve.accuracy_at_1) == (0.25, 0.0, 1.0)
    assert [point.canvas_px for point in curve.points] == [100, 100, 200]
    assert [point.accuracy.n for point in curve.points] == [1, 1, 1]
    falling = curve_of("r", Preprocess(size=100), (0.25, 1.0, 2.0), hits[::-1])
    assert (falling.worst_factor, falling.worst_accuracy, falling.area) == (2.0, 0.0, pytest.approx(5 / 6))


def test_the_difference_of_areas_is_paired_by_picture():
    """Two runs that fail on the same pictures differ by nothing, whatever their accuracy."""
    chance = np.random.default_rng(0)
    factors = (0.5, 1.0, 2.0)
    hits = chance.random((3, 200)) < 0.7
    better = hits.copy()
    better[0, :50] = True
    options = {"data": "d", "missing": (), "skipped": 0, "seconds": 0.0}

    def report(a, b) -> ScaleCurveReport:
        curves = [curve_of("r", Preprocess(size=32), factors, each) for each in (a, b)]
        return summarise(curves=curves, hits=[a, b], **options)

    same = report(hits, hits).area_difference
    assert (same.value, same.low, same.high, same.n) == (0, 0, 0, 200)
    found = report(better, hits)
    assert found.area_difference.value == pytest.approx(found.curve.area - found.against.area)
    assert found.area_difference.low > 0
    assert found.worst_difference == found.curve.worst_accuracy - found.against.worst_accuracy


def test_the_interval_of_a_paired_mean():
    differences = np.array([0.0, 0.5, 1.0, 0.5])
    found = paired_mean(differences)
    half = 1.959964 * differences.std(ddof=1) / 2
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5 - half, 0.5 + half))
    assert (paired_mean(np.array([1.0])).low, paired_mean(np.array([0.0])).high) == (-1, 1)


@pytest.mark.parametrize("batch", [1, 5])
def test_at_scale_1_it_is_ordinary_evaluation(run, other, batch):
    report, problems = check(run, other, batch=batch)
    plain, _, _ = evaluate(EvalConfig(data=other, run=run, device="cpu", workers=1))
    point = report.curve.points[1]
    assert (point.factor, point.canvas_px, point.accuracy) == (1.0, 48, plain.top1)
    assert report.curve.accuracy_at_1 == plain.top1.value
    assert report.images == plain.images == 7
    assert [point.canvas_px for point in report.curve.points] == [48, 48, 96]
    assert problems == []
    json.loads(to_json(record(report)))


@pytest.mark.parametrize("views", ["all", "1", "auto"])
def test_records_say_how_was_looked(run, other, views):
    report, _ = check(run, other, (0.5, 1.0), views=views)
    plain, _, _ = evaluate(EvalConfig(data=other, run=run, device="cpu", workers=1, views=views))
    assert record(report)["views"] == record(plain)["views"] == views


def test_other_sizes_are_what_the_network_says_of_them(run, other):
    """The hits at a factor, counted by hand from pictures prepared one by one."""
    report, _ = check(run, other, (0.25, 1.0, 3.0), batch=3)
    checkpoint = Checkpoint.load(run / "weights" / "best.safetensors")
    network = checkpoint.network()
    for point in report.curve.points:
        right = 0
        for sample in scan(other).samples:
            with Image.open(sample.path) as image, torch.no_grad():
                x = checkpoint.preprocess.tensor(image.convert("RGB"), point.factor)[None]
            right += int(network(x).argmax()) == sample.label
        assert point.accuracy.value == pytest.approx(right / 7)


def test_another_run_is_asked_about_the_same_pictures_by_class_name(run, larger, other):
    report, _ = check(run, other, against=larger)
    for path, curve in ((run, report.curve), (larger, report.against)):
        alone, _ = check(path, other)
        assert curve == alone.curve
        assert curve.run == str(path)
    assert report.against.size_px == 64
    assert [point.canvas_px for point in report.against.points] == [64, 64, 128]
    turned, _ = check(larger, other, against=run)
    assert turned.area_difference.value == pytest.approx(-report.area_difference.value)


def test_a_class_that_the_other_run_does_not_know_is_refused(run, larger, other, tmp_path):
    more = shutil.copytree(other, tmp_path / "more")
    shutil.copytree(more / "circle", more / "anything")
    with pytest.raises(ConfigMismatch, match="does not know 1 of the classes: anything"):
        check(larger, more, against=run)
    with pytest.raises(DataError, match="anything"):
        check(run, more, against=larger)


def test_pictures_that_the_other_run_learned_from_are_said(run, larger):
    said: list[str] = []
    config = EvalConfig(run=run, scales=(0.5, 1.0), device="cpu", workers=1, against=larger)
    report, _ = scale_curve(config, say=said.append)
    learned = {row[2] for row in json.loads((larger / "split.json").read_text())["train"]}
    asked = [row[2] for row in json.loads((run / "split.json").read_text())["val"]]
    assert 0 < sum(digest in learned for digest in asked) < 8
    assert said == [f"{larger} was trained on {sum(digest in learned for digest in asked)} of these 8 pictures"]
    assert report.against is not None
    assert (report.curve.trained_on, report.against.trained_on) == (0, sum(digest in learned for digest in asked))


def test_what_two_runs_have_in_common_is_said_once(run):
    said: list[str] = []
    trained = Path(json.loads((run / "split.json").read_text())["root"])
    scale_curve(
        EvalConfig(data=trained, run=run, against=run, scales=(0.5, 1.0), device="cpu", workers=1), say=said.append
    )
    assert len(said) == len(set(said)) == 1


def test_a_picture_that_is_bad_counts_at_no_scale(run, other, tmp_path):
    bad = shutil.copytree(other, tmp_path / "bad")
    whole = (bad / "square" / "large.jpg").read_bytes()
    (bad / "circle" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (bad / "circle" / "empty.png").write_bytes(b"")
    report, problems = check(run, bad)
    assert sorted(problem.code for problem in problems) == ["corrupt", "empty"]
    assert report.skipped == 2
    assert report.curve.points == check(run, other)[0].curve.points
    with pytest.raises(DataError):
        check(run, _only(bad / "circle" / "cut.jpg", tmp_path / "only"))


def _only(picture: Path, root: Path) -> Path:
    (root / "circle").mkdir(parents=True)
    shutil.copy(picture, root / "circle")
    return root


def test_a_canvas_beyond_the_limit_is_refused_before_any_picture_is_read(run, other, monkeypatch):
    monkeypatch.setattr("mvcr_cli.engine.scale_curve.LARGEST_CANVAS", 150)
    with pytest.raises(UsageError, match="pictures of 192 px from the 48 px") as caught:
        check(run, other, (1.0, 4.0))
    assert "end the scales at 2" in caught.value.hint
    check(run, other, (1.0, 2.0))


def picture(against: str | None = None) -> tuple[np.ndarray, ScaleCurveReport]:
    hits = np.random.default_rng(1).random((3, 40)) < 0.6
    curves = [curve_of("runs/a", Preprocess(size=32), (0.25, 1.0, 4.0), hits)]
    if against is not None:
        curves.append(curve_of(against, Preprocess(size=32), (0.25, 1.0, 4.0), ~hits))
    report = summarise(data="d", curves=curves, hits=[hits] * len(curves), missing=(), skipped=0, seconds=0.0)
    return np.asarray(Image.open(BytesIO(scale_png(report)))), report


def test_the_plot_shows_both_runs_where_their_values_are():
    pixels, report = picture("runs/b")
    axes = Axes.of(report)
    for curve, colour in ((report.against, OTHER), (report.curve, OWN)):
        for point in curve.points:
            x, y = axes.place(math.log2(point.factor), point.accuracy.value)
            ring = pixels[round(y) - 8 : round(y) + 9, round(x) - 8 : round(x) + 9].reshape(-1, 3)
            assert (ring == colour).all(1).sum() > 20
    alone, _ = picture()
    assert (alone == OWN).all(2).any()
    assert not (alone == OTHER).all(2).any()


@pytest.mark.parametrize("name", ["x" * 500, "\x1b[31m\nb\nc", "猫/犬"])
def test_whatever_a_run_is_called_the_rest_of_the_plot_stays(name):
    plain, hostile = picture("runs/b")[0], picture(name)[0]
    differs = (plain != hostile).any(2)
    rows, columns = differs.any(1).nonzero()[0], differs.any(0).nonzero()[0]
    assert rows.max() - rows.min() < 40  # one line of text
    assert columns.max() < plain.shape[1] // 2 + 60
