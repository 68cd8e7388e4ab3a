"""Training: the same seed gives the same bits, an interruption leaves no trace, and every refusal leaves files alone."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import settings, shapes, stop_at, trained

from mvcr_cli.checkpoint import Checkpoint
from mvcr_cli.cli.options import Unsure
from mvcr_cli.config import AugmentConfig, TrainConfig
from mvcr_cli.data.preprocess import Preprocess
from mvcr_cli.engine import clock as clock_module
from mvcr_cli.engine import train as train_module
from mvcr_cli.engine import validation as validation_module
from mvcr_cli.engine.loss import class_weights, multi_scale_loss, soft_targets
from mvcr_cli.engine.optim import load_optimiser_state, make_optimiser, optimiser_state
from mvcr_cli.engine.prepare import BYTES_PER_PIXEL, UNSURE_LAYERS, _fit_scales
from mvcr_cli.engine.rundir import RunDirectory
from mvcr_cli.engine.session import Session
from mvcr_cli.engine.starting import Start, restarted
from mvcr_cli.engine.train import train
from mvcr_cli.errors import CannotCreate, CheckpointError, ConfigMismatch, DataError, RunBusy, UsageError
from mvcr_cli.models import TRUNKS, build, config_for
from mvcr_cli.records import CheckReport, EpochReport, TrainReport, record


@pytest.fixture(scope="module", autouse=True)
def small_trunk() -> Iterator[None]:
    """A quarter of the channels: the laws are the same, and a state is a megabyte instead of twenty."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TRUNKS, "10n", dataclasses.replace(TRUNKS["10n"], width=8))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    trained(data, run)
    return run


