"""Names of files, folders and classes are only names: in every command, on every terminal, in every locale."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from forked import ROOT
from nasty import HOSTILE_NAMES
from small_commands import SMALL, Place

from mvcr_cli.paths import class_name, display_name

VISIBLE = [name for name in HOSTILE_NAMES if not name.startswith(b".")]
CLASSES = {class_name(os.fsdecode(name)) for name in VISIBLE} | {"zoo"}
# What no name may send to a terminal: controls, and characters that hide or turn what stands around them.
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]")
RICH = re.compile(r"\x1b\[[0-9;]*m|\x1b\[\?25[lh]\r?|\r?\x1b\[2K|\x1b\[\d*A")  # colours, cursor, and lines drawn anew

COMMANDS = {
    "dry run": ["train", "data", "--dry-run"],
    "train": ["train", "data", *SMALL, "--split", "0.5", "--run", "{new}"],
    "train again": ["train", "data", *SMALL, "--run", "runs/done"],
    "eval": ["eval", "--run", "runs/done", "--workers", "1"],
    "eval out": ["eval", "--run", "runs/done", "--workers", "1", "--out", "{new}"],
    "eval other": ["eval", "other", "--run", "runs/done"],
    "predict": ["predict", "data", "--run", "runs/done", "--workers", "1", "--batch", "64"],
    "predict json": ["predict", "data", "--run", "runs/done", "--workers", "1", "--batch", "64", "--json"],
    "predict csv": ["predict", "data", "--run", "runs/done", "--workers", "1", "--batch", "64", "--format", "csv"],
    "predict bad": ["predict", "bad", "nowhere\x1b]0;title\x07\u202e.jpg", "[/b]*[/b]", "--run", "runs/done"],
    "export": ["export", "--run", "runs/done", "--format", "safetensors", "--out", "{new}", "--images", "4"],
    "export there": ["export", "--run", "runs/done", "--out", "no\x1b[31mred\x1b[0m\x1b]0;title\x07/x.onnx"],
    "benchmark": ["benchmark", "--data", "data", "--run", "runs/done", "--batch", "1", "--rounds", "1",
                  "--no-onnx", "--no-train"],
    "no data": ["train", "no\x1b[31m\rwhere\u202e"],
    "no run": ["eval", "--run", "no\x1b[31m\rwhere\x9b1m"],
    "no option": ["train", "data", "--\x1b[31mx"],
    "no model": ["train", "data", "--model", "\x1b[31mx\u202e"],
}  # fmt: skip
CODES = {"train again": 73, "eval other": 65, "predict bad": 65, "export there": 73, "no data": 66, "no run": 66,
         "no option": 2, "no model": 2}  # fmt: skip


@pytest.fixture(scope="module")
def place(named_place: Place) -> Place:
    """Beside the data: broken files with all names, and a folder with a class that no run knows."""
    root = named_place.root
    (root / "bad").mkdir()
    for name in HOSTILE_NAMES:
        Path(os.fsdecode(os.path.join(os.fsencode(root / "bad"), name[:200] + b".png"))).write_bytes(name)
    for text in ("unknown\x1b[31m", "x\u202e"):
        shutil.copytree(root / "data" / "zoo" / "x[", root / "other" / text)
    return named_place


def run_on_terminal(name: str, place: Place, tmp_path: Path, **environment: str) -> str:
    argv = [part.replace("{new}", str(tmp_path / "new")) for part in COMMANDS[name]]
    code, shown, _ = place.forks.on_terminal(*argv, cwd=place.root, env=environment)
    assert code == CODES.get(name, 0), shown.decode(errors="replace")
    text = shown.decode()  # raw bytes of a name that is not UTF-8 would fail here
    return text.replace("\r\n", "\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_plain_terminal_gets_no_control_at_all(name: str, place: Place, tmp_path: Path) -> None:
    shown = run_on_terminal(name, place, tmp_path, TERM="dumb", NO_COLOR="1")
    assert STEERING.findall(shown) == []
    assert shown


@pytest.mark.parametrize("name", ["train", "eval", "predict", "predict bad", "no data"])
def test_a_terminal_with_colours_gets_only_our_own(name: str, place: Place, tmp_path: Path) -> None:
    shown = run_on_terminal(name, place, tmp_path)
    assert "\x1b[31mred" not in shown
    assert "\x1b]" not in shown
    assert STEERING.findall(RICH.sub("", shown)) == []


def test_names_stay_readable(place: Place, tmp_path: Path) -> None:
    shown = run_on_terminal("predict csv", place, tmp_path, TERM="dumb")
    for readable in (
        r"\x1b[31mred",
        "zoo/x[/b].jpg",
        "[red]x[bold",
        ":warning:",
        r"caf\xe9.jpg",
        "猫",
        "🐈",
        "%s%n%(x)s{0}",
    ):
        assert readable in shown, readable


def test_classes_are_the_folders_and_nothing_is_lost(place: Place) -> None:
    config = json.loads((place.run / "config.json").read_text())
    assert set(config["classes"]) == CLASSES
    assert {"007", "None", "true", "1e5", "-rf", "--help", "CON"} <= set(config["classes"])
    counts = {one["code"]: one["count"] for one in config["findings"]}
    assert (counts["twin_classes"], counts["hidden"]) == (2, len(HOSTILE_NAMES) - len(VISIBLE))
    split = json.loads((place.run / "split.json").read_text())
    paths = [os.path.join(split["root"], row[0]) for row in split["train"] + split["val"]]
    assert len(paths) == len(set(paths)) == 2 * len(VISIBLE) + len(VISIBLE) + 2
    assert all(os.path.exists(path) for path in paths)


def expected_paths(place: Place) -> set[bytes]:
    found = set()
    for folder, folders, files in os.walk(os.fsencode(place.root / "data")):
        folders[:] = [name for name in folders if not name.startswith(b".")]
        found |= {os.path.join(folder, name) for name in files if not name.startswith(b".")}
    return found


def exact(record: dict[str, Any]) -> bytes:
    return base64.b64decode(record["path_b64"]) if "path_b64" in record else record["path"].encode()


def test_json_lines_name_every_file_exactly(place: Place) -> None:
    inputs = str(place.root / "data")
    done = place.forks.run("predict", inputs, "--run", "runs/done", "--workers", "2", "--json", cwd=place.root)
    assert done.code == 0
    predictions = [record for record in done.records if record["record"] == "prediction"]
    assert {exact(record) for record in predictions} == expected_paths(place)
    assert all(os.path.isfile(exact(record)) for record in predictions)
    assert {record["label"] for record in predictions} <= CLASSES
    lines = done.out.decode().splitlines()  # whatever a reader takes for the end of a line
    assert [json.loads(line) for line in lines] == done.records
    assert not re.search(rb"\\ud[89a-f]", done.out)  # half a character


def test_csv_parses_and_starts_no_formula(place: Place) -> None:
    done = place.forks.run("predict", "data", "--run", "runs/done", "--workers", "1", "--format", "csv", cwd=place.root)
    rows = list(csv.reader(io.StringIO(done.out.decode())))
    assert len(rows) == 1 + len(expected_paths(place))
    assert {len(row) for row in rows} == {9}
    assert {row[1] for row in rows[1:]}
    assert not [cell for row in rows for cell in row if cell[:1] in ("=", "+", "-", "@", "\t", "\r")]
    assert len(done.out.decode().split("\n")) == len(rows) + 1


def test_results_of_an_evaluation_keep_every_name(place: Place, tmp_path: Path) -> None:
    done = place.forks.run("eval", "--run", "runs/done", "--out", str(tmp_path / "out"), "--json", cwd=place.root)
    assert done.code == 0, done.err.decode()
    (report,) = done.records
    assert {row["label"] for row in report["classes"]} == CLASSES
    lines = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().split("\n")[:-1]]
    assert len(lines) == report["images"]
    assert all(os.path.isfile(exact(line)) for line in lines)
    rows = csv.reader(io.StringIO((tmp_path / "out/predictions.csv").read_text()))
    assert len(list(rows)) == 1 + len(lines)


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, list[tuple[str, str | None]]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, attrs))


def test_the_report_holds_no_tag_of_a_name(place: Place) -> None:
    text = (place.run / "report.html").read_text("utf-8")
    tags = Tags()
    tags.feed(text)
    assert not {tag for tag, _ in tags.found} & {"script", "iframe", "img", "object", "a", "form"}
    assert not [name for _, attributes in tags.found for name, _ in attributes if name.startswith("on")]
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)


@pytest.mark.parametrize(
    "environment",
    [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
     {"LC_ALL": "POSIX"}],
    ids=["ascii", "posix"],
)  # fmt: skip
def test_any_bytes_are_a_path_in_any_locale(environment: dict[str, str], place: Place) -> None:
    """A program of its own: the locale is read when Python starts."""
    argv = [sys.executable, "-m", "mvcr_cli", "predict", "data", "--run", "runs/done", "--workers", "1", "--json"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
    done = subprocess.run(
        argv,
        cwd=place.root,
        capture_output=True,
        env=kept | environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr.decode()
    *records, summary = [json.loads(line) for line in done.stdout.decode().split("\n")[:-1]]
    assert summary["record"] == "summary"
    prefix = os.fsencode(place.root) + b"/"
    assert {prefix + exact(record) for record in records if record["record"] == "prediction"} == expected_paths(place)


def test_shown_names_are_one_line_for_every_code_point() -> None:
    for start in range(0, 0x110000, 0x400):
        shown = display_name("".join(map(chr, range(start, start + 0x400))), limit=10**6)
        assert shown.isprintable() or not STEERING.search(shown)
        assert len(shown.splitlines()) == 1
