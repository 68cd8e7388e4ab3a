"""Evaluation repeats what training saw, and maps classes by name whatever the folder looks like."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import draw_shape
from small_run import NOWHERE, needs_proc, shapes, trained

from mvcr_cli.checkpoint import Checkpoint
from mvcr_cli.config import EvalConfig, PredictConfig
from mvcr_cli.data.folder import scan
from mvcr_cli.engine import find_run
from mvcr_cli.engine.evaluate import evaluate, none_readable, summarise
from mvcr_cli.engine.predict import predict
from mvcr_cli.engine.scale_curve import scale_curve
from mvcr_cli.errors import CannotCreate, ConfigMismatch, DataError, ExitCode, InputMissing
from mvcr_cli.records import ImageResult, Prediction, Problem, record


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes(tmp_path_factory.mktemp("data") / "shapes", classes=("circle", "square", "triangle"), images=8)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    trained(data, path, epochs=4, split=0.4)
    return path


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures that the run has not seen."""
    return shapes(tmp_path_factory.mktemp("other") / "x", classes=("circle", "square", "triangle"), images=3, first=50)


def check(run: Path, data: Path | None = None, **options: Any):
    return evaluate(EvalConfig(data=data, run=run, device="cpu", workers=1, **options))


def by_name(results: list[ImageResult]) -> dict[str, tuple[float, ...]]:
    return {"/".join(Path(result.path).parts[-2:]): result.probabilities for result in results}


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_its_own_split_gives_the_recorded_accuracy_exactly(run, batch):
    report, results, problems = check(run, batch=batch)
    best = max(json.loads(line)["val_accuracy"] for line in (run / "metrics.jsonl").read_text().splitlines())
    recorded = json.loads((run / "eval.json").read_text())
    assert report.top1.value == best == recorded["top1"]["value"]
    assert [list(row) for row in report.confusion] == recorded["confusion"]
    assert report.loss == pytest.approx(recorded["loss"], rel=1e-5)
    assert problems == []
    split = json.loads((run / "split.json").read_text())
    recorded = [(os.path.join(split["root"], path), label) for path, label, _ in split["val"]]
    assert [(result.path, result.label) for result in results] == recorded


@pytest.mark.parametrize("all_of_them", [False, True])
def test_a_picture_that_was_replaced_is_reported_and_not_scored(data, tmp_path, all_of_them):
    mine = shutil.copytree(data, tmp_path / "data")
    trained(mine, tmp_path / "run", epochs=1, split=0.4)
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    paths = [os.path.join(split["root"], path) for path, *_ in split["val"]]
    for path in paths if all_of_them else paths[:1]:
        draw_shape("square", 999, (48, 48)).save(path)
    if all_of_them:
        with pytest.raises(DataError, match="changed"):
            check(tmp_path / "run")
        return
    report, results, problems = check(tmp_path / "run")
    assert [(problem.path, problem.code) for problem in problems] == [(paths[0], "changed")]
    assert (report.images, report.skipped) == (len(paths) - 1, 1)
    assert [result.path for result in results] == paths[1:]


def test_a_data_folder_that_was_moved_is_named(data, tmp_path):
    mine = shutil.copytree(data, tmp_path / "data")
    trained(mine, tmp_path / "run", epochs=1, split=0.4)
    mine.rename(tmp_path / "elsewhere")
    with pytest.raises(InputMissing, match=r"are not in .*data any more"):
        check(tmp_path / "run")


def test_results_and_report_say_the_same(run, data):
    report, results, _ = check(run, data)
    classes = Checkpoint.load(run / "weights" / "best.safetensors").classes
    assert len(results) == report.images == 24
    assert sum(result.correct for result in results) == round(report.top1.value * report.images)
    for result in results:
        row = np.array(result.probabilities)
        assert row.sum() == pytest.approx(1, abs=1e-12)
        assert result.predicted == classes[int(row.argmax())]
        assert result.probability == row.max()
        assert result.label == Path(result.path).parent.name
        assert result.correct == (result.predicted == result.label)
    assert np.array(report.confusion).sum() == report.images
    assert [entry.n for entry in report.classes] == [8, 8, 8]


def test_evaluation_sees_what_prediction_says(run, other):
    _, results, _ = check(run, other)
    predicted = {
        item.path: {label.label: label.probability for label in item.topk}
        for item in predict(PredictConfig(inputs=(str(other),), run=run, device="cpu", batch=5))
        if isinstance(item, Prediction)
    }
    classes = Checkpoint.load(run / "weights" / "best.safetensors").classes
    assert len(predicted) == len(results) == 9
    for result in results:
        np.testing.assert_allclose([predicted[result.path][name] for name in classes], result.probabilities, atol=1e-6)