@pytest.fixture(scope="module")
def accumulated(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "accumulated"
    trained(data, run, accumulate=2)
    return run


def strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The epoch records without what a clock measured."""
    timed = {"seconds", "cpu_seconds", "left_seconds", "images_per_second"}
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in strict(line).items() if key not in timed} for line in lines]


def same(a: Path, b: Path) -> bool:
    names = ("weights/last.safetensors", "weights/best.safetensors")
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names) and metrics(a) == metrics(b)


def fingerprint(root: Path) -> dict[str, tuple[str, int, int]]:
    return {
        str(path.relative_to(root)): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "", path.stat().st_mtime_ns,
            path.stat().st_mode,
        )
        for path in [root, *root.rglob("*")]
    }  # fmt: skip


def test_it_learns_what_is_easy(data, tmp_path):
    epochs, end = trained(data, tmp_path / "run", imgsz=32, epochs=5)
    assert end.best_accuracy > 0.8
    assert end.best_accuracy == max(epoch.val_accuracy for epoch in epochs)
    assert epochs[-1].train_loss < epochs[0].train_loss
    assert (end.train_images, end.val_images, end.skipped, end.stopped_by) == (24, 8, 0, "finished")
    assert (end.steps, end.epochs, len(epochs)) == (15, 5, 5)


@pytest.mark.parametrize("changes", [{"workers": 2}, {"workers": 1, "cache_mb": 0}, {"save_every": 1}])
def test_the_same_seed_gives_the_same_bits(data, undisturbed, tmp_path, changes):
    trained(data, tmp_path / "run", **changes)
    assert same(tmp_path / "run", undisturbed)


def test_where_the_data_are_and_in_which_order_they_were_made_does_not_matter(data, undisturbed, tmp_path):
    moved = tmp_path / "elsewhere" / "pictures"
    for path in sorted(data.rglob("*.png"), reverse=True):
        target = moved / path.relative_to(data)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    trained(moved, tmp_path / "run")
    assert same(tmp_path / "run", undisturbed)


# Asked after each of three steps and, in a validation, twice more: 3 and 4 cut the first validation short, 5 ends the epoch.
@pytest.mark.parametrize("question", [1, 3, 5, 9])
def test_an_interrupted_run_ends_bit_for_bit_like_an_undisturbed_one(data, undisturbed, tmp_path, question):
    run = tmp_path / "run"
    _, end = trained(data, run, stop=stop_at(question, "SIGTERM"))
    assert end.stopped_by == "SIGTERM"
    assert not (run / "summary.json").exists()
    _, end = trained(data, run, resume=True, workers=2)
    assert end.stopped_by == "finished"
    assert same(run, undisturbed)


@pytest.mark.parametrize("step", [1, 3])
def test_accumulated_gradients_survive_an_interruption(data, accumulated, undisturbed, tmp_path, step):
    run = tmp_path / "run"
    trained(data, run, accumulate=2, stop=stop_at(step))
    trained(data, run, accumulate=2, resume=True)
    assert same(run, accumulated)
    assert not same(run, undisturbed)


def test_the_optimiser_moves_once_the_accumulation_is_full(data, tmp_path):
    for question, moved in ((1, False), (2, True)):
        run = tmp_path / str(question)
        trained(data, run, accumulate=2, stop=stop_at(question))
        state = RunDirectory(run).load_state(lambda text: None)
        assert state is not None
        kinds = {name.partition(".")[0] for name in state[0]}
        assert ("opt" in kinds, "gradient" in kinds) == (moved, not moved)


def test_dropout_is_a_function_of_the_step(data, tmp_path):
    """The `cnn` drops half of its features; a resumed run drops the same ones."""
    a, b = tmp_path / "a", tmp_path / "b"
    trained(data, a, model="cnn", imgsz=32)
    trained(data, b, model="cnn", imgsz=32, stop=stop_at(2))
    trained(data, b, model="cnn", imgsz=32, resume=True)
    assert same(a, b)


def test_being_interrupted_all_the_time_changes_nothing(data, undisturbed, tmp_path):
    """Every start does at most one thing: a step, or a validation that is cut short and done again."""
    run = tmp_path / "run"
    for start in range(30):
        _, end = trained(data, run, resume=True, stop=stop_at(1 + start % 3))
        if end.stopped_by == "finished":
            break
        steps = [path.name.split("-")[1] for path in (run / "state").iterdir()]
        assert len(steps) == len(set(steps))  # a state replaces the one from before its validation
    assert (run / "summary.json").exists()
    assert same(run, undisturbed)


def test_a_validation_that_is_cut_short_twice_is_still_that_of_its_epoch(data, undisturbed, tmp_path):
    run = tmp_path / "run"
    for question in (3, 1, 2):
        _, end = trained(data, run, resume=True, stop=stop_at(question))
        assert end.steps == 3
    trained(data, run, resume=True)
    assert same(run, undisturbed)


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_kill_between_metrics_and_state_changes_nothing(data, undisturbed, tmp_path, epoch):
    run = tmp_path / "run"
    running = train(settings(data, run))
    for _ in range(epoch):
        assert isinstance(next(running), EpochReport)  # written: weights and metrics, and not the state
    running.close()
    assert len(metrics(run)) == epoch
    trained(data, run, resume=True, stop=stop_at(1))
    assert len(metrics(run)) == epoch
    trained(data, run, resume=True)
    assert same(run, undisturbed)


def test_every_epoch_visits_the_pictures_once_in_an_order_of_its_own(data, tmp_path, monkeypatch):
    step, visited = Session.step, []
    monkeypatch.setattr(
        Session, "step", lambda self, batch, *rest: (visited.extend(batch.paths), step(self, batch, *rest))[1]
    )
    trained(data, tmp_path / "run")
    first, second = visited[:24], visited[24:]
    assert len(set(first)) == len(set(second)) == 24
    assert set(first) == set(second)
    assert len({tuple(first), tuple(second), tuple(sorted(first))}) == 3


@pytest.mark.parametrize("harm", ["flip", "cut"])
def test_a_damaged_newest_state_is_noticed_and_the_one_before_is_used(data, undisturbed, tmp_path, harm):
    run = tmp_path / "run"
    trained(data, run, stop=stop_at(3), save_every=1)
    states = sorted((run / "state").iterdir())
    assert len(states) == 2
    content = bytearray(states[-1].read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 1
    states[-1].write_bytes(content[:-9] if harm == "cut" else content)
    said: list[str] = []
    trained(data, run, resume=True, say=said.append)
    warnings = [line for line in said if line.startswith("warning")]
    assert len(warnings) == 1
    assert states[-1].name in warnings[0]
    assert same(run, undisturbed)


def test_the_run_directory_describes_itself(data, undisturbed):
    for name in ("config.json", "split.json", "summary.json", "eval.json"):
        assert isinstance(strict((undisturbed / name).read_text()), dict)
    config = strict((undisturbed / "config.json").read_text())
    assert set(config["train"]) == {field.name for field in dataclasses.fields(TrainConfig)}
    assert None not in [config["train"][key] for key in ("model", "imgsz", "batch", "epochs", "lr", "threads")]
    split = strict((undisturbed / "split.json").read_text())
    assert split["root"] == str(data)
    pictures = sorted(str(path.relative_to(data)) for path in data.rglob("*.png"))
    assert sorted(row[0] for row in split["train"] + split["val"]) == pictures
    assert {row[1] for row in split["val"]} == {"circle", "square"} == set(split["classes"])
    records = metrics(undisturbed)
    assert [record["epoch"] for record in records] == [1, 2]
    assert {(record["record"], record["schema"]) for record in records} == {("epoch", 1)}
    with open(undisturbed / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["val_accuracy"]) for row in rows] == [record["val_accuracy"] for record in records]
    summary = strict((undisturbed / "summary.json").read_text())
    assert summary["best_accuracy"] == max(record["val_accuracy"] for record in records)
    evaluation = strict((undisturbed / "eval.json").read_text())
    assert evaluation["top1"]["value"] == summary["best_accuracy"]
    assert not [path for path in undisturbed.rglob("*") if path.name.endswith(".tmp")]
    assert len(list((undisturbed / "state").iterdir())) == 2
    best = Checkpoint.load(undisturbed / "weights" / "best.safetensors")
    assert best.classes == ("circle", "square")
    assert best.made["val_accuracy"] == summary["best_accuracy"]
    assert str(data) not in str(best.made)  # weights are shared; where the data were is nobody's business


def test_the_data_folder_is_never_written(data, tmp_path):
    before = fingerprint(data)
    trained(data, tmp_path / "run", epochs=1)
    assert fingerprint(data) == before


def test_a_dry_run_writes_nothing(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    (report,) = train(settings(data, None, dry_run=True), say=said.append)
    assert isinstance(report, CheckReport)
    assert list(train(settings(data, tmp_path / "run", dry_run=True), say=said.append)) == [report]
    assert any("24 training and 8 validation" in line for line in said)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_refuses_the_folder_that_training_would_refuse(data, begun, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.txt").touch()
    for folder in (begun, tmp_path / "photos"):
        before = fingerprint(folder)
        with pytest.raises(CannotCreate) as caught:
            list(train(settings(data, folder, dry_run=True)))
        assert "--name or --run" in caught.value.hint
        assert fingerprint(folder) == before
    assert list(train(settings(data, begun, dry_run=True, resume=True)))


def test_runs_without_a_name_get_numbers(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ends = [trained(data, None, epochs=1, model="resnet10n")[1] for _ in range(2)]
    assert [end.run for end in ends] == ["runs/resnet10n-1", "runs/resnet10n-2"]


def broken_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The pictures of one training step become infinite, as a bad transform would make them."""
    original, calls = Preprocess.normalise, iter(range(10**6))

    def normalise(self: Preprocess, pixels: torch.Tensor) -> torch.Tensor:
        x = original(self, pixels)
        return x * float("inf") if pixels.shape[0] == 8 and next(calls) == step else x

    monkeypatch.setattr(Preprocess, "normalise", normalise)


def test_a_loss_that_is_no_number_ends_the_run_and_leaves_the_weights(data, undisturbed, tmp_path, monkeypatch):
    run = tmp_path / "run"
    broken_at(monkeypatch, 4)
    with pytest.raises(DataError) as caught:
        trained(data, run)
    assert caught.value.exit_code == 65
    assert "step 4" in caught.value.message
    assert str(data) in caught.value.message
    Checkpoint.load(run / "weights" / "last.safetensors")
    assert metrics(run)[:-1] == metrics(undisturbed)[:1]
    assert metrics(run)[-1]["nonfinite"]
    monkeypatch.undo()
    trained(data, run, resume=True)
    assert same(run, undisturbed)


def test_a_network_that_breaks_on_the_last_step_is_not_kept(data, tmp_path, monkeypatch):
    """No later loss tells: the validation has to."""
    run = tmp_path / "run"
    trained(data, run, stop=stop_at(5))
    before = fingerprint(run / "weights")
    assert len(before) == 3
    move = Session._move

    def break_weights(self: Session, step: int, *rest: Any) -> None:
        move(self, step, *rest)
        if step == 5:
            with torch.no_grad():
                self.average.network.fc.weight.fill_(float("nan"))

    monkeypatch.setattr(Session, "_move", break_weights)
    with pytest.raises(DataError, match="step 6"):
        trained(data, run, resume=True)
    assert fingerprint(run / "weights") == before


def test_one_writer_a_run(data, tmp_path):
    run = tmp_path / "run"
    trained(data, run, stop=stop_at(1))
    before = fingerprint(run)
    with RunDirectory(run).locked(), pytest.raises(RunBusy) as caught:
        trained(data, run, resume=True)
    assert caught.value.exit_code == 75
    assert fingerprint(run) == before
    trained(data, run, resume=True)


def test_a_run_never_goes_into_the_data(data, tmp_path, monkeypatch):
    val = shapes(tmp_path / "val", images=2, first=50)
    before = fingerprint(data), fingerprint(val)
    os.symlink(data, tmp_path / "link")
    for run in (data, data / "run", data / "circle" / "run", tmp_path / "link" / "run", val / "run"):
        with pytest.raises(CannotCreate) as caught:
            trained(data, run, val=val)
        assert caught.value.exit_code == 73
    monkeypatch.chdir(data)
    for folder in (Path("."), data):
        with pytest.raises(CannotCreate):
            trained(folder, None)
    assert (fingerprint(data), fingerprint(val)) == before


def test_existing_runs_and_foreign_folders_are_left_alone(data, undisturbed, tmp_path):
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter1.txt").write_text("precious")
    for run in (undisturbed, foreign, foreign / "chapter1.txt"):
        before = fingerprint(run)
        with pytest.raises(CannotCreate):
            trained(data, run)
        assert fingerprint(run) == before


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "prepare", lambda *_: pytest.fail("reads the data"))


