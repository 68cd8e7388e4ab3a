"""stdout is data and nothing else, whoever reads it, however it ends."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import Forks
from small_commands import SMALL, Place

Figure = Callable[[str], None]
COMMANDS = {
    "train": ["train", "data", *SMALL, "--run", "{new}"],
    "dry run": ["train", "data", "--dry-run", "--offline"],
    "eval": ["eval", "test", "--run", "runs/done", "--workers", "1"],
    "predict": ["predict", "test", "--run", "runs/done", "--workers", "1"],
    "export": ["export", "--run", "runs/done", "--format", "safetensors", "--out", "{new}", "--images", "4"],
    "benchmark": ["benchmark", "cnn", "--imgsz", "32", "--batch", "1", "--rounds", "1", "--no-onnx"],
}


def argv_of(name: str, tmp_path: Path) -> list[str]:
    return [part.replace("{new}", str(tmp_path / "new")) for part in COMMANDS[name]] + ["--json"]


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1", "TERM": "dumb"}], ids=["plain", "dumb"])
@pytest.mark.parametrize("name", COMMANDS)
def test_every_line_of_stdout_is_a_record(
    name: str, environment: dict[str, str], trained_place: Place, tmp_path: Path
) -> None:
    place = trained_place
    done = place.forks.run(*argv_of(name, tmp_path), cwd=place.root, env=environment)
    assert done.code == 0, done.err.decode()
    assert done.records
    assert all(list(record)[:2] == ["record", "schema"] for record in done.records)
    assert not re.search(rb"[\x00-\x09\x0b-\x1f]", done.err)  # no bar, no colour, no return where no terminal is


@pytest.mark.parametrize("name", COMMANDS)
def test_records_on_a_terminal_are_the_same_lines(name: str, trained_place: Place, tmp_path: Path) -> None:
    """With a terminal on both streams, talk and bars stand on lines of their own."""
    place = trained_place
    code, shown, _ = place.forks.on_terminal(*argv_of(name, tmp_path), cwd=place.root, streams="out", columns=20)
    assert code == 0
    lines = shown.decode().split("\r\n")
    assert lines.pop() == ""
    assert [list(json.loads(line))[:2] for line in lines] == [["record", "schema"]] * len(lines)
    assert lines
    if (tmp_path / "new").exists():
        (tmp_path / "new").rename(tmp_path / "old")
    code, shown, _ = place.forks.on_terminal(*argv_of(name, tmp_path), cwd=place.root)
    assert code == 0
    records = [line for line in left_on_screen(shown) if '"record"' in line]
    assert len(records) == len(lines)
    assert all(json.loads(line) for line in records)


def left_on_screen(shown: bytes) -> list[str]:
    """Lines without what was erased and without colours."""
    lines = [line.split("\x1b[2K")[-1] for line in shown.decode().split("\r\n")]
    return [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", line) for line in lines]


@pytest.mark.parametrize("options", [["--json"], []])
def test_a_bar_and_the_records_never_share_a_line(options: list[str], trained_place: Place) -> None:
    """A prediction that takes long enough for the bar to be drawn again and again."""
    inputs = ["data"] * 60
    argv = ["predict", *inputs, "--run", "runs/done", "--workers", "1", "--batch", "1", *options]
    code, shown, _ = trained_place.forks.on_terminal(*argv, cwd=trained_place.root)
    assert code == 0
    assert shown.count(b"predicting") > 3
    pictures = [line for line in left_on_screen(shown) if ".png" in line]
    assert len(pictures) == 60 * 32
    assert not [line for line in pictures if not line.startswith("data/" if not options else '{"record": "prediction"')]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_behind_stdout_is_one_error_and_74(name: str, trained_place: Place, tmp_path: Path) -> None:
    err = tmp_path / "err"
    err.touch()
    forks = trained_place.forks
    process = forks.start(*argv_of(name, tmp_path), cwd=trained_place.root, stdout="/dev/full", stderr=str(err))
    assert forks.wait(process)[0] == 74
    errors = [line for line in err.read_text().splitlines() if line.startswith(("error", "hint", "Traceback"))]
    assert errors[0] == "error: cannot write the result to stdout: No space left on device"
    assert len(errors) == 2


@pytest.mark.parametrize("options", [["--json"], ["--format", "csv"], ["--format", "table"], ["--format", "json"], []])
def test_a_reader_that_leaves_ends_it_silently_with_141(
    options: list[str], trained_place: Place, tmp_path: Path
) -> None:
    err, pipe, forks = tmp_path / "err", tmp_path / "pipe", trained_place.forks
    err.touch()
    os.mkfifo(pipe)
    inputs = ["data"] * 40
    process = forks.start("predict", *inputs, "--run", "runs/done", "--workers", "1", "--batch", "4", *options,
                          cwd=trained_place.root, stdout=str(pipe), stderr=str(err))  # fmt: skip
    with open(pipe, "rb") as reader:
        assert reader.readline()
    assert forks.wait(process, 30)[0] == 141
    assert err.read_bytes() == b""


def kill_predictions(place: Place, tmp_path: Path, count: int) -> tuple[int, int]:
    """Kill `mvcr predict --json` after a random number of records. Returns: torn last lines, records in all."""
    chance, out, torn, total = random.Random(count), tmp_path / "out", 0, 0
    inputs = ["data"] * 8  # 256 pictures
    for _ in range(count):
        out.write_bytes(b"")
        process = place.forks.start("predict", *inputs, "--run", "runs/done", "--workers", "1", "--batch", "2", "--json",
                                    cwd=place.root, stdout=str(out), stderr=os.devnull)  # fmt: skip
        wanted, until = chance.randrange(40_000), time.monotonic() + 60
        while out.stat().st_size < wanted and time.monotonic() < until:
            time.sleep(0.001)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, 9)
        code, *_ = place.forks.wait(process)
        *lines, last = out.read_text().split("\n")
        records = [json.loads(line)["record"] for line in lines]
        torn += last != ""
        total += len(records)
        assert records.count("summary") == (code == 0)
        if code == 0:
            assert records[-1] == "summary"
            assert len(records) == 257
    return torn, total


def test_a_killed_prediction_leaves_whole_lines_and_no_summary(trained_place: Place, tmp_path: Path) -> None:
    _, total = kill_predictions(trained_place, tmp_path, 8)
    assert total > 100


@pytest.mark.slow
def test_many_killed_predictions_leave_whole_lines_and_no_summary(
    trained_place: Place, tmp_path: Path, figure: Figure
) -> None:
    torn, total = kill_predictions(trained_place, tmp_path, 50)
    figure(f"50 kills, {total} whole records, {torn} torn last lines, no summary without an end")


def test_every_input_has_its_record_before_the_summary(trained_place: Place) -> None:
    place = trained_place
    inputs = ["test", "nowhere.jpg", "data/circle/0*.png", "no*pattern"]
    done = place.forks.run("predict", *inputs, "--run", "runs/done", "--workers", "2", "--json", cwd=place.root)
    assert done.code == 65
    *records, summary = done.records
    assert [record["record"] for record in records].count("error") == summary["bad"] == 2
    assert summary == {"record": "summary", "schema": 1, "images": 8 + 16, "bad": 2, "passed_over": 0}


def test_a_plain_pipe_carries_one_line_a_picture(trained_place: Place) -> None:
    done = trained_place.forks.run("predict", "data/circle/000.png", cwd=trained_place.root)
    assert done.code == 0
    assert [record["record"] for record in done.records] == ["prediction"]
    assert done.err.decode().startswith("run: runs/done")


def test_the_server_of_these_tests_tells_a_crash_from_an_exit(forks: Forks, tmp_path: Path) -> None:
    done = forks.run("--version", cwd=tmp_path)
    assert (done.code, done.out.split()[0]) == (0, b"mvcr")
    assert forks.run("--nope", cwd=tmp_path).code == 2