def test_classes_are_mapped_by_name_and_not_by_order(run, other, tmp_path):
    """Without `circle`, `square` is the first folder; the checkpoint's `square` is the second class."""
    full, results, _ = check(run, other)
    part = shutil.copytree(other, tmp_path / "part")
    shutil.rmtree(part / "circle")
    report, fewer, _ = check(run, part)
    assert report.missing_classes == ("circle",)
    assert full.missing_classes == ()
    assert report.images == 6
    expected = by_name(results)
    for name, row in by_name(fewer).items():
        np.testing.assert_allclose(row, expected[name], atol=1e-6)
    assert [(r.label, r.correct) for r in fewer] == [(r.label, r.correct) for r in results if r.label != "circle"]
    assert [entry.n for entry in report.classes] == [0, 3, 3]
    assert report.classes[0].recall is None


def test_unknown_classes_are_refused_or_left_out(run, other, tmp_path):
    more = shutil.copytree(other, tmp_path / "more")
    shutil.copytree(more / "circle", more / "aardvark")
    with pytest.raises(DataError, match="aardvark"):
        check(run, more)
    shutil.copytree(more / "circle", more / "zebra")
    (more / "zebra" / "050.png").unlink()
    full, results, _ = check(run, other)
    said: list[str] = []
    config = EvalConfig(data=more, run=run, device="cpu", workers=1, ignore_extra_classes=True)
    report, fewer, _ = evaluate(config, say=said.append)
    assert (full.ignored, report.ignored) == (0, 5)
    assert said == ["left out 5 pictures of classes that the run does not know: aardvark 3, zebra 2"]
    assert record(report)["ignored"] == 5
    assert report.confusion == full.confusion
    assert [result.probabilities for result in fewer] == [result.probabilities for result in results]


@pytest.mark.parametrize("folders", [("train", "test"), ("train", "val"), ("train", "val", "test")])
def test_a_folder_of_splits_is_judged_by_its_held_out_part(run, other, tmp_path, folders):
    root = tmp_path / "splits"
    for number, name in enumerate(folders):
        shapes(root / name, classes=("circle", "square"), images=number + 1)
    assert check(run, root)[0].images == 2 * len(folders)


def test_pictures_that_the_run_was_trained_on_are_said_and_counted(run, data, other, tmp_path):
    def asked(folder: Path | None, run: Path = run) -> tuple[int | None, list[str]]:
        said: list[str] = []
        report, *_ = evaluate(EvalConfig(data=folder, run=run, device="cpu", workers=1), say=said.append)
        return record(report)["trained_on"], said

    learned = len(json.loads((run / "split.json").read_text())["train"])
    assert 0 < learned < 24
    assert asked(data) == (learned, [f"{run} was trained on {learned} of these 24 pictures"])
    assert asked(other) == (0, [])
    assert asked(None) == (0, [])
    alone = shutil.copy(run / "weights" / "best.safetensors", tmp_path / "alone.safetensors")
    assert asked(data, Path(alone)) == (None, [])


@pytest.mark.parametrize("name", ["results", "circle/predictions.csv"])
def test_results_are_not_written_into_the_folder_of_a_split(run, data, other, name):
    for judged in (None, other):
        with pytest.raises(CannotCreate, match="inside the data folder"):
            check(run, judged, out=data / name)


@needs_proc
@pytest.mark.parametrize(
    "out", [NOWHERE, NOWHERE / "below", NOWHERE / "x.csv", NOWHERE.parent / "x.csv", NOWHERE.parent]
)
def test_a_place_that_takes_no_results_is_refused_before_the_work(run, out, monkeypatch):
    monkeypatch.setattr("mvcr_cli.engine.evaluate.infer", None)
    with pytest.raises(CannotCreate, match=f"^cannot create {out}: No such file"):
        check(run, out=out)
    with pytest.raises(CannotCreate, match=f"^cannot create {out}: No such file"):
        scale_curve(EvalConfig(run=run, device="cpu", workers=1, scales=(0.5, 1.0), out=out))


def test_a_place_is_tried_without_a_trace(run, tmp_path):
    check(run, out=tmp_path / "new" / "results")
    assert not list(tmp_path.iterdir())


def test_a_damaged_record_of_training_pictures_keeps_nobody_from_evaluating(run, other, tmp_path):
    mine = shutil.copytree(run, tmp_path / "run")
    (mine / "split.json").write_text("{")
    assert check(mine, other)[0].trained_on is None


def test_bad_pictures_are_reported_once_and_not_scored(run, other, tmp_path):
    bad = shutil.copytree(other, tmp_path / "bad")
    whole = (bad / "square" / "050.png").read_bytes()
    (bad / "circle" / "cut.png").write_bytes(whole[:300])
    (bad / "circle" / "empty.jpg").write_bytes(b"")
    (bad / "circle" / "notes.txt").write_text("not a picture, and no problem")
    full, results, _ = check(run, other)
    report, fewer, problems = check(run, bad)
    assert sorted((Path(problem.path).name, problem.code) for problem in problems) == [
        ("cut.png", "corrupt"),
        ("empty.jpg", "empty"),
    ]
    assert report.skipped == 2
    assert report.images + report.skipped == 11
    assert report.confusion == full.confusion
    assert [result.probabilities for result in fewer] == [result.probabilities for result in results]