@pytest.mark.usefixtures("unread")
def test_a_folder_that_cannot_be_the_run_is_refused_before_the_data_are_read(data, undisturbed, tmp_path):
    moved = shutil.copytree(undisturbed, tmp_path / "moved")
    (moved / ".lock").unlink()
    for run in (undisturbed, moved, data):
        before = fingerprint(run)
        with pytest.raises(CannotCreate):
            trained(data, run)
        assert fingerprint(run) == before


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_another_process_begins_is_refused_before_the_data_are_read(data, tmp_path, resume):
    (tmp_path / "run").mkdir()
    with RunDirectory(tmp_path / "run").locked():
        before = fingerprint(tmp_path)
        with pytest.raises(RunBusy):
            trained(data, tmp_path / "run", resume=resume)
        assert fingerprint(tmp_path) == before


@pytest.mark.usefixtures("unread")
def test_a_finished_run_is_told_before_the_data_are_read(data, undisturbed):
    assert len(list(train(settings(data, undisturbed, resume=True)))) == 1


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_another_process_ended_meanwhile_is_left_as_it_is(data, undisturbed, tmp_path, monkeypatch, resume):
    """The lock decides, and not what was there before the data were read."""
    run, prepare = tmp_path / "run", train_module.prepare

    def slow(*arguments: Any) -> Any:
        shutil.copytree(undisturbed, run)
        return prepare(*arguments)

    monkeypatch.setattr(train_module, "prepare", slow)
    with contextlib.nullcontext() if resume else pytest.raises(CannotCreate):
        (report,) = train(settings(data, run, resume=resume))
        assert isinstance(report, TrainReport) and report.run == str(run)
    assert same(run, undisturbed)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b'{"best_accuracy": "high"}'])
