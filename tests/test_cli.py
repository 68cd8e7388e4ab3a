"""The laws of the command line: what is imported, where output goes, and what names may do. Engines are fakes."""

from __future__ import annotations

import csv
import dataclasses
import inspect
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from mvcr_cli import cli
from mvcr_cli.cli import output, tables
from mvcr_cli.cli.benchmark import benchmark
from mvcr_cli.cli.evaluate import evaluate
from mvcr_cli.cli.export import export
from mvcr_cli.cli.predict import predict
from mvcr_cli.cli.prediction_table import PredictionTable, from_the_right
from mvcr_cli.cli.signals import StopRequest
from mvcr_cli.cli.train import train
from mvcr_cli.config import (
    AugmentConfig,
    BenchmarkConfig,
    EvalConfig,
    ExportConfig,
    PredictConfig,
    TrainConfig,
)
from mvcr_cli.records import (
    BenchmarkRow,
    ClassReport,
    Difference,
    EpochReport,
    EvalReport,
    ImageResult,
    Interval,
    Label,
    LoaderReport,
    Prediction,
    Problem,
    ScaleCurve,
    ScaleCurveReport,
    ScalePoint,
    TrainReport,
)

HEAVY = ("torch", "torchvision", "numpy", "PIL", "onnx", "onnxruntime", "huggingface_hub", "safetensors")
HOSTILE = (
    "\x1b[31mred.jpg", "\x1b]0;title\x07.jpg", "x[/b].jpg", "[red]a[/red].jpg", "[link=http://x]l.jpg", ":warning:.jpg",
    "a\nb\r.jpg", "\u202egpj.exe", "zero\u200bwidth.jpg", "caf\udce9.jpg", "\x9b31m.jpg", "=1+1.jpg", "back\\slash.jpg",
)  # fmt: skip
EPOCH = EpochReport(
    epoch=1, epochs=2, step=10, size_px=64, lr=0.1, train_loss=0.5, val_loss=0.6, val_accuracy=0.8, best_accuracy=0.8,
    images_per_second=100.0, seconds=1.0, cpu_seconds=2.0, left_seconds=70.0,
)  # fmt: skip
TRAINED = TrainReport(
    run="runs/a b", best_accuracy=0.8, best_epoch=1, last_accuracy=0.7, epochs=2, steps=20, seconds=2.0,
    stopped_by="finished", train_images=8, val_images=2, skipped=1, peak_rss_mb=100.0,
)  # fmt: skip

Run = Callable[..., tuple[int, str, str]]
Fake = Callable[[str, Callable[..., Any]], None]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run one command line in this process: exit code, stdout, stderr."""

    def run_line(*argv: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main(list(argv), started=12.5)
        captured = capfd.readouterr()
        return int(left.value.code or 0), captured.out, captured.err

    return run_line


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Put a function in the place of an engine; torch stays out."""
    monkeypatch.setitem(sys.modules, "mvcr_cli.engine", ModuleType("mvcr_cli.engine"))
    # A fake run leaves no files for a report.
    monkeypatch.setattr(sys.modules["mvcr_cli.cli.train"], "_write_report", lambda run: None)

    def place(name: str, function: Callable[..., Any]) -> None:
        module = ModuleType(name)
        setattr(module, name, function)
        monkeypatch.setitem(sys.modules, f"mvcr_cli.engine.{name}", module)

    return place


def test_a_benchmark_table_keeps_one_line_a_row_in_80_columns() -> None:
    rows = [
        BenchmarkRow(
            model="resnet10n", views=views, backend="onnxruntime", device="cpu", precision="fp32", size_px=224, batch=64,
            parameters=25_557_032, mac=14_089_000_000, forward_p50_ms=12345.6, forward_p95_ms=12345.6,
            forward_images_per_second=1234.5, train_p50_ms=200.0, train_images_per_second=123.4,
            peak_memory_mb=1234.0, relative_time=12.34,
        )
        for views in ("all", "auto")
    ]  # fmt: skip
    console = Console(width=80, file=io.StringIO())
    console.print(tables.benchmark(rows))
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert [line.split()[:2] for line in lines if "12,346" in line] == [["resnet10n", "all"], ["resnet10n", "auto"]]


def test_one_is_singular() -> None:
    one = dataclasses.replace(TRAINED, steps=1, train_images=1, val_images=1200)
    shown = tables.training(one)
    assert "on 1,200 validation pictures," in shown and "1 training picture, 1 skipped, 1 step, 2.0 s" in shown


def prediction(path: str, label: str = "cat") -> Prediction:
    topk = (Label(label=label, probability=0.75), Label(label="[dog]", probability=0.25))
    return Prediction(path=path, label=label, probability=0.75, topk=topk, width=40, height=30)


def test_a_run_out_of_patience_says_so_in_its_last_lines(run: Run, fake: Fake) -> None:
    for reason in ("finished", "patience"):
        fake("train", lambda config, reason=reason, **_: iter([dataclasses.replace(TRAINED, stopped_by=reason)]))
        _, out, _ = run("train", "d")
        assert ("stopped by --patience: no epoch after 1 was better" in out.splitlines()[-1]) == (reason == "patience")


def table_of(results: Sequence[Prediction | Problem], width: int = 80, topk: int = 5) -> list[str]:
    """The lines of the table of predictions in a terminal."""
    table = PredictionTable.fitted(width, results[0], topk)
    console = Console(width=width, file=io.StringIO())
    for row in (table.header(), *map(table.row, results)):
        console.print(row)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def guess(path: str, labels: str, side: int = 4000) -> Prediction:
    topk = tuple(Label(label=label, probability=0.4) for label in labels.split(","))
    return Prediction(path=path, label=topk[0].label, probability=1.0, topk=topk, width=side, height=side)