def test_nothing_to_judge_is_an_error(run, tmp_path):
    (tmp_path / "circle").mkdir()
    (tmp_path / "circle" / "x.png").write_text("no picture")
    with pytest.raises(DataError):
        check(run, tmp_path)
    with pytest.raises(InputMissing):
        check(run, tmp_path / "nowhere")
    with pytest.raises(InputMissing):
        check(tmp_path / "nowhere")


def test_weights_that_stand_alone_need_a_folder(run, other, tmp_path):
    alone = tmp_path / "model.safetensors"
    shutil.copyfile(run / "weights" / "best.safetensors", alone)
    with pytest.raises(ConfigMismatch, match=r"model\.safetensors"):
        check(alone)
    assert check(alone, other)[0].confusion == check(run, other)[0].confusion


@pytest.mark.parametrize("content", ["{", "[]", '{"val": [["x"]]}', '{"val": [["x.png", "zebra", "0"]]}', '{"val": 3}'])
def test_a_damaged_split_is_no_crash(run, tmp_path, content):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "split.json").write_text(content)
    with pytest.raises(ConfigMismatch):
        check(copy)


def test_an_exported_file_is_not_taken_for_weights(other, tmp_path):
    exported = tmp_path / "x.onnx"
    exported.write_bytes(b"any")
    with pytest.raises(ConfigMismatch, match="exported file"):
        evaluate(EvalConfig(data=other, run=exported))


def test_a_run_that_is_not_there_is_guessed_from_those_that_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "leaves").mkdir(parents=True)
    for name, hint in (
        ("leaves", "did you mean runs/leaves?"),
        ("runs/leafs", "did you mean runs/leaves?"),
        ("x/leaves", "list the runs with: ls runs"),
        ("mice", "list the runs with: ls runs"),
    ):
        with pytest.raises(InputMissing) as caught:
            find_run(Path(name))
        assert caught.value.hint == hint


def test_a_folder_that_is_no_run_is_not_told_to_go_on(other, tmp_path):
    with pytest.raises(InputMissing, match="is no run folder") as caught:
        find_run(other)
    assert "--resume" not in caught.value.hint
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputMissing, match=r"no weights/best\.safetensors") as caught:
        find_run(tmp_path)
    assert "--resume" in caught.value.hint


def test_the_newest_finished_run_is_meant_without_a_name(run, other, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputMissing) as caught:
        evaluate(EvalConfig(data=other))
    assert "mvcr train" in caught.value.hint
    shutil.copytree(run, tmp_path / "runs" / "done")
    unfinished = shutil.copytree(run, tmp_path / "runs" / "unfinished")
    (unfinished / "summary.json").unlink()
    said: list[str] = []
    report, _, _ = evaluate(EvalConfig(data=other, device="cpu", workers=1), say=said.append)
    assert report.run == "runs/done"
    assert "runs/done" in said[0]


def test_a_summary_of_perfect_and_of_useless_verdicts():
    labels = np.array([0, 1, 2, 0, 1, 2])
    options = {"run": "r", "data": "d", "classes": ("a", "b", "c"), "missing": (), "skipped": 0, "seconds": 0.0}
    perfect = summarise(labels=labels, probabilities=np.eye(3)[labels], **options)
    assert (perfect.top1.value, perfect.balanced_accuracy, perfect.macro_f1, perfect.auroc) == (1, 1, 1, 1)
    assert perfect.top1.low < 1
    assert perfect.top5 is None
    useless = summarise(labels=labels, probabilities=np.full((6, 3), 1 / 3), **options)
    assert useless.top1.value == pytest.approx(1 / 3)
    assert useless.auroc == pytest.approx(0.5)
    assert useless.loss == pytest.approx(np.log(3))
    assert useless.calibration_error == pytest.approx(0, abs=1e-9)


def test_the_data_are_the_same_for_scan_and_split(run, data):
    split = json.loads((run / "split.json").read_text())
    index = scan(data)
    rows = {
        (os.path.relpath(sample.path, split["root"]), index.classes[sample.label], sample.digest)
        for sample in index.samples
    }
    assert {tuple(row) for row in split["train"] + split["val"]} == rows


def test_a_lack_of_memory_is_not_called_bad_pictures():
    short = [Problem(path=name, code="out_of_memory", detail="not enough memory to decode it") for name in ("a", "b")]
    assert none_readable("pictures", short).exit_code == ExitCode.INTERNAL
    assert (
        none_readable("pictures", [*short, Problem(path="c", code="corrupt", detail="cut")]).exit_code
        == ExitCode.BAD_DATA
    )