def test_a_damaged_record_of_a_finished_run_is_a_sentence(data, undisturbed, tmp_path, content):
    run = shutil.copytree(undisturbed, tmp_path / "run")
    (run / "summary.json").write_bytes(content)
    with pytest.raises(ConfigMismatch, match=r"summary\.json"):
        list(train(settings(data, run, resume=True)))


def test_a_dry_run_may_look_at_the_folder_it_stands_in(data, monkeypatch):
    monkeypatch.chdir(data)
    assert list(train(settings(Path("."), None, dry_run=True)))


def test_memory_that_holds_files_is_available_for_a_batch(data, tmp_path, monkeypatch):
    """How much of it there is depends on what was read lately, and the batch may not."""
    monkeypatch.setattr("os.sysconf", lambda name: 4096 if name == "SC_PAGE_SIZE" else 1000)
    said: list[str] = []
    trained(data, tmp_path / "run", batch=None, stop=stop_at(1), say=said.append)
    assert strict((tmp_path / "run" / "config.json").read_text())["train"]["batch"] == 16
    assert not [line for line in said if line.startswith("warning: a batch")]


def test_a_batch_that_memory_made_smaller_is_told(data, tmp_path, monkeypatch):
    monkeypatch.setattr("mvcr_cli.engine.prepare.available_memory", lambda: 4 * 5 * BYTES_PER_PIXEL * 48 * 48)
    said: list[str] = []
    trained(data, tmp_path / "run", batch=None, scales=(1.0,), stop=stop_at(1), say=said.append)
    assert strict((tmp_path / "run" / "config.json").read_text())["train"]["batch"] == 5
    assert [line for line in said if "a batch of 5 and not of 16" in line and "--batch 5" in line]


def test_the_fitted_batch_counts_the_views(data, tmp_path, monkeypatch):
    monkeypatch.setattr("mvcr_cli.engine.prepare.available_memory", lambda: 4 * 10 * BYTES_PER_PIXEL * 48 * 48)
    for name, found, options in (
        ("a", 10, {"scales": (1.0,)}),
        ("b", 2, {"scales": (2.0, 1.0)}),
        ("c", 6, {"unsure": 0.3}),
    ):
        trained(data, tmp_path / name, batch=None, stop=stop_at(1), **options)
        assert strict((tmp_path / name / "config.json").read_text())["train"]["batch"] == found


def test_a_batch_larger_than_the_data_is_told_and_can_be_resumed(data, tmp_path):
    said: list[str] = []
    trained(data, tmp_path / "run", batch=64, stop=stop_at(1), say=said.append)
    assert "warning: --batch 64 is more than the training pictures: 24" in said
    with pytest.raises(ConfigMismatch):
        trained(data, tmp_path / "run", batch=8, resume=True)
    assert trained(data, tmp_path / "run", batch=64, resume=True)[1].stopped_by == "finished"


