"""Training is honest: numbers that are none stop it, a reader that fails is named, equal seeds give equal bits."""

from __future__ import annotations

import _thread
import dataclasses
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import shapes, stop_at, trained

from mvcr_cli.checkpoint import Checkpoint
from mvcr_cli.data import loader as loader_module
from mvcr_cli.data import trail as trail_module
from mvcr_cli.data.preprocess import Preprocess
from mvcr_cli.data.trail import Trail
from mvcr_cli.engine.rundir import RunDirectory
from mvcr_cli.engine.session import Session
from mvcr_cli.errors import CheckpointError, ConfigMismatch, DataError, WorkerFailed, is_out_of_memory
from mvcr_cli.models import TRUNKS

Figure = Callable[[str], None]
TRAINING = [
    "--model", "mvcr10n", "--weights", "none", "--imgsz", "48", "--batch", "8", "--split", "0.25", "--device", "cpu",
    "--offline", "--precision", "fp32",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def small_trunk() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TRUNKS, "10n", dataclasses.replace(TRUNKS["10n"], width=8))
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    trained(data, run)
    return run


SMALL = """
import dataclasses
from mvcr_cli.models import TRUNKS
TRUNKS["10n"] = dataclasses.replace(TRUNKS["10n"], width=8)
"""


def program(argv: list[Any], before: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """`mvcr` with the small trunk as a program of its own; `before` is Python that runs first and breaks something."""
    code = f"import sys\n{SMALL}\n{before}\nfrom mvcr_cli.__main__ import main\nmain(sys.argv[1:])"
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, argv)], capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


# Numbers that are none