@pytest.mark.parametrize("code", ["unknown_format", "too_many_pixels", "out_of_memory"])
def test_an_error_code_keeps_its_line_in_80_columns(code: str) -> None:
    problem = Problem(path="a/long/path/of/some/picture/0001.jpg", code=code, detail="x " * 40)
    for first in (problem, prediction("a.jpg")):
        assert any(code in line for line in table_of([first, problem])[1:])


@pytest.mark.parametrize("width", [80, 100, 200])
@pytest.mark.parametrize("labels", ["7,6,5,4,3", "functional,defective", "defective-soldering,functional", "七,六"])
def test_a_picture_takes_one_line_and_its_path_is_shortened_from_the_left(labels: str, width: int) -> None:
    rows = [guess(f"{'/some/folder' * 12}/val/{n}/{n:05}.png", labels) for n in range(1, 4)]
    lines = table_of(rows, width)
    assert len(lines) == 4
    assert max(map(cell_len, lines)) <= width
    assert lines[0].split() == ["picture", "class", "probability", "next", "size"]
    for number, line in enumerate(lines[1:], 1):
        path, label = re.split("  +", line)[:2]
        assert path.startswith("…/") and path.endswith(f"/{number:05}.png") and label == labels.split(",")[0]
        assert "  100.0 %  " in line and line.endswith("  4000x4000")


def test_the_table_of_predictions_shows_what_has_room() -> None:
    path = "/tmp/photos/val/3/00001.png"
    assert table_of([guess(path, "7,6,5,4,3")])[1].split("  ")[0] == "…/val/3/00001.png"
    assert table_of([guess(path, "7,6,5,4,3")], 120)[1].startswith(path)
    assert "  6 40.0 %, 5 40.0 %  " in table_of([guess(path, "7,6,5,4,3")])[1]
    assert "functional 40.0 %" in table_of([guess(path, "defective,functional,empty,a,b")])[1]
    assert ", empty" not in table_of([guess(path, "defective,functional,empty,a,b")])[1]
    assert ", empty 40.0 %" in table_of([guess(path, "defective,functional,empty,a,b")], 120)[1]
    assert len(table_of([guess(path, "cat,dog"), guess(path, "a class of many words,dog")])) > 3  # never cut
    assert from_the_right("a-name-that-is-very-long.png", 10) == "…-long.png"


def test_a_table_of_one_class_a_picture_has_no_runners_up() -> None:
    header, row = table_of([guess("a.png", "cat")], topk=1)
    assert header.split() == ["picture", "class", "probability", "size"]
    assert row.split() == ["a.png", "cat", "100.0", "%", "4000x4000"]
    assert header.index("probability") + len("probability") == row.index("%") + 1


@pytest.mark.parametrize("width", [1, 20, 40, 60, 71, 72])
def test_a_narrow_terminal_still_shows_class_and_probability(width: int) -> None:
    lines = table_of([guess("some/where/00001.png", "cat,dog"), Problem(path="b", code="missing", detail="x")], width)
    assert max(map(cell_len, lines)) <= max(width, 11)
    assert width < 40 or ("cat" in lines[1] and "100.0 %" in lines[1])


def evaluation(labels: tuple[str, ...] = ("cat", "dog")) -> tuple[EvalReport, list[ImageResult], list[Problem]]:
    share = Interval(value=0.5, low=0.1, high=0.9, n=2)
    k = len(labels)
    report = EvalReport(
        run="runs/a", data="d", images=2, top1=share, top5=None, balanced_accuracy=0.5, macro_f1=0.4, auroc=None,
        loss=0.7, calibration_error=0.1, confusion=tuple(tuple(range(k)) for _ in range(k)), missing_classes=labels[:1],
        classes=tuple(ClassReport(label=label, n=1, precision=None, recall=0.5, f1=0.5) for label in labels),
        skipped=1, seconds=1.0,
    )  # fmt: skip
    result = ImageResult(
        path="=a.jpg", label=labels[0], predicted=labels[1], correct=False, probability=0.6, probabilities=(0.4, 0.6)
    )
    return report, [result, result], [Problem(path="bad.jpg", code="corrupt", detail="no end")]


@pytest.mark.parametrize(
    "argv",
    [["--help"], ["-h"], ["--version"], ["train", "--help"], ["train", "-h"], ["train", "d", "--epochs", "-1"],
     ["train", "d", "--model", "x"], ["predict"], ["benchmark", "mvcr99"]],
)  # fmt: skip
def test_help_and_refusals_import_nothing_heavy(argv: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "mvcr_cli", *argv], capture_output=True, text=True, check=False
    )
    imported = {
        line.rsplit("|", 1)[1].strip().split(".")[0] for line in done.stderr.splitlines() if line.count("|") == 2
    }
    assert "typer" in imported
    assert not imported & set(HEAVY)