def test_with_nothing_to_resume_it_says_that_a_new_run_begins(data, tmp_path):
    said: list[str] = []
    trained(data, tmp_path / "run", resume=True, stop=stop_at(1), say=said.append)
    assert any("nothing to resume" in text for text in said)
    trained(data, tmp_path / "run", resume=True, stop=stop_at(1), say=(again := []).append)
    assert not any("nothing to resume" in text for text in again)


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"unsure": 0.3}, "views 2, 1, 1/2 (taught: 1), layers blur, max, batch"),
        ({}, "views 2, 1, 1/2, batch"),
        ({"unsure": 0.3, "scales": (1.0,)}, "views 1, layers blur, max, batch"),
    ],
)
def test_a_run_says_which_of_its_views_are_taught(data, tmp_path, changes, shown):
    said: list[str] = []
    given = {"scales": (2.0, 1.0, 0.5)} | changes
    trained(data, tmp_path / "run", **given, stop=stop_at(1), say=said.append)
    assert sum(shown in text for text in said) == 1


def test_the_help_of_unsure_says_its_layers():
    (option,) = Unsure.__metadata__
    assert f"--layers defaults to {','.join(UNSURE_LAYERS)}." in option.help


def test_views_that_are_too_small_are_named(data, tmp_path):
    said: list[str] = []
    given = {"imgsz": 32, "scales": (1.0, 0.25), "unsure": 0.3}
    trained(data, tmp_path / "run", **given, stop=stop_at(1), say=said.append)
    assert any(text.startswith("warning: --scales 1/4: too small") for text in said)
    assert any(text.startswith("warning: --unsure") for text in said)


def test_a_class_that_no_picture_validates_is_a_finding(data, tmp_path):
    root = shutil.copytree(data, tmp_path / "data")
    for picture in sorted((root / "circle").iterdir())[1:]:
        picture.unlink()
    (report,) = train(settings(root, None, dry_run=True))
    assert isinstance(report, CheckReport)
    assert "missing_classes" in [finding["code"] for finding in report.findings]
    with pytest.raises(DataError, match="--strict"):
        trained(root, tmp_path / "run", strict=True)


def test_a_finished_run_is_left_as_it_is(data, undisturbed):
    before = fingerprint(undisturbed)
    said: list[str] = []
    (report,) = train(settings(data, undisturbed, resume=True), say=said.append)
    assert isinstance(report, TrainReport)
    assert record(report) == strict((undisturbed / "summary.json").read_text())
    assert "finished already" in said[-1]
    assert fingerprint(undisturbed) == before


def test_a_finished_run_does_not_pass_for_one_with_other_settings(data, undisturbed):
    before = fingerprint(undisturbed)
    with pytest.raises(ConfigMismatch, match="was started with epochs = "):
        trained(data, undisturbed, resume=True, epochs=50)
    assert fingerprint(undisturbed) == before


def test_what_a_kill_tore_while_the_report_was_written_is_swept_up(data, undisturbed, tmp_path):
    """The report comes after the record that the run is finished."""
    run = shutil.copytree(undisturbed, tmp_path / "run")
    (run / "plots").mkdir(exist_ok=True)
    for torn in (run / ".report.html.0a1b2c3d.tmp", run / "plots" / ".confusion.png.0a1b2c3d.tmp"):
        torn.write_bytes(b"half")
    (report,) = train(settings(data, run, resume=True))
    assert isinstance(report, TrainReport) and report.run == str(run)
    assert not list(run.rglob(".*.tmp"))


