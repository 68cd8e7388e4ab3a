"""Exit codes are a contract: real command lines on real folders, one a row, each in a process of its own."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from forked import Forks
from nasty import png, png_rows, reference
from small_commands import SMALL, Place
from small_run import shapes

LONG = "x" * 5000
QUICK = " ".join(SMALL)

# Run where there are: data, test and runs/done; more, which is data and a class that the run does not know; bad, which has
# two broken pictures; leaky, with a picture on both sides; lone, a weights file; text.txt, pickle.pt, future, busy and empty.
ROWS: list[tuple[int, str]] = [
    (0, "train data --dry-run --offline"),
    (0, f"train data {QUICK} --run new/run"),
    (0, f"train data {QUICK} --run runs/done --resume"),
    (0, "train data --dry-run --strict"),
    (73, "train data --dry-run --run runs/done"),
    (0, "train bad --dry-run"),
    (65, "train bad --dry-run --strict"),
    (65, f"train bad --strict {QUICK}"),
    (65, "train leaky --dry-run --strict"),
    (66, "train nowhere"),
    (66, "train nowhere --dry-run"),
    (66, "train ~nobody"),
    (66, "train file:///data"),
    (66, "train http://127.0.0.1/data.zip"),
    (66, "train -"),
    (66, f"train {LONG}"),
    (66, "train @list"),
    (65, "train text.txt"),
    (65, "train runs/done/weights/best.safetensors"),
    (65, "train empty"),
    (65, "train data/circle"),
    (73, "train / --run runs/new"),
    (73, f"train . {QUICK}"),
    (73, f"train data --run data/run {QUICK}"),
    (66, "train data --val nowhere"),
    (65, "train data --val text.txt"),
    (65, "train data --val more"),
    (73, f"train data --run text.txt {QUICK}"),
    (73, f"train data --run text.txt/run {QUICK}"),
    (73, f"train data --run test {QUICK}"),
    (73, f"train data --run runs/done {QUICK}"),
    (73, f"train data --run /dev/full {QUICK}"),
    (75, f"train data --run busy --resume {QUICK}"),
    (78, f"train more --run runs/unfinished --resume {QUICK}"),
    (78, f"train data --run runs/unfinished --resume {QUICK} --lr 0.5"),
    (78, f"train data --run runs/unfinished --resume {QUICK} --seed 5"),
    (78, f"train data --run future --resume {QUICK}"),
    (78, "train data --device cuda --run new/cuda"),
    (78, f"train data --run new/half --precision fp16 {QUICK}"),
    (69, "train data --run new/net --weights imagenet --model mvcr18 --offline"),
    (66, "train data --run new/a --weights nowhere.safetensors"),
    (65, "train data --run new/b --weights text.txt"),
    (65, "train data --run new/c --weights pickle.pt"),
    (65, "train data --run new/d --weights test"),
    (65, "train data --run new/e --weights data/circle/000.png"),
    (0, "eval --run runs/done"),
    (0, "eval test --run runs/done"),
    (0, "eval test --run lone.safetensors"),
    (0, "eval lone_test --run runs/done"),
    (65, "eval bad --run runs/done"),
    (0, "eval bad --run runs/done --keep-going"),
    (65, "eval more --run runs/done"),
    (0, "eval more --run runs/done --ignore-extra-classes"),
    (66, "eval nowhere --run runs/done"),
    (66, "eval --run nowhere"),
    (66, "eval --run test"),
    (65, "eval --run text.txt"),
    (65, "eval --run pickle.pt"),
    (65, "eval data --run data/circle/000.png"),
    (65, "eval runs/done/weights/best.safetensors --run runs/done"),
    (78, "eval --run lone.safetensors"),
    (78, "eval --run future"),
    (73, "eval --run runs/done --out text.txt"),
    (73, "eval --run runs/done --out text.txt/out.csv"),
    (0, "predict data/circle/000.png --run runs/done"),
    (0, "predict data/circle/000.png data/circle/000.png --run lone.safetensors"),
    (0, "predict data --run runs/done --format csv"),
    (0, "predict data --run runs/done --format json --topk 99"),
    (65, "predict nowhere.png --run runs/done"),
    (0, "predict nowhere.png --run runs/done --keep-going"),
    (65, "predict http://127.0.0.1/x.png --run runs/done"),
    (65, "predict text.txt --run runs/done"),
    (65, "predict bad --run runs/done"),
    (65, "predict empty --run runs/done"),
    (65, "predict no*thing --run runs/done"),
    (65, "predict --run runs/done -- -rf"),
    (65, f"predict {LONG} --run runs/done"),
    (0, "predict - --run runs/done"),
    (66, "predict data --run nowhere"),
    (65, "predict data --run text.txt"),
    (65, "predict data --run test/circle/050.png"),
    (0, "export --run runs/done --format safetensors --out new.safetensors"),
    (2, "export --run runs/done --format safetensors --out text.txt"),
    (73, "export --run runs/done --format safetensors --out lone.safetensors"),
    (73, "export --run runs/done --format safetensors --out nowhere/x.safetensors"),
    (66, "export --run nowhere"),
    (65, "export --run text.txt"),
    (78, "export --run lone.safetensors --format safetensors --out x.safetensors"),
    (0, "benchmark cnn --imgsz 32 --batch 1 --rounds 1 --no-onnx --no-train"),
    (66, "benchmark --run nowhere"),
    (66, "benchmark cnn --data nowhere"),
    (65, "benchmark cnn --data text.txt"),
    (78, "benchmark cnn --device cuda"),
]


@pytest.fixture(scope="module")
def crowded(trained_place: Place, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A copy of the place with everything that the rows name."""
    root = Path(shutil.copytree(trained_place.root, tmp_path_factory.mktemp("crowded") / "place"))
    here = Place(root, trained_place.forks)
    (root / "text.txt").write_text("text")
    (root / "pickle.pt").write_bytes(b"\x80\x04cposix\nsystem\n(S'touch PWNED'\ntR.")
    (root / "empty").mkdir()
    shutil.copyfile(here.weights, root / "lone.safetensors")
    shutil.copytree(root / "data", root / "more")
    shapes(root / "more", classes=("triangle",), images=4)
    shutil.copytree(root / "test", root / "lone_test" / "test")
    for side in ("train", "val"):
        shutil.copytree(root / "data", root / "leaky" / side)
    shutil.copytree(root / "data", root / "bad")
    (root / "bad" / "circle" / "text.png").write_text("text")
    (root / "bad" / "square" / "bomb.png").write_bytes(png(2**31 - 1, 2**31 - 1, 8, 2, png_rows(reference())))
    for name in ("runs/unfinished", "busy", "future"):
        shutil.copytree(here.run, root / name)
        (root / name / "summary.json").unlink()
    config = json.loads((root / "future" / "config.json").read_text())
    (root / "future" / "config.json").write_text(json.dumps(config | {"format_version": 99, "mvcr": "99.0"}))
    (root / "runs" / "done" / "summary.json").touch()  # the newest
    return here


