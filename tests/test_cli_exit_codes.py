"""Exit codes are a contract: one invocation a row. Nothing here loads an engine or torch."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest

from mvcr_cli import cli, errors
from mvcr_cli.records import BenchmarkRow, ExportReport, Label, Prediction, Problem

LONG = "x" * 5000
ENGINES = (
    "mvcr_cli.engine",
    *(
        f"mvcr_cli.engine.{name}"
        for name in ("train", "evaluate", "scale_curve", "predict", "export", "convert", "benchmark")
    ),
)
PREDICTION = Prediction(
    path="a.jpg", label="cat", probability=0.9, topk=(Label(label="cat", probability=0.9),), width=4, height=3
)
EXPORT = ExportReport(
    run="runs/a", file="a.onnx", files=("a.onnx", "a.encoder.onnx"), format="onnx", megabytes=1.0, images=2,
    sizes=("32",), top1_agreement=1.0, max_probability_difference=1e-7, tolerance=1e-4,
)  # fmt: skip
ROW = BenchmarkRow(
    views="all",
    model="cnn", backend="eager", device="cpu", precision="fp32", size_px=32, batch=1, parameters=10, mac=100,
    forward_p50_ms=1.0, forward_p95_ms=2.0, forward_images_per_second=1000.0, train_p50_ms=None,
    train_images_per_second=None, peak_memory_mb=10.0, relative_time=None,
)  # fmt: skip

# The engines cannot be imported under these rows: what is refused here is refused before torch is loaded.
REFUSED = [
    "",
    "unknown",
    "trian d",
    "--nope",
    "train",
    "train d --epoch 3",
    "train d --json -v",
    "train d --epochs -1",
    "train d --time 1h30",
    "train d --epochs 0",
    "train d --epochs 1e3",
    "train d --epochs abc",
    "train d --epochs 99999999999999",
    "train d --lr nan",
    "train d --lr inf",
    "train d --lr 0",
    "train d --lr -1",
    "train d --batch 0",
    "train d --batch 1",
    "train d --batch many",
    "train d --imgsz 0",
    "train d --imgsz 1",
    "train d --imgsz 7",
    "train d --imgsz 100000",
    "train d --imgsz 1e2",
    "train d --workers -1",
    "train d --workers 1000",
    "train d --seed -1",
    f"train d --seed {2**64}",
    "train d --split 0",
    "train d --split 1",
    "train d --split nan",
    "train d --split 0.1 --val v",
    "train d --zoom off --memory 2G",
    "train d --time soon",
    "train d --time 3m --epochs 5",
    "train d --time 1s",
    "train d --scales 1/2",
    "train d --scales 1,x",
    "train d --unsure 0.3 --model cnn",
    "train d --distill 0 --scales 1",
    "train d --distill 0 --model resnet18",
    "train d --coarsest 8",
    "train d --scales 1,1/2 --model cnn",
    "train d --resume",
    "train d --layers x",
    "train d --zoom 0.2",
    "train d --layers sacs,",
    "train d --model cnn --layers sift",
    "train d --model mvcr19",
    "train d --model ../../x",
    "train d --name ../../x",
    "train d --name ..",
    "train d --name a/b",
    "train d --name a\\b",
    "train d --name -x",
    f"train d --name {LONG}",
    "train d --name a --run b",
    "train d --device tpu",
    "train d --precision int8",
    "train d --fit crop",
    "train d --balance maybe",
    "train d --crop 0",
    "train d --zoom-range 9",
    "train d --rotate 200",
    "train d --mixup -1",
    "train d --ema 1",
    "train d --precise-bn -1",
    "train d --cache -1",
    "train d --threads 0",
    "train d --patience -1",
    "train d extra",
    "eval --batch 0",
    "eval --workers 999",
    "eval --scales 0",
    "eval --scales x..4",
    "eval --scales 1/4..1/2",
    "eval --scales 1",
    "eval --scales 1/32..1",
    "eval --scales 1,17",
    "eval --scales 1,1/0",
    "eval --scales 1/3..3",
    "eval --scales 1/3..4",
    "eval --scales 1..2..4",
    "eval --scales 1,1e999",
    "eval --scales 1,-2",
    "eval --scales 1/2,1 --out x.csv",
    *(f"eval --out new/x{suffix}" for suffix in (".txt", ".JSON", ".html", ".png", ".xlsx", ".tsv", ".v2.parquet")),
    "eval --scales 1/2,1 --out x.png",
    "eval --against runs/b",
    "predict",
    "predict -rf",
    "predict a.jpg --topk 0",
    "predict a.jpg --format xml",
    "predict a.jpg --json --format csv",
    "export --format pickle",
    "export --images 0",
    "export --tolerance nan",
    "export --format torch --out a.onnx",
    "export --format onnx --out a.txt",
    "export --format safetensors --out a.onnx",
    "export --from-torch x.pt --out y.pt",
    "export --from-torch",
    "export --from-torch x.pt --run runs/a",
    "export --from-torch x.pt --format onnx",
    "export --from-torch x.pt --format torch",
    "export --from-torch x.pt --views 1",
    "export --views auto:2,1",
    "eval d --views auto:2",
    "export --from-torch x.pt --images 8",
    "export --from-torch x.pt --tolerance 0.1",
    "benchmark mvcr99",
    "benchmark --imgsz 32,auto",
    "benchmark --imgsz 4",
    "benchmark --batch 0",
    "benchmark --rounds 0",
    "benchmark --run runs/a --imgsz 64",
    "benchmark --run runs/a --classes 3",
]
EMPTY = [
    ("train", ""),
    ("train", "d", "--run", ""),
    ("train", "d", "--name", ""),
    ("train", "d", "--val", ""),
    ("train", "d", "--weights", ""),
    ("eval", ""),
    ("eval", "--scales", ""),
    ("eval", "--scales", "1/2,1", "--against", ""),
    ("predict", ""),
    ("export", "--from-torch", ""),
    ("benchmark", ""),
]

Run = Callable[..., tuple[int, str, str]]
Fake = Callable[[str, Callable[..., Any]], None]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run one command line in this process: exit code, stdout, stderr."""

    def run_line(*argv: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main(list(argv))
        captured = capfd.readouterr()
        return int(left.value.code or 0), captured.out, captured.err

    return run_line


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Put a function in the place of an engine; the others stay empty, and torch stays out."""
    for name in ENGINES:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))

    def place(name: str, function: Callable[..., Any]) -> None:
        setattr(sys.modules[f"mvcr_cli.engine.{name}"], name, function)

    return place


def raiser(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def assert_refused(result: tuple[int, str, str], code: int) -> None:
    found, out, err = result
    assert found == code
    assert out == ""
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "argv", [*(tuple(line.split()) for line in REFUSED), *EMPTY], ids=lambda argv: " ".join(argv)[:60]
)
def test_unusable_command_lines_exit_2_before_any_engine_is_imported(
    argv: tuple[str, ...], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ENGINES:
        monkeypatch.setitem(sys.modules, name, None)
    assert_refused(run(*argv), 2)


@pytest.mark.parametrize(
    ("argv", "suggestion"),
    [
        (("trian", "d"), "train"),
        (("train", "d", "--epoch", "3"), "--epochs"),
        (("train", "d", "--model", "mvcr81"), "mvcr18"),
        (("train", "d", "--epochs", "0"), "between 1 and 100,000"),
        (("train", "d", "--time", "3"), "--time is 3s"),
        (("train", "d", "--nonsense"), "mvcr train --help"),
        (("train", "d", "--lr", "1e9"), "above 0 and at most 100"),
        (("train", "d", "--lr", "abc"), "--lr 'abc' is no number\nhint: write a number such as 0.1\n"),
        (
            ("train", "d", "--epochs", "1.5"),
            "--epochs '1.5' is no whole number\nhint: write a whole number such as 8\n",
        ),
        (
            ("predict", "a", "--format", "jsonn"),
            "'jsonn' is none of auto, json, jsonl, csv, table\nhint: did you mean json?",
        ),
        (
            ("predict", "a", "--format", "xml"),
            "--format 'xml' is none of auto, json, jsonl, csv, table\nhint: mvcr predict",
        ),
        (("train", "d", "--device", "' is not one of '"), "is none of auto, cpu, cuda, mps\nhint: mvcr train --help"),
    ],
)
def test_a_refusal_says_what_to_write_instead(argv: tuple[str, ...], suggestion: str, run: Run) -> None:
    _, _, err = run(*argv)
    assert err.startswith("error: ")
    assert suggestion in err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.UsageError("x"), 2),
        (errors.DataError("x"), 65),
        (errors.BadImage("corrupt", "x"), 65),
        (errors.CheckpointError("x"), 65),
        (errors.InputMissing("x"), 66),
        (errors.Unavailable("x"), 69),
        (errors.CheckFailed("x"), 70),
        (errors.WorkerFailed("x"), 70),
        (errors.CannotCreate("x"), 73),
        (errors.WriteFailed("x"), 74),
        (errors.RunBusy("x"), 75),
        (errors.NotPermitted("x"), 77),
        (errors.ConfigMismatch("x"), 78),
        (OSError(errno.ENOSPC, "full", "f"), 74),
        (OSError(errno.EDQUOT, "quota"), 74),
        (OSError(errno.EROFS, "read-only"), 74),
        (OSError(errno.EIO, "broken"), 74),
        (PermissionError(errno.EACCES, "no", b"f"), 77),
        (PermissionError(errno.EPERM, "no"), 77),
        (OSError(errno.ENAMETOOLONG, "long", LONG), 66),
        (MemoryError(), 70),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), 70),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 70),
        (KeyboardInterrupt(), 130),
    ],
    ids=repr,
)
@pytest.mark.parametrize("command", ["train d", "predict a.jpg"])
def test_every_expected_failure_has_its_code_and_no_traceback(
    command: str, error: BaseException, code: int, run: Run, fake: Fake
) -> None:
    fake(command.split()[0], raiser(error))
    assert_refused(run(*command.split()), code)


def test_out_of_memory_points_at_the_batch(run: Run, fake: Fake) -> None:
    fake("export", raiser(MemoryError()))
    assert "--batch" in run("export")[2]


def test_a_bug_keeps_its_traceback_and_exits_70(run: Run, fake: Fake) -> None:
    secret = "local value"  # noqa: F841
    fake("export", raiser(ZeroDivisionError("in \x1b[31m red")))
    code, out, err = run("export", "--json")
    assert (code, out) == (70, "")
    assert "Traceback" in err
    assert "ZeroDivisionError" in err
    assert "\x1b" not in err


def predictions(*results: Prediction | Problem) -> Callable[..., Iterator[Prediction | Problem]]:
    def predict(config: Any, **_: Any) -> Iterator[Prediction | Problem]:
        return iter(results)

    return predict


@pytest.mark.parametrize(
    ("argv", "problem", "code"),
    [
        (("predict", "d"), Problem(path="b.jpg", code="corrupt"), 65),
        (("predict", "d", "--keep-going"), Problem(path="b.jpg", code="corrupt"), 0),
        (("predict", "d"), Problem(path="notes.txt", code="not_an_image"), 0),
    ],
)
def test_bad_pictures_end_with_65_after_all_records(
    argv: tuple[str, ...], problem: Problem, code: int, run: Run, fake: Fake
) -> None:
    fake("predict", predictions(PREDICTION, problem, PREDICTION))
    found, out, err = run(*argv)
    assert found == code
    assert len(out.splitlines()) == 3
    assert f"{problem.code}: 1 file: {problem.path}" in err


@pytest.mark.parametrize(
    "line",
    ["--help", "-h", "benchmark -h", "--version", "train --help", "eval --help", "predict --help", "export --help",
     "benchmark --help", "predict a.jpg", "predict a.jpg --topk 1 --topk 3", "predict -- -rf", "predict a.jpg --format table",
     "export", "export --json", "benchmark", "benchmark cnn --imgsz 32 --batch 1 --json",
     "benchmark cnn --run runs/a --imgsz 32 --classes 3"],
)  # fmt: skip
def test_what_works_exits_0(line: str, run: Run, fake: Fake) -> None:
    fake("predict", predictions(PREDICTION))
    fake("export", lambda config, **_: EXPORT)
    fake("benchmark", lambda config, **_: iter([ROW]))
    code, out, err = run(*line.split())
    assert code == 0
    assert out
    assert "Traceback" not in err


def test_every_exported_file_is_named(run: Run, fake: Fake) -> None:
    fake("export", lambda config, **_: EXPORT)
    assert run("export")[1].startswith("a.onnx, a.encoder.onnx  onnx, 1.0 MB\n")
    raw = dataclasses.replace(EXPORT, files=("caf\udce9.onnx",))
    fake("export", lambda config, **_: raw)
    assert json.loads(run("export", "--json")[1])["files"] == ["caf\\xe9.onnx"]


def test_ten_thousand_paths_arrive(run: Run, fake: Fake) -> None:
    seen: list[int] = []

    def count(config: Any, **_: Any) -> Iterator[Prediction]:
        seen.append(len(config.inputs))
        yield PREDICTION

    fake("predict", count)
    assert run("predict", *map(str, range(10_000)))[0] == 0
    assert seen == [10_000]


@pytest.mark.parametrize(
    ("out", "code"), [("a_file", 73), ("a_file/below", 73), ("folder.csv", 73), ("a_file/x.csv", 73)]
)
def test_an_impossible_out_is_refused_before_the_work(out: str, code: int, run: Run, fake: Fake, tmp_path: Any) -> None:
    (tmp_path / "a_file").write_text("")
    (tmp_path / "folder.csv").mkdir()
    assert_refused(run("eval", "--out", str(tmp_path / out)), code)


def test_a_deleted_current_folder_is_explained(tmp_path: Any) -> None:
    script = (
        "import os, sys, types; from mvcr_cli import cli; engine = types.ModuleType('e');"
        "engine.export = lambda *_, **__: os.getcwd(); sys.modules['mvcr_cli.engine'] = engine;"
        "sys.modules['mvcr_cli.engine.export'] = engine; os.chdir(sys.argv[1]); os.rmdir(sys.argv[1]);"
        "cli.main(['export'])"
    )
    doomed = tmp_path / "doomed"
    doomed.mkdir()
    done = subprocess.run([sys.executable, "-c", script, str(doomed)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (66, "")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_outside_training_ends_at_once(number: signal.Signals, code: int, run: Run, fake: Fake) -> None:
    def kill_itself(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), number)
        raise AssertionError("the program went on")

    fake("export", kill_itself)
    before = signal.getsignal(signal.SIGTERM)
    assert run("export") == (code, "", "")
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("environment", [{"COLUMNS": "1"}, {"TERM": "dumb"}, {"NO_COLOR": "1"}, {"LC_ALL": "C"}])
def test_odd_environments_change_no_exit_code(environment: dict[str, str]) -> None:
    argv = [sys.executable, "-m", "mvcr_cli", "train", "d", "--epochs", "0"]
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