@pytest.mark.parametrize(
    ("command", "kinds", "elsewhere"),
    [
        (train, (TrainConfig, AugmentConfig), {"started", "augment", "progressive"}),
        (evaluate, (EvalConfig,), set()),
        (predict, (PredictConfig,), set()),
        (export, (ExportConfig,), set()),
        (benchmark, (BenchmarkConfig,), {"onnx", "train"}),
    ],
)
def test_every_field_has_one_option_with_the_same_default(
    command: Callable[..., None], kinds: tuple[Any, ...], elsewhere: set[str]
) -> None:
    parameters = inspect.signature(command).parameters
    for field in (field for kind in kinds for field in dataclasses.fields(kind)):
        if field.name in elsewhere:
            continue
        default = parameters[field.name].default
        if isinstance(field.default, tuple) and default is not None:
            default = tuple(map(int, default.split(",")))
        if default is not inspect.Parameter.empty and default is not None:
            assert default == field.default, field.name
    names = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    assert set(parameters) - names <= {
        "ctx", "json", "name", "format", "keep_going", "no_augment", "no_progressive", "no_onnx", "no_train",
    }  # fmt: skip


def trained_with(run: Run, fake: Fake, *argv: str) -> TrainConfig:
    seen: list[TrainConfig] = []

    def engine(config: TrainConfig, **_: Any) -> Iterator[TrainReport]:
        seen.append(config)
        return iter([TRAINED])

    fake("train", engine)
    code, _, err = run("train", "d", *argv)
    assert code == 0, err
    return seen[0]


def test_no_options_give_the_config_of_the_defaults(run: Run, fake: Fake) -> None:
    assert trained_with(run, fake) == TrainConfig(data=Path("d"), started=12.5)


def test_every_kind_of_option_arrives(run: Run, fake: Fake) -> None:
    line = (
        "--val v --name x --imgsz 96 --batch auto --time 1h30m --scales 1/2,1 -j 0 -m mvcr10 --lr 1e-3 --device cpu"
        " --layers sift,sacs --no-progressive --balance none --cache 0 --no-hflip --rotate 9 --weights none --seed 5 --offline"
    )
    assert trained_with(run, fake, *line.split()) == TrainConfig(
        data=Path("d"), val=Path("v"), run=Path("runs/x"), imgsz=96, batch=None, seconds=5400.0, scales=(1.0, 0.5),
        layers=("sacs", "sift"), workers=0, model="mvcr10", lr=1e-3, device="cpu", progressive=False, balance="none",
        cache_mb=0, weights="none", augment=AugmentConfig(hflip=False, rotate=9.0), seed=5, offline=True, started=12.5,
    )  # fmt: skip


def test_the_recipes_of_makefile_and_examples_are_understood(run: Run, fake: Fake) -> None:
    root = Path(__file__).parents[1]
    (demo,) = re.findall(r"mvcr train \$\(DATA\) (.*)", (root / "Makefile").read_text())
    recipes = [demo.replace("$(RUN)", "runs/demo").replace("$(TIME)", "3m")]
    for name in ("time_to_accuracy.py", "compute.py"):
        recipes += re.findall(r"--turn .* --trivial [\d.]+", (root / "examples" / name).read_text())
    assert len(recipes) == 3
    for recipe in recipes:
        assert trained_with(run, fake, *recipe.split()).augment.zoom == 0.1


def test_no_augment_is_neutral_but_for_what_is_given(run: Run, fake: Fake) -> None:
    off = trained_with(run, fake, "--no-augment").augment
    assert off.crop == 1
    # The bound of a jitter whose probability is 0 bounds nothing.
    assert not any(value for name, value in dataclasses.asdict(off).items() if name not in ("crop", "coarsest"))
    some = trained_with(run, fake, "--no-augment", "--hflip", "--crop", str(AugmentConfig.crop)).augment
    assert some == dataclasses.replace(off, hflip=True, crop=AugmentConfig.crop)