@pytest.fixture(scope="module")
def begun(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "begun"
    trained(data, run, stop=stop_at(1))
    return run


CONTRADICTIONS: list[dict[str, Any]] = [
    {"lr": 0.5}, {"epochs": 3}, {"batch": 4}, {"model": "resnet10n"}, {"imgsz": 96}, {"seed": 1}, {"ema": 0.5},
    {"augment": AugmentConfig(crop=0.9)}, {"scales": (1.0, 0.75)}, {"accumulate": 2}, {"precision": "bf16"},
    {"epochs": None, "seconds": 60.0}, {"fit": "stretch"}, {"progressive": False}, {"split": 0.5},
]  # fmt: skip


@pytest.mark.parametrize("change", CONTRADICTIONS, ids=lambda change: next(iter(change)))
def test_other_settings_cannot_resume_a_run(data, begun, change):
    before = fingerprint(begun)
    with pytest.raises(ConfigMismatch) as caught:
        trained(data, begun, resume=True, **change)
    assert next(iter(change)) in caught.value.message or "pictures" in caught.value.message
    assert fingerprint(begun) == before


@pytest.mark.parametrize(
    ("spread", "side", "scales"),
    [
        (1.0, 128, (1.0,)),
        (1.9, 128, (1.0,)),
        (2.0, 128, (1.0, 0.5)),
        (4.0, 224, (1.0, 0.5, 0.25)),
        (9.0, 128, (1.0, 0.5)),
    ],
)
def test_views_are_as_many_as_the_sizes_of_the_pictures_ask_for(spread, side, scales):
    """A view that is too small for the stem to see anything is none."""
    assert _fit_scales("mvcr18", spread, side) == scales
    assert _fit_scales("resnet18", spread, side) == (1.0,)


def test_teaching_across_scales_counts_and_is_refused_where_there_is_one_view(data, tmp_path):
    for name, distill in (("with", 1.0), ("without", 0.0)):
        trained(data, tmp_path / name, scales=(1.0, 0.75), distill=distill, epochs=1)
    assert not same(tmp_path / "with", tmp_path / "without")
    with pytest.raises(UsageError, match="no other to agree with"):
        trained(data, tmp_path / "run", distill=0.0)


def test_other_pictures_cannot_resume_a_run(begun, tmp_path):
    for number, other in enumerate([{"images": 15}, {"first": 3}, {"classes": ("circle", "square", "triangle")}]):
        with pytest.raises(ConfigMismatch):
            trained(shapes(tmp_path / str(number), **other), begun, resume=True)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"train": {}, "start": {}, "classes": []}'])
def test_a_damaged_config_is_no_crash(data, begun, tmp_path, content):
    run = shutil.copytree(begun, tmp_path / "run")
    (run / "config.json").write_bytes(content)
    with pytest.raises(ConfigMismatch):
        trained(data, run, resume=True)