@pytest.mark.parametrize(("code", "line"), ROWS, ids=[line[:70] for _, line in ROWS])
def test_every_command_line_has_its_code(code: int, line: str, crowded: Place) -> None:
    lock = os.open(crowded.root / "busy" / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        done = crowded.forks.run(*line.split(), cwd=crowded.root, stdin=b"test/circle/050.png\n")
    finally:
        os.close(lock)
    err = done.err.decode()
    assert done.code == code, err
    assert "Traceback" not in err
    errors = re.findall(r"^error: .*$", err, re.M)
    if code == 0:
        assert not errors
    elif line.startswith("eval bad") or (line.startswith("predict") and code == 65 and "--run runs/done" in line):
        assert done.out  # the records of the good ones, and of the bad
    else:
        assert len(errors) == 1
        assert re.search(r"^hint: ", err, re.M)
        assert done.out == b""
    assert not (crowded.root / "PWNED").exists()


def test_there_are_enough_rows_and_every_code() -> None:
    assert len(ROWS) >= 60
    assert {code for code, _ in ROWS} == {0, 2, 65, 66, 69, 73, 75, 78}  # 70, 74, 77, 130, 141, 143: elsewhere


@pytest.mark.parametrize(
    "environment",
    [{"HOME": ""}, {"HOME": "/nowhere", "XDG_CACHE_HOME": ""}, {"TMPDIR": "/nowhere"}, {"COLUMNS": "1"}, {"TERM": "dumb"},
     {"TERM": ""}, {"NO_COLOR": "1"}, {"MVCR_HOME": "/dev/null"}, {"LC_ALL": "xx_YY.nothing"}, {"MVCR_OFFLINE": "1"},
     {"TZ": "Nowhere/Never"}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("line", ["predict data/circle/000.png --run runs/done --json", "train data --dry-run --json"])
def test_odd_environments_change_nothing(environment: dict[str, str], line: str, crowded: Place) -> None:
    done = crowded.forks.run(*line.split(), cwd=crowded.root, env=environment)
    assert done.code == 0, done.err.decode()
    assert done.records[-1]["record"] in ("summary", "check")


@pytest.mark.parametrize(
    ("code", "line"),
    [(77, f"train data --run fresh {QUICK}"), (77, f"train data {QUICK}"), (77, "train locked"),
     (77, "eval test --run lone.safetensors --out out.csv"), (77, "eval locked --run lone.safetensors"),
     (0, "predict data --run lone.safetensors"), (65, "predict locked --run lone.safetensors")],
)  # fmt: skip
def test_what_is_forbidden_is_77(code: int, line: str, crowded: Place, tmp_path: Path) -> None:
    """In a folder that may be read but for one part, and nowhere written."""
    root = Path(shutil.copytree(crowded.root, tmp_path / "place"))
    shutil.rmtree(root / "runs")
    (root / "locked").mkdir(mode=0)
    root.chmod(0o555)
    done = crowded.forks.run(*line.split(), cwd=root, meek=True)
    root.chmod(0o755)
    (root / "locked").chmod(0o755)
    assert done.code == code, done.err.decode()
    assert b"Traceback" not in done.err


def test_a_pipe_in_the_place_of_a_folder_does_not_hang(crowded: Place, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for line, code in (("train pipe", 65), ("predict pipe", 65), ("eval pipe", 65), ("eval --run pipe", 66)):
        argv = [*line.split(), *(() if "--run" in line or "train" in line else ("--run", str(crowded.run)))]
        assert crowded.forks.run(*argv, cwd=tmp_path, seconds=20).code == code, line


def test_few_descriptors_are_enough(forks: Forks, crowded: Place) -> None:
    """ulimit -n 64, in a program of its own."""
    import subprocess
    import sys

    from forked import ROOT

    argv = ["sh", "-c", 'ulimit -n 64; exec "$0" "$@"', sys.executable, "-m", "mvcr_cli", "predict", "data", "--run",
            "runs/done", "--json", "--workers", "8"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, cwd=crowded.root, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["images"] == 32