def test_offline_can_be_set_in_the_environment(run: Run, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MVCR_OFFLINE", "1")
    assert trained_with(run, fake).offline


@pytest.mark.parametrize(
    ("command", "has", "lacks"),
    [
        ("predict", ("exported file", "ImageNet", "until a view is sure"), ()),
        ("eval", ("Run folder or weights file", "until a view is sure"), ("exported file",)),
        ("export", ("Run folder or weights file", "1|all|SCALES"), ("exported file", "until a view is sure", "|auto>")),
        ("train", ("Side of the view at scale 1",), ("largest view",)),
    ],
)
def test_help_tells_what_the_command_takes(
    command: str, has: tuple[str, ...], lacks: tuple[str, ...], run: Run
) -> None:
    code, out, _ = run(command, "--help")
    text = " ".join(out.replace("│", " ").split())
    assert code == 0
    assert [words for words in has if words not in text] == []
    assert [words for words in lacks if words in text] == []


def test_an_export_that_would_stop_early_is_refused(run: Run) -> None:
    code, _, err = run("export", "--views", "auto")
    assert code == 2
    assert "a graph cannot stop early" in err


def test_top_level_help_shows_five_examples(run: Run) -> None:
    _, out, _ = run("--help")
    assert len(re.findall(r"^ +mvcr \w+ .*#", out, re.M)) == 5


def test_training_shows_epochs_on_stderr_and_one_record_on_stdout(run: Run, fake: Fake) -> None:
    fake("train", lambda config, **_: iter([EPOCH, EPOCH, TRAINED]))
    _, out, err = run("train", "d", "--json")
    assert list(json.loads(out))[:2] == ["record", "schema"]
    assert json.loads(out)["best_accuracy"] == 0.8
    assert (
        err.count("epoch 1/2  step 10  64 px  loss 0.500  val 80.0 % (best 80.0 %)  100 images/s  1 min 10 s left") == 2
    )
    _, out, err = run("train", "d")
    assert out.count("\n") == 2 and "mvcr" not in out
    assert "next: mvcr eval --run 'runs/a b'\n      mvcr predict img.jpg --run 'runs/a b'\n" in err


def test_a_dry_run_has_no_result(run: Run, fake: Fake) -> None:
    fake("train", lambda config, *, say, **_: iter(say("would train mvcr18") or ()))
    assert run("train", "d", "--dry-run") == (0, "", "would train mvcr18\n")


def test_problems_are_summarised_by_code_with_at_most_twenty_names(run: Run, fake: Fake) -> None:
    problems = [Problem(path=f"{index:04}.jpg", code="corrupt") for index in range(1234)]
    fake("predict", lambda config, **_: iter([*problems, Problem(path="link", code="link")]))
    code, out, err = run("predict", "d")
    assert code == 65
    assert len(out.splitlines()) == 1235
    lines = err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("corrupt: 1,234 files: 0000.jpg, 0001.jpg")
    assert lines[0].endswith("0019.jpg and 1,214 more")


@pytest.mark.parametrize("format_", ["json", "jsonl", "csv"])
def test_every_format_parses_and_names_every_file(format_: str, run: Run, fake: Fake) -> None:
    results = [*map(prediction, HOSTILE), Problem(path="bad.jpg", code="corrupt", detail="no end")]
    fake("predict", lambda config, **_: iter(results))
    code, out, _ = run("predict", "d", "--format", format_)
    assert code == 65
    if format_ == "csv":
        rows = list(csv.reader(io.StringIO(out)))
        assert rows[0][:6] == ["path", "label", "probability", "width", "height", "error"]
        assert {len(row) for row in rows} == {9}
        assert [row[5] for row in rows[1:]] == [""] * len(HOSTILE) + ["corrupt"]
        assert not any(row[0].startswith("=") for row in rows)
        return
    records = json.loads(out) if format_ == "json" else [json.loads(line) for line in out.split("\n")[:-1]]
    kinds = ["prediction"] * len(HOSTILE) + ["error"]
    assert [entry["record"] for entry in records] == (kinds if format_ == "json" else [*kinds, "summary"])
    assert records[0]["path"] == HOSTILE[0]


@pytest.mark.parametrize("format_", ["csv", "table"])
def test_explanations_are_found(format_: str, run: Run, fake: Fake) -> None:
    explained = dataclasses.replace(prediction("a.jpg"), explanation="why/a-1.png")
    fake("predict", lambda config, **_: iter([explained, Problem(path="bad.jpg", code="corrupt")]))
    _, out, err = run("predict", "d", "--explain", "why", "--format", format_)
    assert "written: why\n" in err
    if format_ == "csv":
        assert [row["explanation"] for row in csv.DictReader(io.StringIO(out))] == ["why/a-1.png", ""]


@pytest.mark.parametrize(("format_", "text"), [("json", "[]\n"), ("jsonl", ""), ("csv", "path,label")])
def test_no_pictures_are_a_document_too(format_: str, text: str, run: Run, fake: Fake) -> None:
    fake("predict", lambda config, **_: iter(()))
    code, out, _ = run("predict", "d", "--format", format_)
    assert code == 0
    assert out.startswith(text)


@pytest.mark.parametrize("asked", [("--json",), ("--format", "jsonl")])
def test_json_lines_that_were_asked_for_end_with_a_summary(asked: tuple[str, ...], run: Run, fake: Fake) -> None:
    results = [
        prediction("a"),
        Problem(path="b", code="corrupt"),
        Problem(path="c", code="not_an_image"),
        prediction("d"),
    ]
    fake("predict", lambda config, **_: iter(results))
    code, out, _ = run("predict", "d", *asked)
    assert code == 65
    assert len(out.splitlines()) == 5
    summary = {"record": "summary", "schema": 1, "images": 2, "bad": 1, "passed_over": 1}
    assert json.loads(out.splitlines()[-1]) == summary


@pytest.mark.parametrize("asked", [("--json",), ()])
def test_the_summary_is_missing_after_an_error_and_in_a_plain_pipe(
    asked: tuple[str, ...], run: Run, fake: Fake
) -> None:
    def dies(config: Any, **_: Any) -> Iterator[Prediction]:
        yield prediction("a")
        if asked:
            raise MemoryError

    fake("predict", dies)
    code, out, _ = run("predict", "d", *asked)
    assert code == (70 if asked else 0)
    assert [json.loads(line)["record"] for line in out.splitlines()] == ["prediction"]


def test_an_error_in_the_middle_leaves_no_json_array_that_parses(run: Run, fake: Fake) -> None:
    def dies(config: Any, **_: Any) -> Iterator[Prediction]:
        yield prediction("a")
        raise MemoryError

    fake("predict", dies)
    code, out, _ = run("predict", "d", "--format", "json")
    assert code == 70
    with pytest.raises(json.JSONDecodeError):
        json.loads(out)


@pytest.fixture
def evaluated(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("evaluate", lambda config, **_: evaluation())
    plots = ModuleType("plots")
    setattr(plots, "confusion_png", lambda confusion, labels: f"{labels}".encode())  # noqa: B010
    monkeypatch.setitem(sys.modules, "mvcr_cli.report", ModuleType("report"))
    monkeypatch.setitem(sys.modules, "mvcr_cli.report.plots", plots)


@pytest.mark.usefixtures("evaluated")
def test_eval_writes_a_folder_or_a_file(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("eval", "--json", "--out", str(tmp_path / "new" / "results"))
    assert code == 65
    folder = tmp_path / "new" / "results"
    assert sorted(os.listdir(folder)) == ["confusion.png", "eval.json", "predictions.csv", "predictions.jsonl"]
    assert json.loads((folder / "eval.json").read_text()) == json.loads(out)
    kinds = [json.loads(line)["record"] for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert kinds == ["image", "image", "error"]
    assert (folder / "confusion.png").read_bytes() == b"['cat', 'dog']"
    for name in ("a.csv", "a.jsonl"):
        assert run("eval", "--keep-going", "--out", str(tmp_path / name))[0] == 0
        assert (tmp_path / name).read_text() == (folder / f"predictions{Path(name).suffix}").read_text()


@pytest.mark.parametrize(
    "argv", [["data/eval"], ["data"], ["data/cat/all.csv"], ["link/eval"], ["data/eval", "--scales", "1/2,1"]]
)
def test_eval_writes_nothing_into_the_data(
    argv: list[str], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data" / "cat").mkdir(parents=True)
    (tmp_path / "link").symlink_to("data")
    monkeypatch.chdir(tmp_path)
    code, _, err = run("eval", "./data", "--out", *argv)
    assert (code, list(tmp_path.rglob("data/*"))) == (73, [tmp_path / "data" / "cat"])
    assert "inside the data folder" in err and "choose an --out outside of it" in err


@pytest.mark.usefixtures("evaluated")
@pytest.mark.parametrize(
    "out", ["runs/x", "runs/x/", "link", "runs/x/../x", "runs/x/results.csv", "runs/x/metrics.jsonl", "."]
)
def test_eval_replaces_nothing_that_a_run_has_written(
    out: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "runs" / "x"
    (place / "weights").mkdir(parents=True)
    (tmp_path / "link").symlink_to("runs/x")
    own = ("config.json", "eval.json", "metrics.jsonl", "results.csv")
    for name in own:
        (place / name).write_text(name)
    monkeypatch.chdir(place if out == "." else tmp_path)
    code, printed, err = run("eval", "--out", out)
    assert (code, printed) == (73, "")
    (advice,) = re.findall(r"--out (\S+eval|eval)$", err, re.MULTILINE)
    assert sorted(path.name for path in place.iterdir() if path.is_file()) == sorted(own)
    assert all((place / name).read_text() == name for name in own)
    for allowed in 2 * (advice, os.path.join(os.path.dirname(advice), "predictions.csv")):
        assert run("eval", "--keep-going", "--out", allowed)[0] == 0
    assert (place / "eval" / "eval.json").exists() and (place / "predictions.csv").exists()


@pytest.mark.usefixtures("evaluated")
@pytest.mark.parametrize(
    ("name", "there"), [("results.v2", False), ("2026.11.26", False), (".json", False), ("old.txt", True)]
)
def test_a_folder_for_results_may_have_a_dot(name: str, there: bool, run: Run, tmp_path: Path) -> None:
    if there:
        (tmp_path / name).mkdir()
    assert run("eval", "--keep-going", "--out", str(tmp_path / name))[0] == 0
    assert (tmp_path / name / "eval.json").is_file()


@pytest.mark.usefixtures("evaluated")
def test_a_name_of_another_kind_of_file_is_no_folder_for_results(run: Run, tmp_path: Path) -> None:
    code, _, err = run("eval", "--out", str(tmp_path / "foo.txt"))
    assert code == 2 and "eval writes no .txt file" in err and f"--out {tmp_path / 'foo'}, or a file" in err
    code, _, err = run("eval", "--scales", "1/2,1", "--out", str(tmp_path / "foo.png"))
    assert code == 2 and err.rstrip().endswith(f"--out {tmp_path / 'foo'}")
    assert not list(tmp_path.iterdir())
    assert ".csv" in run("eval", "--help")[1] and ".txt" in run("eval", "--help")[1]


@pytest.mark.usefixtures("evaluated")
def test_eval_shows_intervals_classes_and_confusion(run: Run) -> None:
    _, out, _ = run("eval")
    assert "top-1 50.0 %  (95 % interval 10.0 % to 90.0 %, n = 2)" in out
    assert "precision" in out
    assert "true \\ predicted" in out


def test_eval_says_what_the_commonest_class_alone_would_get(run: Run, fake: Fake) -> None:
    report = evaluation(("defective", "functional"))[0]
    sizes = (205, 450)
    classes = tuple(dataclasses.replace(row, n=n) for row, n in zip(report.classes, sizes, strict=True))
    fake("evaluate", lambda config, **_: (dataclasses.replace(report, classes=classes), [], []))
    assert "\nalways answering functional would get 68.7 %\n" in run("eval")[1]
    assert json.loads(run("eval", "--json")[1])["majority_accuracy"] == 450 / 655


@pytest.mark.parametrize("count", [2, 3, 5])
def test_names_of_classes_are_whole_in_the_confusion_matrix_where_there_is_room(count: int) -> None:
    labels = tuple(f"defective-{number}" for number in range(count))
    console = Console(width=80, file=io.StringIO())
    console.print(tables.evaluation(evaluation(labels)[0]))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    (header,) = (line for line in lines if "true \\ predicted" in line)
    assert all(label in header for label in labels) == (count < 5)
    assert max(map(len, lines)) <= 80


def test_only_unusual_views_are_in_the_headlines() -> None:
    reports = ((evaluation()[0], tables.evaluation), (scale_report(), tables.scale_curve))
    for views, shown in (("all", False), ("1", True), ("auto", True)):
        for report, table in reports:
            console = Console(width=80, file=io.StringIO())
            console.print(table(dataclasses.replace(report, views=views)))  # type: ignore[arg-type,type-var,operator]
            headline = console.file.getvalue().splitlines()[0]  # type: ignore[attr-defined]
            assert (f"--views {views}, 1.0 s" in headline) == shown
            assert headline.endswith(", 1.0 s")


def curve(run: str, shares: tuple[float, ...]) -> ScaleCurve:
    points = tuple(
        ScalePoint(factor=factor, canvas_px=64, accuracy=Interval(value=share, low=share / 2, high=1.0, n=10))
        for factor, share in zip((0.5, 2**-0.5, 1.0), shares, strict=True)
    )
    return ScaleCurve(
        run=run, size_px=64, points=points, area=0.5, worst_factor=0.5, worst_accuracy=shares[0],
        accuracy_at_1=shares[2],
    )  # fmt: skip


def scale_report(run: str = "runs/a", against: str | None = "runs/b") -> ScaleCurveReport:
    beside = None if against is None else curve(against, (0.1, 0.2, 0.9))
    return ScaleCurveReport(
        data="d", images=10, curve=curve(run, (0.4, 0.7, 0.8)), against=beside,
        area_difference=None if against is None else Difference(value=0.25, low=0.125, high=0.375, n=10),
        worst_difference=None if against is None else 0.3, missing_classes=(), skipped=1, seconds=1.0,
    )  # fmt: skip


@pytest.fixture
def curves(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> list[EvalConfig]:
    """The configs that the engine was given."""
    seen: list[EvalConfig] = []

    def engine(config: EvalConfig, **_: Any) -> tuple[ScaleCurveReport, list[Problem]]:
        seen.append(config)
        against = None if config.against is None else str(config.against)
        return scale_report(against=against), [Problem(path="bad.jpg", code="corrupt")]

    fake("scale_curve", engine)
    plot = ModuleType("scale_plot")
    setattr(plot, "scale_png", lambda report: report.curve.run.encode())  # noqa: B010
    monkeypatch.setitem(sys.modules, "mvcr_cli.report", ModuleType("report"))
    monkeypatch.setitem(sys.modules, "mvcr_cli.report.scale_plot", plot)
    return seen


def test_eval_over_scales_writes_one_record_and_a_folder(run: Run, curves: list[EvalConfig], tmp_path: Path) -> None:
    line = ("eval", "d", "--run", "a", "--scales", "1/2..1", "--against", "b", "--json", "--out", str(tmp_path / "o"))
    code, out, err = run(*line)
    assert code == 65  # a bad picture
    assert "corrupt: 1 file: bad.jpg" in err
    assert run(*line, "--keep-going")[0] == 0
    found = json.loads(out)
    assert (found["record"], found["images"], found["area_difference"]["low"]) == ("scale_curve", 10, 0.125)
    assert [point["factor"] for point in found["curve"]["points"]] == [0.5, 2**-0.5, 1.0]
    assert (found["curve"]["run"], found["against"]["run"], found["worst_difference"]) == ("runs/a", "b", 0.3)
    assert sorted(os.listdir(tmp_path / "o")) == ["scales.json", "scales.png"]
    assert json.loads((tmp_path / "o" / "scales.json").read_text()) == found
    assert (tmp_path / "o" / "scales.png").read_bytes() == b"runs/a"
    assert curves[0] == EvalConfig(
        data=Path("d"), run=Path("a"), scales=(0.5, 2**-0.5, 1.0), against=Path("b"), out=tmp_path / "o"
    )


@pytest.mark.usefixtures("curves")
def test_eval_over_scales_shows_area_worst_and_differences(run: Run) -> None:
    _, out, _ = run("eval", "--scales", "1/2..1", "--against", "b")
    assert "area 50.0 % (mean accuracy over log2 scale from 1/2 to 1)" in out
    assert "worst 40.0 % at 1/2, 80.0 % at 1" in out
    assert "difference in points: area +25.0 (95 % interval +12.5 to +37.5), worst +30.0" in out
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert cells[1] == ["0.71", "70.0", "35.0 to 100.0", "20.0", "10.0 to 100.0", "+50.0"]
    assert max(map(len, out.splitlines())) <= 80
    assert [row[0] for row in cells] == ["1/2", "0.71", "1"]
    alone = run("eval", "--scales", "1/2..1")[1]
    assert "difference" not in alone
    assert "other run" not in alone


def test_a_loader_report_is_shown(run: Run, fake: Fake) -> None:
    report = LoaderReport(
        images=5, decode_images_per_second=1.0, loader_images_per_second=2.0, train_images_per_second=3.0,
        train_precision="bf16", bottleneck="loader",
    )  # fmt: skip
    fake("benchmark", lambda config, **_: iter([report]))
    assert "training 3.0 images/s in bf16; the loader is the bottleneck" in run("benchmark")[1]
    assert json.loads(run("benchmark", "--json")[1])["record"] == "loader"


def from_names(shown: str) -> set[str]:
    """Control and invisible characters of a terminal session that Rich and we do not write ourselves."""
    rest = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    return set(re.findall("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]", rest))


def test_hostile_names_reach_a_forced_terminal_as_text() -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=120)
    for name in HOSTILE:
        table = PredictionTable.fitted(120, prediction(name, label=name), 5)
        console.print(table.row(prediction(name, label=name)))
        console.print(table.row(Problem(path=name, code="corrupt", detail=name)))
        console.print(tables.evaluation(evaluation((name, f"{name}2"))[0]))
        console.print(tables.scale_curve(scale_report(name, f"{name}2")))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in shown
    assert "\r" not in shown
    assert not from_names(shown)
    for readable in (r"\x1b[31mred.jpg", "x[/b].jpg", "[red]a[/red].jpg", ":warning:.jpg", r"caf\xe9.jpg"):
        assert readable in shown


def test_one_line_leaves_what_display_name_made() -> None:
    from mvcr_cli.paths import display_name

    for name in HOSTILE:
        shown = display_name(name)
        if "\\\\" not in shown:
            assert output.one_line(shown) == shown
        assert not from_names(output.one_line(name))
        assert "\n" not in output.one_line(name)


def test_hostile_error_texts_and_arguments_are_escaped(run: Run, fake: Fake) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("".join(HOSTILE))

    fake("export", fail)
    for argv in (
        ("export",),
        ("predict", "--\x1b[31m"),
        ("train", "d", "--name", "\x1b/"),
        ("train", "d", "-m", "\x1b]0;"),
    ):
        _, out, err = run(*argv)
        assert out == ""
        assert "\x1b" not in err


FAKES = """
import contextlib, os, sys, time, types
from mvcr_cli.records import *
engine = types.ModuleType("mvcr_cli.engine")
sys.modules["mvcr_cli.engine"] = engine
for name in ("train", "predict"):
    sys.modules["mvcr_cli.engine." + name] = engine
def ready():
    with contextlib.suppress(OSError):
        os.write(2, b"ready\\n")
def predict(config, *, stdin, track, say):
    if "NOISY" in os.environ:
        print("Downloading...")
        os.write(1, b"from C\\n")
        say("choice made")
        sys.stdout.write("buffered, flushed by nobody")
    names = [line.rstrip(b"\\n").decode() for line in stdin] if config.inputs == ("-",) else config.inputs[1:]
    count = int(config.inputs[0]) if config.inputs != ("-",) else 1
    for index in track(range(count), total=count, label="predicting"):
        time.sleep(float(os.environ.get("PAUSE", "0")))
        for name in names or [f"{index}.jpg"]:
            yield Prediction(path=name, label=name, probability=1.0, topk=(), width=1, height=1)
def train(config, *, track, say, stop):
    say("scanning")
    if config.dry_run:
        ready(); time.sleep(20)
    stop()
    ready()
    for step in track(range(1000), total=1000, label="epoch 1"):
        time.sleep(0.02)
        if stop() and not config.strict:
            say("saving")
            break
    yield TrainReport(
        run="runs/a", best_accuracy=1.0, best_epoch=1, last_accuracy=1.0, epochs=1, steps=step, seconds=1.0,
        stopped_by=stop() or "finished", train_images=1, val_images=1, skipped=0, peak_rss_mb=1.0)
engine.predict, engine.train = predict, train
from mvcr_cli.cli import main
sys.modules["mvcr_cli.cli.train"]._write_report = lambda run: None
main(sys.argv[1:])
"""


def start(*argv: str, **options: Any) -> subprocess.Popen[bytes]:
    settings: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, "-c", FAKES, *argv], **settings | options)


def read_terminal(descriptor: int) -> bytes:
    shown = b""
    while True:
        try:
            part = os.read(descriptor, 65536)
        except OSError:
            return shown
        if not part:
            return shown
        shown += part


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_a_bar_on_the_terminal_swallows_no_line_of_the_file(tmp_path: Path) -> None:
    here, there = os.openpty()
    path = tmp_path / "out.jsonl"
    with open(path, "wb") as file:
        process = start("predict", "50", "--json", stdout=file, stderr=there, env=os.environ | {"PAUSE": "0.005"})
    os.close(there)
    shown = read_terminal(here)
    os.close(here)
    assert process.wait(20) == 0
    *lines, summary = map(json.loads, path.read_text().splitlines())
    assert [line["path"] for line in lines] == [f"{n}.jpg" for n in range(50)]
    assert summary["record"] == "summary"
    assert b"predicting" in shown
    assert b"\x1b[?25h" in shown  # the cursor is back


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_a_terminal_gets_a_table_without_a_byte_of_control_from_names() -> None:
    here, there = os.openpty()
    process = start("predict", "1", *HOSTILE, stdout=there, stderr=there, env=os.environ | {"TERM": "xterm"})
    os.close(there)
    shown = read_terminal(here).decode()
    os.close(here)
    assert process.wait(20) == 0
    bars = re.sub(r"\x1b\[(\?25[lh]|2K|1A|\d*;?\d*H)", "", shown)
    assert not from_names(bars)
    assert r"\x1b]0;title" in re.sub(r"\s", "", bars)


@pytest.mark.skipif(os.name != "posix", reason="POSIX pipes")
def test_a_reader_that_leaves_ends_the_program_silently_with_141() -> None:
    process = start("predict", "100000", "--json")
    assert process.stdout is not None
    assert process.stderr is not None
    assert json.loads(process.stdout.readline())["path"] == "0.jpg"
    process.stdout.close()
    left = time.monotonic()
    assert process.wait(20) == 141
    assert time.monotonic() - left < 2
    assert process.stderr.read() == b""
    process.stderr.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_behind_stdout_is_one_line_and_74() -> None:
    with open("/dev/full", "wb") as full:
        process = start("predict", "3", "--json", stdout=full)
        _, err = process.communicate(timeout=20)
        assert process.returncode == 74
        assert err.startswith(b"error: cannot write the result to stdout: No space left on device\n")
        assert err.count(b"\n") == 2
        helped = subprocess.run([sys.executable, "-m", "mvcr_cli", "--help"], stdout=full, stderr=subprocess.PIPE)
        assert helped.returncode == 74
        assert b"Traceback" not in helped.stderr


@pytest.mark.skipif(os.name != "posix", reason="POSIX descriptors")
@pytest.mark.parametrize(("closed", "lines"), [("<&-", 3), (">&-", 0), ("2>&-", 3), ("<&- >&- 2>&-", 0)])
def test_closed_streams_are_no_crash(closed: str, lines: int) -> None:
    argv = ["sh", "-c", f'exec "$0" "$@" {closed}', sys.executable, "-c", FAKES, "predict", "2", "--json"]
    done = subprocess.run(argv, capture_output=True, timeout=20, env=os.environ | {"NOISY": "1"})
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == lines
    assert b"Traceback" not in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_log_does_not_stop_the_work() -> None:
    with open("/dev/full", "wb") as full:
        process = start("train", "d", "--json", stderr=full, env=os.environ)
        time.sleep(1)
        process.terminate()
        out, _ = process.communicate(timeout=20)
    assert process.returncode == 143
    assert out == b"" or json.loads(out)["stopped_by"] == "SIGTERM"


def test_names_come_from_stdin() -> None:
    process = start("predict", "-", stdin=subprocess.PIPE)
    out, _ = process.communicate(b"a b.jpg\nc.jpg\n", timeout=20)
    assert [json.loads(line)["path"] for line in out.splitlines()] == ["a b.jpg", "c.jpg"]


def test_prints_of_libraries_are_talk() -> None:
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    process = start("predict", "2", env=buffered | {"NOISY": "1"})
    out, err = process.communicate(timeout=20)
    assert [json.loads(line)["path"] for line in out.splitlines()] == ["0.jpg", "1.jpg"]
    assert sorted(err.splitlines()) == [b"Downloading...", b"buffered, flushed by nobody", b"choice made", b"from C"]


def wait_until_ready(process: subprocess.Popen[bytes]) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if line == b"ready\n":
            return
    raise AssertionError("the program never got ready")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_signal_lets_training_save(number: signal.Signals, code: int) -> None:
    process = start("train", "d", "--json")
    wait_until_ready(process)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert json.loads(out)["stopped_by"] == number.name
    assert b"saving\n" in err
    assert b"go on with the same command and --run runs/a --resume\n" in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_second_signal_ends_training_at_once(number: signal.Signals, code: int) -> None:
    process = start("train", "d", "--strict")
    wait_until_ready(process)
    process.send_signal(number)
    time.sleep(0.2)
    process.send_signal(number)
    out, err = process.communicate(timeout=5)
    assert (process.returncode, out) == (code, b"")
    assert b"Traceback" not in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_before_training_begins_ends_at_once(number: signal.Signals, code: int) -> None:
    process = start("train", "d", "--dry-run")
    wait_until_ready(process)
    process.send_signal(number)
    out, err = process.communicate(timeout=5)
    assert (process.returncode, out, err) == (code, b"", b"")


def test_an_ignored_interrupt_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            assert stop() is None
            os.kill(os.getpid(), signal.SIGINT)
            assert stop() is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop() == "SIGTERM"
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_benchmark_fits_eighty_columns() -> None:
    from rich.console import Console

    from mvcr_cli.cli import tables
    from mvcr_cli.records import BenchmarkRow

    row = BenchmarkRow(
        model="mvcr14n", views="all", backend="onnxruntime", device="cpu", precision="fp32", size_px=128, batch=8,
        parameters=25_557_032, mac=16_000_000_000, forward_p50_ms=1234.5, forward_p95_ms=1234.5,
        forward_images_per_second=1234.5, train_p50_ms=1.0, train_images_per_second=1234.5, peak_memory_mb=1234,
        relative_time=12.34, train_precision="bf16",
    )  # fmt: skip
    rows = [row, dataclasses.replace(row, views="auto"), dataclasses.replace(row, batch=1)]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(tables.benchmark(rows))
    text = console.export_text()
    assert text.count("mvcr14n") == 3 and text.count("25.56") == 3 and text.count("12.34") == 3  # nothing is folded
    assert text.count("onnxruntime on cpu fp32, training in bf16") == 2
    assert text.count("batch 8") == 1 and text.count("batch 1,") == 1
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(("argv", "code"), [(("--version",), 0), (("train", "nowhere", "--epochs", "0"), 2)])
def test_the_program_ends_at_once_but_not_before_what_it_owes(argv, code, tmp_path):
    """Nothing is taken apart at the end; what is to be done and written at the end is done and written."""
    program = (
        "import atexit, sys, mvcr_cli.__main__ as program\n"
        "class Torn:\n    def __del__(self): print('torn apart')\n"
        "program.torn = Torn()\n"
        "atexit.register(lambda: sys.stdout.write('owed'))\n"
        "program.start()"
    )
    done = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert done.stdout.endswith("owed") and "torn" not in done.stdout


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_during_an_import_ends_the_program_at_once(tmp_path, number, code):
    """No exception goes through the import: native code there would abort the process, and other code swallow it."""
    (tmp_path / "slow_import.py").write_text(
        f"import os\ntry:\n    os.kill(os.getpid(), {int(number)})\nexcept BaseException:\n    print('went through')\n"
    )
    program = (
        "from mvcr_cli.cli.signals import signals_end_the_program\n"
        "with signals_end_the_program():\n    import slow_import\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")