def infinite_picture(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    original, calls = Preprocess.normalise, iter(range(10**6))

    def normalise(self: Preprocess, pixels: torch.Tensor) -> torch.Tensor:
        x = original(self, pixels)
        return x * float("inf") if pixels.shape[0] == 8 and next(calls) == 4 else x

    patch.setattr(Preprocess, "normalise", normalise)
    return {}


def nan_weight(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    step = Session.step

    def broken(self: Session, batch: Any, number: int, progress: float) -> torch.Tensor:
        if number == 4:
            with torch.no_grad():
                self.network.fc.weight[0, 0] = float("nan")
        return step(self, batch, number, progress)

    patch.setattr(Session, "step", broken)
    return {}


@pytest.mark.parametrize("fault", [infinite_picture, nan_weight], ids=lambda fault: fault.__name__)
def test_a_loss_that_is_no_number_stops_at_its_step_and_names_the_files(data, tmp_path, monkeypatch, fault):
    run = tmp_path / "run"
    fault(monkeypatch)
    with pytest.raises(DataError) as caught:
        trained(data, run)
    assert caught.value.exit_code == 65
    assert "at step 4 (learning rate " in caught.value.message and ".png" in caught.value.message
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["record"] for line in lines] == ["epoch", "nonfinite"]
    assert lines[1]["train_loss"] is None and lines[1]["nonfinite"] and lines[1]["step"] == 4
    assert len(lines[1]["paths"]) == 8
    weights = Checkpoint.load(run / "weights" / "last.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.tensors.values() if tensor.is_floating_point())


def test_what_was_noted_about_a_lost_number_is_gone_after_the_run_went_on(data, undisturbed, tmp_path, monkeypatch):
    run = tmp_path / "run"
    infinite_picture(monkeypatch)
    with pytest.raises(DataError):
        trained(data, run)
    monkeypatch.undo()
    monkeypatch.setitem(TRUNKS, "10n", dataclasses.replace(TRUNKS["10n"], width=8))
    trained(data, run, resume=True)
    assert [json.loads(line)["record"] for line in (run / "metrics.jsonl").read_text().splitlines()] == ["epoch"] * 2
    assert (run / "weights/last.safetensors").read_bytes() == (undisturbed / "weights/last.safetensors").read_bytes()


def test_a_learning_rate_that_explodes_stops(data, tmp_path):
    with pytest.raises(DataError, match="step"):
        trained(data, tmp_path / "run", lr=100.0, clip=0.0, warmup=0.0, epochs=50, weight_decay=0.0, ema=0.0)


def test_start_weights_with_a_nan_are_refused(data, undisturbed, tmp_path):
    import safetensors.torch

    tensors = dict(Checkpoint.load(undisturbed / "weights" / "best.safetensors").tensors)
    tensors["fc.bias"] = torch.full((2,), float("nan"))
    safetensors.torch.save_file(tensors, tmp_path / "nan.safetensors")
    with pytest.raises(CheckpointError, match="finite"):
        trained(data, tmp_path / "run", weights=str(tmp_path / "nan.safetensors"))


def test_an_accelerator_that_is_asked_seldom_is_asked_before_an_epoch_is_recorded(data, tmp_path, monkeypatch):
    """As if on CUDA: no step looks at the loss, which was infinite once and is a number again."""
    step = Session.step
    monkeypatch.setattr(Session, "_check", lambda *_: None)
    monkeypatch.setattr(
        Session, "step", lambda self, *rest: step(self, *rest) * (float("inf") if rest[1] == 1 else 1.0)
    )
    with pytest.raises(DataError, match="before step 3"):
        trained(data, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# Readers


@pytest.mark.parametrize("workers", [0, 2])
def test_a_reader_that_fails_names_its_file(data, tmp_path, monkeypatch, workers):
    load = loader_module.load_picture

    def fail(path: str, *rest: Any) -> Any:
        if path.endswith("007.png"):
            raise ZeroDivisionError("a defect of a decoder")
        return load(path, *rest)

    monkeypatch.setattr(loader_module, "load_picture", fail)
    with pytest.raises(ZeroDivisionError) as caught:
        trained(data, tmp_path / "run", workers=workers)
    (note,) = caught.value.__notes__
    assert note.startswith(f"while reading {data}") and note.endswith("007.png")


def test_a_reader_that_hangs_is_explained_and_the_run_goes_on_later(data, undisturbed, tmp_path, monkeypatch):
    run = tmp_path / "run"
    trained(data, run, stop=stop_at(5))
    before = {path: path.read_bytes() for path in run.rglob("*.safetensors")}
    load, wake = loader_module.load_picture, threading.Event()
    stuck = sorted(data.rglob("*.png"))[7]

    def hang(path: str, *rest: Any) -> Any:
        if path == str(stuck):
            wake.wait(60)
        return load(path, *rest)

    monkeypatch.setattr(loader_module, "load_picture", hang)
    monkeypatch.setattr(loader_module, "READ_SECONDS", 0.5)
    monkeypatch.setattr(loader_module, "ENDING_SECONDS", 0.1)
    threads = _thread._count()
    with pytest.raises(WorkerFailed) as caught:
        trained(data, run, resume=True, workers=2)
    assert caught.value.exit_code == 70
    assert str(stuck) in caught.value.message and "0.5 s" in caught.value.message
    assert {path: path.read_bytes() for path in run.rglob("*.safetensors")} == before
    wake.set()
    for _ in range(100):
        time.sleep(0.05 if _thread._count() > threads else 0)
    assert _thread._count() == threads
    monkeypatch.undo()
    monkeypatch.setitem(TRUNKS, "10n", dataclasses.replace(TRUNKS["10n"], width=8))
    trained(data, run, resume=True, workers=2)
    assert (run / "weights/last.safetensors").read_bytes() == (undisturbed / "weights/last.safetensors").read_bytes()


HANG = """
import time
from mvcr_cli.data import loader
loader.READ_SECONDS, loader.ENDING_SECONDS = 1.0, 0.1
load = loader.load_picture
loader.load_picture = lambda path, *rest: time.sleep(10**6) if path.endswith("007.png") else load(path, *rest)
"""


def test_a_reader_that_hangs_for_ever_does_not_keep_the_program(data, tmp_path):
    done = program(["train", data, "--run", tmp_path / "run", "--workers", "2", *TRAINING], HANG)
    assert done.returncode == 70
    assert "reading takes longer than 1 s" in done.stderr and "007.png" in done.stderr
    assert "Traceback" not in done.stderr


CRASH = """
import ctypes
from mvcr_cli.data import loader
load, turns = loader.load_picture, iter(range(10**6))
def crash(path, *rest):
    if path.endswith("007.png") and next(turns) == {turn}:
        ctypes.string_at(0)
    return load(path, *rest)
loader.load_picture = crash
"""


def test_a_crash_of_a_decoder_names_the_place_and_the_next_start_the_file(data, tmp_path):
    """A thread that crashes takes the process along; nothing that was saved is lost, and the run can go on."""
    run = tmp_path / "run"
    argv = ["train", data, "--run", run, "--resume", "--epochs", "2", "--workers", "2", "--cache", "0", "--save-every",
            "1", *TRAINING]  # fmt: skip
    done = program(argv, CRASH.format(turn=1))
    assert done.returncode == -signal.SIGSEGV
    assert "Segmentation fault" in done.stderr and "loader.py" in done.stderr
    said: list[str] = []
    state = RunDirectory(run).load_state(said.append)
    assert state is not None and said == []
    done = program(argv)
    assert done.returncode == 0, done.stderr
    warning = next(line for line in done.stderr.splitlines() if "crashed" in line)
    assert "007.png" in warning
    assert not (run / ".reading").exists()


def test_a_trail_holds_what_is_being_read_and_nothing_else(tmp_path):
    trail = Trail(tmp_path / "trail")
    assert trail.left_behind() == []
    with trail.opened(), trail.reading("a\x1b[31m.png"), trail.reading("x" * 9000):
        with trail.reading("gone.png"):
            pass
        found = Trail(tmp_path / "trail").left_behind()
        assert len(found) == 2 and found[0] == "a\\x1b[31m.png" and found[1].isprintable()
    assert not (tmp_path / "trail").exists()
    with trail.reading("after.png"):  # a reader that hung until now
        assert trail.left_behind() == []


def test_a_trail_has_room_for_so_many_and_bears_more(tmp_path, monkeypatch):
    monkeypatch.setattr(trail_module, "SLOTS", 2)
    trail = Trail(tmp_path / "trail")
    with trail.opened(), trail.reading("a"), trail.reading("b"), trail.reading("c"):
        assert trail.left_behind() == ["a", "b"]


def test_a_trail_of_noise_is_a_list_of_names(tmp_path):
    (tmp_path / "trail").write_bytes(random.Random(0).randbytes(100_000))
    assert all(name.isprintable() for name in Trail(tmp_path / "trail").left_behind())


# Equal bits


def sha(run: Path) -> str:
    return hashlib.sha256((run / "weights" / "last.safetensors").read_bytes()).hexdigest()


def test_equal_seeds_give_equal_bits_in_every_process(data, tmp_path, figure):
    """Processes that differ in hash seed, reader threads, cache, locale, time zone, folder and order of the files.

    Not in `--threads`, nor in OMP_NUM_THREADS in its place: that decides in which order sums are made, so a resumed run
    takes it from its beginning.
    """
    moved = tmp_path / "pictures"
    for path in sorted(data.rglob("*.png"), reverse=True):
        (moved / path.parent.name).mkdir(parents=True, exist_ok=True)
        (moved / path.parent.name / path.name).write_bytes(path.read_bytes())
    found = {}
    for name, folder, more, environment in (
        ("plain", data, ["--workers", "0"], {"PYTHONHASHSEED": "0"}),
        ("other", moved, ["--workers", "4", "--cache", "0"],
         {"PYTHONHASHSEED": "7", "LC_ALL": "C", "TZ": "Asia/Kathmandu", "MVCR_HOME": str(tmp_path)}),
    ):  # fmt: skip
        done = program(["train", folder, "--run", tmp_path / name, "--epochs", "2", *TRAINING, *more], **environment)
        assert done.returncode == 0, done.stderr
        found[name] = sha(tmp_path / name)
    figure(f"{len(found)} processes, {len(set(found.values()))} SHA-256")
    assert len(set(found.values())) == 1


def test_a_resumed_run_keeps_its_threads_unless_told_otherwise(data, tmp_path):
    trained(data, tmp_path / "run", threads=1, stop=stop_at(1))
    said: list[str] = []
    trained(data, tmp_path / "run", threads=None, resume=True, stop=stop_at(1), say=said.append)
    assert not [line for line in said if "threads" in line]
    trained(data, tmp_path / "run", threads=2, resume=True, stop=stop_at(1), say=said.append)
    assert [line for line in said if "--threads was 1" in line]


def precision_of(run: Path) -> str:
    found: str = json.loads((run / "config.json").read_text())["train"]["precision"]
    return found


@pytest.mark.parametrize("began", [False, True])
def test_a_resumed_run_keeps_its_precision_whatever_the_machine_would_choose(data, tmp_path, monkeypatch, began):
    """A run that began where bf16 is fast, or slow, goes on where it is slow, or fast."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    name = "bf16" if began else "fp32"
    monkeypatch.setattr("mvcr_cli.engine.cpu_has_bf16", lambda: began)
    trained(data, run, precision="auto", stop=stop_at(1))
    assert precision_of(run) == name
    trained(data, whole, precision=name)
    monkeypatch.setattr("mvcr_cli.engine.cpu_has_bf16", lambda: not began)
    said: list[str] = []
    trained(data, run, precision="auto", resume=True, say=said.append)
    assert sha(run) == sha(whole)
    assert len([line for line in said if line.startswith("warning") and "bf16" in line]) == began


def test_a_run_from_before_its_precision_was_resolved_goes_on_in_what_it_began_in(data, tmp_path, monkeypatch):
    run = tmp_path / "run"
    trained(data, run, stop=stop_at(1))
    stored = json.loads((run / "config.json").read_text())
    assert stored["environment"]["precision"] == "float32"
    stored["train"]["precision"] = "auto"
    (run / "config.json").write_text(json.dumps(stored))
    monkeypatch.setattr("mvcr_cli.engine.cpu_has_bf16", lambda: True)
    with pytest.raises(ConfigMismatch, match="precision = fp32, not bf16"):
        trained(data, run, precision="bf16", resume=True)
    said: list[str] = []
    trained(data, run, precision="auto", resume=True, say=said.append)
    assert any("float32 on cpu" in line for line in said)


def test_a_run_in_a_precision_that_the_machine_does_not_have_is_refused(data, tmp_path):
    run = tmp_path / "run"
    trained(data, run, stop=stop_at(1))
    stored = json.loads((run / "config.json").read_text())
    stored["train"]["precision"] = "fp16"
    (run / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ConfigMismatch, match="fp16, which a CPU does not") as caught:
        trained(data, run, precision="auto", resume=True)
    assert "new run" in caught.value.hint


# Memory


LIMIT = """
import resource
from mvcr_cli.engine import train
begin = train.begin
def limited(*rest):
    session = begin(*rest)
    used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize:")) << 10
    resource.setrlimit(resource.RLIMIT_AS, (used + {room}, resource.RLIM_INFINITY))
    return session
train.begin = limited
"""
# With one megabyte, the dynamic loader may end the program when it has no memory to look up a symbol, C++ when it has
# none for an exception, and Python when it has none to begin a thread: no code of ours runs that could say a sentence.
NOBODY_LEFT = (127, -signal.SIGABRT)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize(
    "room_mb", [200, *(pytest.param(mb, marks=pytest.mark.slow) for mb in (1, 5, 20, 60, 120, 400))]
)
def test_out_of_memory_is_a_message(data, tmp_path, room_mb, figure):
    run = tmp_path / "run"
    trained(data, run, stop=stop_at(4), batch=24, imgsz=512, epochs=9, progressive=False)
    options = ["--batch", "24", "--imgsz", "512", "--no-progressive", "--epochs", "9", "--threads", "1"]
    done = program(["train", data, "--run", run, "--resume", *TRAINING, *options], LIMIT.format(room=room_mb << 20))
    figure(f"{room_mb} MB of room: exit {done.returncode}")
    assert done.returncode == 70 or (room_mb == 1 and done.returncode in NOBODY_LEFT), done.stderr
    if done.returncode == 70:
        assert "out of memory" in done.stderr and "--batch" in done.stderr
        assert "Traceback" not in done.stderr
    state = RunDirectory(run).load_state(pytest.fail)
    assert state is not None and state[1]["step"] >= 1
    for weights in (run / "weights").iterdir():
        Checkpoint.load(weights)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
     RuntimeError("std::bad_alloc"), RuntimeError("can't start new thread"), torch.OutOfMemoryError("CUDA out of memory")],
    ids=str,
)  # fmt: skip
def test_the_words_for_a_lack_of_memory_are_known(error):
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