CHANGES: list[dict[str, Any]] = [
    {"seed": 1}, {"lr": 0.002}, {"weight_decay": 0.5}, {"warmup": 0.5}, {"clip": 0.01}, {"label_smoothing": 0.0},
    {"ema": 0.0}, {"accumulate": 2}, {"batch": 6}, {"split": 0.5}, {"scales": (1.0, 0.75)},
    {"fit": "stretch"}, {"model": "resnet10n"}, {"imgsz": 96}, {"progressive": False},
    {"augment": AugmentConfig(hflip=False)}, {"augment": AugmentConfig(mixup=0.4)}, {"precision": "bf16"},
    {"unsure": 0.3}, {"augment": AugmentConfig(resolution=1.0)}, {"augment": AugmentConfig(crop=1.0)},
]  # fmt: skip


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return Checkpoint.load(run / "weights" / "last.safetensors").tensors


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures that are wider than high, so that `fit` matters."""
    root = shapes(tmp_path_factory.mktemp("wide") / "data", images=8)
    from PIL import Image

    for path in root.rglob("*.png"):
        Image.open(path).resize((48, 30)).save(path)
    return root


@pytest.fixture(scope="module")
def one_epoch(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "one"
    trained(wide, run, epochs=1, batch=4)
    return run


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_every_setting_that_should_matter_does(wide, one_epoch, tmp_path, change):
    trained(wide, tmp_path / "run", **({"epochs": 1, "batch": 4} | change))
    a, b = tensors(one_epoch), tensors(tmp_path / "run")
    assert a.keys() != b.keys() or any(a[k].shape != b[k].shape or not torch.equal(a[k], b[k]) for k in a)


def test_patience_ends_a_run_that_gets_no_better(data, tmp_path):
    epochs, end = trained(data, tmp_path / "run", imgsz=32, epochs=30, patience=2, lr=1e-9)
    assert end.stopped_by == "patience"
    assert len(epochs) == end.best_epoch + 2 == end.epochs
    assert (tmp_path / "run" / "summary.json").exists()
    assert trained(data, tmp_path / "patient", imgsz=32, epochs=4, lr=1e-9)[1].stopped_by == "finished"
    (tmp_path / "run" / "summary.json").unlink()  # as after a kill before the end
    again, second = trained(data, tmp_path / "run", imgsz=32, epochs=30, patience=2, lr=1e-9, resume=True)
    assert (second.stopped_by, second.steps, again) == ("patience", end.steps, [])


class Time:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.now


def on_a_slow_machine(monkeypatch: pytest.MonkeyPatch, step_seconds: float, validation_seconds: float) -> Time:
    """A clock that only steps and validations move."""
    time, step, infer = Time(), Session.step, validation_module.infer

    def slow_step(self: Session, *arguments: Any) -> torch.Tensor:
        time.now += step_seconds
        return step(self, *arguments)

    def slow_infer(*arguments: Any) -> Any:
        time.now += validation_seconds
        return infer(*arguments)

    monkeypatch.setattr(clock_module, "time", time)
    monkeypatch.setattr(train_module, "time", time)
    monkeypatch.setattr(Session, "step", slow_step)
    monkeypatch.setattr(validation_module, "infer", slow_infer)
    return time


def test_a_run_with_a_budget_ends_inside_it(data, tmp_path, monkeypatch):
    """A step takes two seconds and a validation three."""
    budget, time = 80.0, on_a_slow_machine(monkeypatch, 2, 3)
    epochs, end = trained(data, tmp_path / "run", imgsz=32, epochs=None, seconds=budget, started=time.now - 5)
    assert 0.75 * budget <= end.seconds <= budget
    assert end.stopped_by == "finished"
    assert 3 * len(epochs) <= 0.1 * budget + 6  # validation takes a tenth of the time, and the last one
    assert epochs[-1].step == end.steps
    assert strict((tmp_path / "run" / "summary.json").read_text())["steps"] == end.steps


@pytest.mark.parametrize("budget", range(30, 100, 10))
@pytest.mark.parametrize("validation", [5.5, 16, 18])
def test_a_slow_validation_ends_inside_the_budget_too(data, tmp_path, monkeypatch, budget, validation):
    """A step of two pictures takes two seconds and an epoch 16; a validation of 16 pictures a third of that or more."""
    time = on_a_slow_machine(monkeypatch, 2, validation)
    asked = {"imgsz": 48, "epochs": None, "seconds": float(budget), "batch": 2, "split": 0.5}
    epochs, end = trained(data, tmp_path / "run", **asked, started=time.now - 5)
    assert end.stopped_by == "finished" and epochs[-1].step == end.steps
    assert end.seconds <= budget
    assert end.seconds >= 0.4 * budget


def test_bad_pictures_are_left_out_and_named_once(data, tmp_path):
    root = shutil.copytree(data, tmp_path / "data")
    whole = (root / "circle" / "000.png").read_bytes()
    for number in range(5):
        (root / "square" / f"cut{number}.png").write_bytes(whole[: 200 + number])
    said: list[str] = []
    _, end = trained(root, tmp_path / "run", say=said.append)
    assert end.skipped == 5
    warnings = [line for line in said if "cut0.png" in line]
    assert len(warnings) == 1
    assert "cannot be decoded (corrupt): 5 of" in warnings[0]
    assert all(warnings[0].count(f"cut{number}.png") == 1 for number in range(5))


def test_what_is_only_a_warning_is_not_counted_as_skipped(data, tmp_path):
    root = shutil.copytree(data, tmp_path / "data")
    (root / "square").rename(root / "Circle")
    (root / "circle" / "note.pdf").write_bytes(b"%PDF-1.7")
    (report,) = (found for found in train(settings(root, None, dry_run=True)) if isinstance(found, CheckReport))
    assert {finding["code"] for finding in report.findings} >= {"twin_classes", "not_an_image"}
    assert report.skipped == 1
    assert trained(root, tmp_path / "run", epochs=1)[1].skipped == 1


def test_without_a_readable_validation_picture_there_is_no_run(data, tmp_path):
    val = tmp_path / "val"
    (val / "circle").mkdir(parents=True)
    (val / "circle" / "x.png").write_bytes((data / "circle" / "000.png").read_bytes()[:150])
    with pytest.raises(DataError, match="validation"):
        trained(data, tmp_path / "run", val=val)


def test_strict_refuses_findings(data, tmp_path):
    root = shutil.copytree(data, tmp_path / "data")
    shutil.copyfile(root / "circle" / "000.png", root / "square" / "same.png")
    with pytest.raises(DataError, match="--strict"):
        trained(root, tmp_path / "run", strict=True)
    assert not (tmp_path / "run").exists()


def test_own_weights_start_another_run(data, undisturbed, tmp_path):
    weights = undisturbed / "weights" / "best.safetensors"
    run = tmp_path / "run"
    trained(
        data, run, weights=str(weights), imgsz=96, lr=1e-12, epochs=1, ema=0.0
    )  # 96 px alone would take the other stem
    mine, theirs = tensors(run), Checkpoint.load(weights).tensors
    torch.testing.assert_close(mine["layer4.0.conv1.weight"], theirs["layer4.0.conv1.weight"], rtol=0, atol=1e-6)
    torch.testing.assert_close(mine["fc.weight"], theirs["fc.weight"], rtol=0, atol=1e-6)
    assert strict((run / "config.json").read_text())["start"]["pretrained"]


def test_own_weights_go_to_the_scales_that_they_were_of(data, tmp_path):
    asked = {"imgsz": 48, "progressive": False}  # smaller pictures would have no half view
    trained(data, tmp_path / "wide", scales=(2.0, 1.0, 0.5), lr=0.01, **asked)
    weights = tmp_path / "wide" / "weights" / "last.safetensors"
    trained(data, tmp_path / "run", weights=str(weights), scales=(1.0, 0.5), lr=1e-12, epochs=1, ema=0.0, **asked)
    mine, theirs = tensors(tmp_path / "run"), Checkpoint.load(weights).tensors
    double, half = theirs["bn1.scales.0.weight"], theirs["bn1.scales.1.weight"]
    assert not torch.allclose(double, half, rtol=0, atol=1e-4)
    torch.testing.assert_close(mine["bn1.scales.0.weight"], half, rtol=0, atol=1e-6)


@pytest.mark.parametrize("question", [1, 2, 5])
@pytest.mark.parametrize("layers", [(), ("blur", "gem", "heads")])
def test_a_run_that_began_from_weights_resumes_with_the_same_bits(data, undisturbed, tmp_path, question, layers):
    """New parts, some in the middle of the trunk, are in parameter groups of their own."""
    plain = tmp_path / "plain"
    trained(data, plain, layers=())
    given = {"weights": str(plain / "weights" / "last.safetensors"), "layers": layers}
    trained(data, tmp_path / "whole", **given)
    trained(data, tmp_path / "stopped", **given, stop=stop_at(question))
    trained(data, tmp_path / "stopped", **given, resume=True)
    assert same(tmp_path / "stopped", tmp_path / "whole")


def test_a_run_from_weights_killed_before_its_first_state_begins_with_them_again(data, undisturbed, tmp_path):
    given = {"weights": str(undisturbed / "weights" / "last.safetensors"), "epochs": 1}
    trained(data, tmp_path / "whole", **given)
    trained(data, tmp_path / "killed", **given, stop=stop_at(1))
    for state in (tmp_path / "killed" / "state").iterdir():
        state.unlink()
    trained(data, tmp_path / "killed", **given, resume=True)
    assert same(tmp_path / "killed", tmp_path / "whole")


def test_a_run_whose_first_weights_cannot_be_had_again_does_not_begin_with_others(data):
    with pytest.raises(ConfigMismatch, match="saved no state yet"):
        restarted(settings(data, None), Start("ImageNet weights x", True), lambda text: None)


@pytest.mark.parametrize("model", ["resnet10n", "mvcr14n", "cnn"])
def test_weights_of_another_model_are_refused(data, undisturbed, tmp_path, model):
    with pytest.raises(CheckpointError) as caught:
        trained(data, tmp_path / "run", weights=str(undisturbed / "weights" / "best.safetensors"), model=model)
    assert "--model mvcr10n --layers blur,gem" in caught.value.hint


def test_moments_keep_the_memory_format_of_their_parameters():
    """The fused optimiser walks through memory: another format would give every moment to another weight."""
    network = build(config_for("resnet10n", 3)).to(memory_format=torch.channels_last)
    optimiser = make_optimiser(network, 1e-3, 0.05, set())
    network(torch.randn(2, 3, 64, 64)).sum().backward()
    optimiser.step()
    saved = {name: tensor.clone().contiguous() for name, tensor in optimiser_state(optimiser).items()}
    again = make_optimiser(network, 1e-3, 0.05, set())
    load_optimiser_state(again, saved)
    for parameter in network.parameters():
        for name in ("exp_avg", "exp_avg_sq"):
            mine, theirs = again.state[parameter][name], optimiser.state[parameter][name]
            assert mine.stride() == theirs.stride() == parameter.stride()
            assert torch.equal(mine, theirs)


def test_class_weights_favour_small_classes_and_average_one():
    counts = [100, 10, 1]
    weights = class_weights(counts, "loss")
    assert weights is not None
    assert float((weights * torch.tensor(counts)).sum() / sum(counts)) == pytest.approx(1)
    assert weights.tolist() == sorted(weights.tolist())
    assert float(weights[1] / weights[0]) == pytest.approx(10**0.5)
    assert class_weights(counts, "none") is None
    assert class_weights([10, 9], "auto") is None
    auto = class_weights(counts, "auto")
    assert auto is not None
    assert torch.equal(auto, weights)
    empty = class_weights([5, 0], "loss")
    assert empty is not None
    assert bool(torch.isfinite(empty).all())


def test_the_loss_of_equal_views_is_that_of_one():
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    target = soft_targets(labels, 4, 0.1)
    torch.testing.assert_close(target.sum(1), torch.ones(6))
    single = multi_scale_loss(logits, [logits], target, None, 1.0)
    torch.testing.assert_close(single, torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1))
    torch.testing.assert_close(multi_scale_loss(logits, [logits] * 3, target, None, 1.0), single)
    torch.testing.assert_close(multi_scale_loss(logits, [logits], target, torch.ones(4), 1.0), single)
    apart = multi_scale_loss(logits, [logits, -logits], target, None, 1.0)
    assert apart > multi_scale_loss(logits, [logits, -logits], target, None, 0.0)
