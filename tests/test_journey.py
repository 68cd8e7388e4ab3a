"""The whole way of a user, through the real command line: train, eval, predict, export, predict again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

OPTIONS = ["--weights", "none", "--model", "mvcr10n", "--imgsz", "64", "--epochs", "4", "--batch", "8", "--lr", "0.003",
           "--threads", "1", "--seed", "3"]  # fmt: skip


def mvcr(folder: Path, *argv: str, code: int = 0) -> list[dict[str, Any]]:
    """Run `mvcr` in `folder`; stdout as records."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [sys.executable, "-m", "mvcr_cli", *argv],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("journey")


@pytest.fixture(scope="module")
def trained(place: Path, draw: Callable[[Path, int, int], None]) -> dict[str, Any]:
    draw(place / "data", 0, 24)
    draw(place / "test", 500, 6)
    (place / "data" / "circle" / "broken.png").write_bytes(b"no picture")
    (report,) = mvcr(place, "train", "data", "--name", "a", *OPTIONS, "--json")
    return report


def test_training_learns_and_leaves_a_complete_run(trained: dict[str, Any], place: Path) -> None:
    assert trained["record"] == "train"
    assert trained["best_accuracy"] >= 0.8
    assert trained["skipped"] == 1
    run = place / "runs" / "a"
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert names >= {
        "config.json", "split.json", "metrics.jsonl", "results.csv", "summary.json", "eval.json", "report.html",
        "plots/confusion.png", "weights/best.safetensors", "weights/last.safetensors",
    }  # fmt: skip
    assert not [name for name in names if name.endswith(".tmp")]


def test_a_report_that_a_kill_prevented_is_written_when_the_run_is_resumed(trained, place, tmp_path):
    """The record that the run is finished comes before its report."""
    run = shutil.copytree(place / "runs" / "a", tmp_path / "moved")
    page, plot = run / "report.html", run / "plots" / "confusion.png"
    was = plot.read_bytes()
    page.unlink()
    shutil.rmtree(run / "plots")
    resume = ("train", "data", "--run", str(run), *OPTIONS, "--resume", "--json")
    assert mvcr(place, *resume) == [trained | {"run": str(run)}]
    assert "moved" in page.read_text("utf-8")
    assert plot.read_bytes() == was
    before = page.stat().st_mtime_ns, plot.stat().st_mtime_ns
    assert mvcr(place, *resume) == [trained | {"run": str(run)}]
    assert (page.stat().st_mtime_ns, plot.stat().st_mtime_ns) == before


def test_eval_repeats_what_training_saw(trained: dict[str, Any], place: Path) -> None:
    (report,) = mvcr(place, "eval", "--json", "--keep-going")
    assert report["top1"]["value"] == trained["best_accuracy"]


def test_eval_of_another_folder_writes_every_picture(trained: dict[str, Any], place: Path) -> None:
    (report,) = mvcr(place, "eval", "test", "--run", "runs/a", "--json", "--out", "out")
    assert report["images"] == 12
    assert len((place / "out" / "predictions.csv").read_text().splitlines()) == 13
    assert (place / "out" / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_predict_answers_every_input_and_exits_65_for_a_broken_one(trained: dict[str, Any], place: Path) -> None:
    good = "test/circle/500.png"
    records = mvcr(place, "predict", good, "data/circle/broken.png", "test/square", code=65)
    assert [record["record"] for record in records] == ["prediction", "error", *["prediction"] * 6]
    assert records[0]["path"] == good
    assert records[1]["error"]["code"] == "unknown_format"


def test_exported_file_gives_the_same_record(trained: dict[str, Any], place: Path) -> None:
    (export,) = mvcr(place, "export", "--json")
    assert export["top1_agreement"] == 1
    assert export["max_probability_difference"] <= 1e-4
    (own,) = mvcr(place, "predict", "test/circle/500.png")
    (theirs,) = mvcr(place, "predict", "test/circle/500.png", "--run", export["file"])
    assert own["label"] == theirs["label"]
    assert own["probability"] == pytest.approx(theirs["probability"], abs=1e-4)


def test_data_folder_is_left_as_it_was(trained: dict[str, Any], place: Path) -> None:
    assert {path.suffix for path in (place / "data").rglob("*") if path.is_file()} == {".png"}
    assert len(list((place / "data").rglob("*.png"))) == 49
