"""A run survives kills, full disks, damage, rivals and strangers: what it saved stays readable, and its end the same."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from small_run import NOWHERE, needs_proc, settings, shapes, stop_at, trained

from mvcr_cli.checkpoint import Checkpoint, pack
from mvcr_cli.cli import main
from mvcr_cli.config import EvalConfig, ExportConfig
from mvcr_cli.data.loader import TrainingReader
from mvcr_cli.engine import train as train_module
from mvcr_cli.engine.evaluate import evaluate, validation_split
from mvcr_cli.engine.export import export
from mvcr_cli.engine.findings import record_findings
from mvcr_cli.engine.rundir import RunDirectory
from mvcr_cli.engine.train import train
from mvcr_cli.errors import (
    CannotCreate,
    CheckpointError,
    ConfigMismatch,
    DataError,
    InputMissing,
    MvcrError,
    RunBusy,
    WriteFailed,
)
from mvcr_cli.models import TRUNKS
from mvcr_cli.paths import write_whole
from mvcr_cli.records import Problem

HERE = Path(__file__).parent
TRAINING = [
    "--model", "mvcr10n", "--weights", "none", "--imgsz", "48", "--epochs", "3", "--batch", "8", "--workers", "2",
    "--threads", "1", "--precision", "fp32", "--split", "0.25", "--device", "cpu", "--offline", "--save-every", "2",
    "--accumulate", "2",
]  # fmt: skip
Figure = Callable[[str], None]


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
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    trained(data, run)
    return run


@pytest.fixture(scope="module")
def begun(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after its first epoch of three steps, with two states."""
    run = tmp_path_factory.mktemp("runs") / "begun"
    trained(data, run, stop=stop_at(5), save_every=1)
    return run


def digests(run: Path) -> dict[str, str]:
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in run.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def same_weights(a: Path, b: Path) -> bool:
    return all((a / "weights" / name).read_bytes() == (b / "weights" / name).read_bytes()
               for name in ("last.safetensors", "best.safetensors"))  # fmt: skip


# Kills


@pytest.mark.parametrize(
    ("kills", "extra"),
    [
        pytest.param(20, [], id="20"),
        pytest.param(200, ["--exec"], id="200", marks=pytest.mark.slow),
    ],
)
def test_killed_at_random_moments_a_run_ends_bit_for_bit_as_if_undisturbed(
    data: Path, tmp_path: Path, figure: Figure, kills: int, extra: list[str]
) -> None:
    done = subprocess.run(
        [sys.executable, HERE / "chaos.py", "--kills", str(kills), "--work", tmp_path, *extra, "--",
         "train", data, "--run", "{run}", "--resume", *TRAINING],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    figure(f"{found['signals']} signals over {found['runs']} runs, {len(found['faults'])} faults; {found['exits']}; "
           f"the slowest polite end {found['slowest_stop_seconds']:.1f} s")  # fmt: skip
    assert found["faults"] == []
    assert found["signals"] >= kills


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("fate", ["becomes another error", "is lost"])
def test_a_signal_that_an_import_swallows_still_ends_the_program(monkeypatch, capfd, number, code, fate):
    """An import that a signal cuts short leaves half a module, whose error would look like a defect of ours."""

    def interrupted(*_: object, **__: object) -> NoReturn:
        try:
            os.kill(os.getpid(), number)
        except BaseException:
            if fate == "becomes another error":
                raise AttributeError("partially initialized module") from None
        raise InputMissing("nothing to do")

    monkeypatch.setattr("mvcr_cli.engine.evaluate.evaluate", interrupted)
    with pytest.raises(SystemExit) as left:
        main(["eval"])
    assert left.value.code == code
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("leftover", ["split.json", ".config.json.0a1b2c3d.tmp", ".lock", ".reading"])
def test_a_run_that_was_killed_before_it_began_can_begin_again(data, undisturbed, tmp_path, leftover):
    """Between the first folder and `config.json` lie a few files; none of them makes the folder a stranger's."""
    run = tmp_path / "run"
    (run / "state").mkdir(parents=True)
    (run / leftover).write_bytes(b"")
    trained(data, run, resume=True)
    assert same_weights(run, undisturbed)


def test_a_file_left_by_a_killed_process_of_the_same_number_blocks_nothing(tmp_path):
    """In a container a program may have the same number at every start."""
    for number in (os.getpid(), 1):
        (tmp_path / f".x.json.{number}.tmp").write_bytes(b"half")
    write_whole(tmp_path / "x.json", "{}")
    assert (tmp_path / "x.json").read_text() == "{}"


def test_a_run_folder_that_is_deleted_under_a_run_is_not_called_a_full_disk(tmp_path):
    with pytest.raises(CannotCreate, match="not there any more"):
        write_whole(tmp_path / "deleted" / "x.json", "{}")


@needs_proc
@pytest.mark.parametrize("run", [NOWHERE, NOWHERE / "below"])
def test_a_run_folder_that_cannot_be_made_is_told_before_the_pictures_are_read(tmp_path, run, monkeypatch):
    monkeypatch.setattr("mvcr_cli.engine.prepare.scan", None)
    with pytest.raises(CannotCreate, match=f"^cannot create {run}: No such file"):
        trained(shapes(tmp_path / "data", images=2), run)


@needs_proc
def test_what_no_folder_takes_is_not_called_a_deleted_folder():
    with pytest.raises(CannotCreate, match=f"^cannot create {NOWHERE / 'below'}: No such file"):
        RunDirectory(NOWHERE / "below").create()
    with pytest.raises(CannotCreate, match=f"^cannot write .* to {NOWHERE}: No such file"):
        write_whole(NOWHERE, "{}")


# Damage


def hurt(content: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(content))
    match chance.choice(("flip", "cut", "zero")):
        case "flip":
            return content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1 :]
        case "cut":
            return content[:at]
    end = min(len(content), at + 4096)
    zeroed = content[:at] + bytes(end - at) + content[end:]
    return zeroed if zeroed != content else content[:at]


def test_damage_in_a_hundred_places_of_the_newest_state_is_noticed(begun, tmp_path, figure):
    run = RunDirectory(shutil.copytree(begun, tmp_path / "run"))
    older, newest = sorted(run.states.iterdir())
    content, chance = newest.read_bytes(), random.Random(0)
    noticed = 0
    for _ in range(100):
        newest.write_bytes(hurt(content, chance))
        said: list[str] = []
        state = run.load_state(said.append)
        assert state is not None
        noticed += state[1]["step"] == 2 and len(said) == 1 and older.name in said[0]
    figure(f"{noticed} of 100 noticed, one warning each")
    assert noticed == 100


def test_when_every_state_is_damaged_nothing_begins_anew_in_silence(data, begun, tmp_path):
    run = shutil.copytree(begun, tmp_path / "run")
    for state in (run / "state").iterdir():
        state.write_bytes(state.read_bytes()[:-1])
    before = digests(run)
    with pytest.raises(CheckpointError, match="every state"):
        trained(data, run, resume=True)
    assert digests(run) == before


def resealed(path: Path, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
    raw = pack(tensors, meta)
    path.unlink()
    step = path.name.split("-")[1]
    (path.parent / f"step-{step}-{hashlib.sha256(raw).hexdigest()[:16]}.safetensors").write_bytes(raw)


LIES: dict[str, Callable[[dict[str, torch.Tensor], dict[str, Any]], object]] = {
    "no step": lambda t, m: m.pop("step"),
    "step no number": lambda t, m: m.update(step="3"),
    "pending no flag": lambda t, m: m.update(pending=3),
    "no scaler": lambda t, m: m.pop("scaler"),
    "lacks a weight": lambda t, m: t.pop("model.conv1.weight"),
    "lacks an average": lambda t, m: t.pop("average.fc.bias"),
    "other shape": lambda t, m: t.update({"model.fc.bias": torch.zeros(3)}),
    "lacks a moment": lambda t, m: t.pop("opt.0.exp_avg"),
    "unknown moment": lambda t, m: t.update({"opt.0.surprise": torch.zeros(())}),
    "moment of another shape": lambda t, m: t.update({"opt.0.exp_avg": torch.zeros(1)}),
    "step of another shape": lambda t, m: t.update({"opt.0.step": torch.zeros(7)}),
    "moment of no parameter": lambda t, m: t.update({"opt.99999.exp_avg": torch.zeros(1)}),
    "index no number": lambda t, m: t.update({"opt.x.exp_avg": torch.zeros(1)}),
    "gradient of no parameter": lambda t, m: t.update({"gradient.surprise": torch.zeros(1)}),
    "gradient of another shape": lambda t, m: t.update({"gradient.fc.bias": torch.zeros(9)}),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_state_that_a_stranger_made_is_refused_in_one_sentence(data, begun, tmp_path, lie):
    """Its digest is right: only what it says is not that of this network."""
    run = RunDirectory(shutil.copytree(begun, tmp_path / "run"))
    older, newest = sorted(run.states.iterdir())
    older.unlink()
    state = run.load_state(pytest.fail)
    assert state is not None
    tensors = {name: tensor.clone() for name, tensor in state[0].items()}
    LIES[lie](tensors, state[1])
    resealed(newest, tensors, state[1])
    before = digests(run.path)
    with pytest.raises(CheckpointError) as caught:
        trained(data, run.path, resume=True)
    assert caught.value.message.isprintable()
    assert digests(run.path) == before


# Full, read-only and forbidden disks


def test_a_file_size_limit_is_one_message_and_what_was_saved_is_intact(data, undisturbed, tmp_path):
    """As a quota does, the limit falls in the middle of the run; the next start, with space, ends as if undisturbed."""
    run = tmp_path / "run"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    asked = iter(range(1, 100))

    def stop() -> None:
        if next(asked) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))

    try:
        with pytest.raises(WriteFailed) as caught:
            trained(data, run, stop=stop, save_every=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.exit_code == 74
    assert str(run) in caught.value.message and "bytes" in caught.value.message
    state = RunDirectory(run).load_state(pytest.fail)
    assert state is not None and state[1]["step"] == 1
    assert not list(run.rglob(".*.tmp"))
    trained(data, run, resume=True)
    assert same_weights(run, undisturbed)


def may_mount() -> bool:
    probe = ["unshare", "--mount", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/mnt"]
    return (
        shutil.which("unshare") is not None and subprocess.run(probe, capture_output=True, check=False).returncode == 0
    )


@pytest.mark.skipif(not may_mount(), reason="needs the right to mount")
def test_a_disk_that_is_full_and_one_that_is_read_only(data, tmp_path, figure):
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, HERE / "full_disk.py", data, tmp_path],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figure(done.stdout.strip())


# Rivals


def in_children(count: int, work: Callable[[int], object]) -> list[int]:
    """Exit codes of forked children that start together; an MvcrError is its own code."""
    reader, writer = os.pipe()
    pids = []
    for number in range(count):
        pid = os.fork()
        if pid == 0:
            _work(number, work, reader, writer)
        pids.append(pid)
    os.close(reader)
    os.close(writer)  # the last end: all children go
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def _work(number: int, work: Callable[[int], object], reader: int, writer: int) -> NoReturn:
    os.close(writer)
    os.read(reader, 1)
    try:
        work(number)
    except MvcrError as error:
        os._exit(int(error.exit_code))
    except BaseException:
        os._exit(99)
    os._exit(0)


def test_of_eight_starters_one_has_the_run_and_seven_are_told(tmp_path, figure):
    for turn in range(30):
        run = tmp_path / str(turn)

        def begin(number: int, path: Path = run) -> None:
            run = RunDirectory(path)
            run.create()
            told = path.with_suffix(".told")
            try:
                with run.locked():
                    run.config.write_text("{}")
                    until = time.monotonic() + 60
                    while len(list(told.parent.glob(f"{path.name}.told*"))) < 7 and time.monotonic() < until:
                        time.sleep(0.01)
            except RunBusy:
                told.with_suffix(f".told{number}").touch()
                raise

        codes = in_children(8, begin)
        assert sorted(codes) == [0, *[75] * 7]
    figure("30 rounds of 8 starters: 1 writes, 7 end with 75")


def test_starters_without_a_name_get_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(4):
        assert in_children(8, lambda _: RunDirectory.numbered("m")) == [0] * 8
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == sorted(f"m-{n}" for n in range(1, 33))


@pytest.mark.parametrize("kind", ["link to nothing", "file"])
def test_a_place_for_runs_that_is_no_folder_is_refused_at_once(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    if kind == "file":
        Path("runs").touch()
    else:
        os.symlink("nowhere", "runs")
    tried: list[Path] = []
    mkdir = Path.mkdir
    monkeypatch.setattr(Path, "mkdir", lambda self, *a, **k: (tried.append(self), mkdir(self, *a, **k))[1])
    with pytest.raises(CannotCreate):
        RunDirectory.numbered("m")
    assert len(tried) < 5


def test_the_lock_of_a_killed_process_is_gone_with_it(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.create()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with run.locked():
            os.write(writer, b"!")
            signal.pause()
    os.read(reader, 1)
    with pytest.raises(RunBusy), run.locked():
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with run.locked():
        pass
    os.close(reader)
    os.close(writer)


def test_a_lock_that_was_taken_away_locks_nothing(tmp_path, monkeypatch):
    """Between opening and locking, the run may be given up by one process and begun by another."""
    import fcntl

    run = RunDirectory(tmp_path / "run")
    run.create()
    lock = fcntl.flock

    def late(descriptor: int, how: int) -> None:
        run.lock.unlink()
        run.lock.touch()  # that of the third process
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(RunBusy), run.locked():
        pass


def test_a_busy_run_downloads_nothing(data, begun, monkeypatch):
    monkeypatch.setattr("mvcr_cli.weights.pretrained", lambda *_, **__: pytest.fail("downloads"))
    with RunDirectory(begun).locked(), pytest.raises(RunBusy):
        trained(data, begun, weights="imagenet", model="mvcr18", imgsz=32)
    with pytest.raises(CannotCreate):
        trained(data, begun, weights="imagenet", model="mvcr18", imgsz=32)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("fault", ["missing", "another model"])
def test_refused_weights_leave_no_folder(data, undisturbed, tmp_path, monkeypatch, named, fault):
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "none.safetensors" if fault == "missing" else undisturbed / "weights" / "best.safetensors"
    run = Path("runs/mine") if named else None
    with pytest.raises(InputMissing if fault == "missing" else CheckpointError):
        trained(data, run, weights=str(weights), model="resnet18")
    assert not list(tmp_path.glob("runs/*"))


def test_a_folder_that_was_there_before_stays(data, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputMissing):
        trained(data, tmp_path / "mine", weights=str(tmp_path / "none"))
    assert list((tmp_path / "mine").iterdir()) == []


# The record of a run


@pytest.mark.parametrize("use", ["resume", "eval", "export"])
def test_a_run_of_a_newer_format_asks_for_the_newer_program(data, begun, undisturbed, tmp_path, use):
    run = shutil.copytree(begun if use == "resume" else undisturbed, tmp_path / "run")
    stored = json.loads((run / "config.json").read_text())
    assert stored["format_version"] == 1
    (run / "config.json").write_text(json.dumps({**stored, "format_version": 2, "mvcr": "9.8.7"}))
    uses: dict[str, Callable[[], object]] = {
        "resume": lambda: trained(data, run, resume=True),
        "eval": lambda: evaluate(EvalConfig(run=run, workers=1)),
        "export": lambda: export(ExportConfig(run=run, format="safetensors")),
    }
    with pytest.raises(ConfigMismatch) as caught:
        uses[use]()
    assert caught.value.exit_code == 78
    assert "9.8.7" in caught.value.hint


def test_a_run_of_an_older_format_is_read(data, begun, undisturbed, tmp_path):
    """Before it had a version, and with the paths of the pictures as they had been typed."""
    run = shutil.copytree(begun, tmp_path / "run")
    stored = json.loads((run / "config.json").read_text())
    del stored["format_version"]
    (run / "config.json").write_text(json.dumps(stored))
    split = json.loads((run / "split.json").read_text())
    root = split.pop("root")
    for side in ("train", "val"):
        split[side] = [[os.path.join(root, name), label, digest] for name, label, digest in split[side]]
    (run / "split.json").write_text(json.dumps(split))
    trained(data, run, resume=True)
    assert same_weights(run, undisturbed)
    assert evaluate(EvalConfig(run=run, workers=1))[0].images == 8


@pytest.mark.parametrize("apart", [False, True])
def test_relative_data_is_found_from_every_folder(data, tmp_path, monkeypatch, apart):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    os.symlink(data, "pictures")
    shapes(tmp_path / "other", images=3, first=50)
    more: dict[str, Any] = {"val": Path("../other")} if apart else {}
    trained(Path("pictures"), Path("run"), epochs=1, **more)
    split = json.loads(Path("run/split.json").read_text())
    assert all(not os.path.isabs(row[0]) for row in split["train"])
    monkeypatch.chdir(tmp_path / "there")
    report, _, problems = evaluate(EvalConfig(run=Path("../here/run"), workers=1))
    assert (report.images, problems) == (6 if apart else 8, [])


def test_paths_in_a_record_are_paths_and_nothing_more(undisturbed, tmp_path):
    """Names that a shell, a URL library or `open` would take for something else are names of files that are not there."""
    run = shutil.copytree(undisturbed, tmp_path / "run")
    split = json.loads((run / "split.json").read_text())
    os.mkfifo(tmp_path / "pipe.png")
    secret = tmp_path / "secret"
    secret.write_text("root:x:0:0")
    names = ["~/x.png", "$HOME/x.png", "file:///etc/passwd", "http://127.0.0.1:1/x.png", "|touch PWNED", "-", str(secret),
             "../" * 40 + "etc/passwd", str(tmp_path / "pipe.png"), "x\0.png", "", "x" * 5000, "\udcff.png"]  # fmt: skip
    good = split["val"][0]
    split["val"] = [good, *([name, "circle", "0"] for name in names)]
    (run / "split.json").write_text(json.dumps(split))
    report, results, problems = evaluate(EvalConfig(run=run, workers=1))
    assert report.images == 1
    assert [result.path for result in results] == [os.path.join(split["root"], good[0])]
    assert len(problems) == len(names)
    assert not [problem for problem in problems if "root:x" in problem.detail]


@pytest.mark.parametrize(
    "entry", [[5, "circle", "0"], [None, "circle", "0"], [["a"], "circle", "0"], ["a", "circle"], 7]
)
@pytest.mark.parametrize("root", ["/", None, 5, []])
def test_a_record_of_other_types_is_refused(undisturbed, tmp_path, entry, root):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text("{}")
    (run / "split.json").write_text(json.dumps({"root": root, "val": [entry]}))
    with pytest.raises(ConfigMismatch):
        validation_split(run, ("circle", "square"))


@pytest.mark.parametrize("name", ["config.json", "split.json", "metrics.jsonl", ".reading"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop"])
def test_a_record_that_is_no_file_never_blocks(data, begun, tmp_path, name, kind):
    run = shutil.copytree(begun, tmp_path / "run")
    (run / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(run / name)
    elif kind == "folder":
        (run / name).mkdir()
    else:
        os.symlink("/dev/zero" if kind == "device" else name, run / name)
    with alarm(60):
        if name == ".reading":
            trained(data, run, resume=True, stop=stop_at(1))
        else:
            with pytest.raises(MvcrError):
                trained(data, run, resume=True)


@contextlib.contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """Nothing in here may hang."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_links_in_a_run_from_a_stranger_lead_to_no_write_elsewhere(data, begun, tmp_path):
    run, precious = shutil.copytree(begun, tmp_path / "run"), tmp_path / "precious"
    precious.mkdir()
    for name in (".reading", ".lock", "metrics.jsonl", "results.csv", "eval.json",
                 "weights/last.safetensors", "weights/best.safetensors"):  # fmt: skip
        target = precious / Path(name).name
        target.write_bytes((run / name).read_bytes() if name == "metrics.jsonl" else b"precious")
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(target)
    before = digests(precious) | {".lock": (precious / ".lock").read_text()}
    trained(data, run, resume=True)
    assert digests(precious) | {".lock": (precious / ".lock").read_text()} == before
    Checkpoint.load(run / "weights" / "last.safetensors")
    assert not (run / "weights" / "last.safetensors").is_symlink()


def damaged_json(content: bytes, chance: random.Random) -> bytes:
    """JSON that parses and says something else, or JSON that does not parse."""
    value = json.loads(content)
    for _ in range(chance.choice((1, 1, 2))):
        place: Any = value
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = chance.choice(keys)
            if isinstance(place[key], dict | list) and place[key] and chance.random() < 0.7:
                place = place[key]
                continue
            if isinstance(place, dict) and chance.random() < 0.3:
                del place[key]
            else:
                place[key] = chance.choice(
                    (None, True, -1, 10**30, 1e308, "", "\x1b[31m", "x" * 3000, [], {}, [[1]], {"a": 1})
                )
            break
    text, kind = json.dumps(value).encode(), chance.random()
    return text if kind < 0.8 else text[: chance.randrange(len(text))] if kind < 0.9 else b"\xff" + text


@pytest.mark.parametrize("name", ["config.json", "split.json", "metrics.jsonl", "findings.jsonl"])
@pytest.mark.parametrize("count", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_damaged_records_give_a_sentence_or_a_run(data, begun, tmp_path, name, count, monkeypatch, figure):
    """Resuming and evaluating on records with random damage: our own errors, or none."""
    monkeypatch.setattr(train_module.Trainer, "epochs", lambda *_: iter(()))
    monkeypatch.setattr(train_module.Trainer, "finish", lambda *_: None)
    run = shutil.copytree(begun, tmp_path / "run")
    record_findings(run, [Problem(path="cut.png", code="corrupt", detail="cut short")])
    content, chance, refused, longest = (run / name).read_bytes(), random.Random(1), 0, ""
    for _ in range(count):
        (run / name).write_bytes(damaged_json(content, chance))
        try:
            list(train(settings(data, run, resume=True)))
            validation_split(run, ("circle", "square"))
        except MvcrError as error:
            longest = max(longest, error.message, key=len)
            refused += 1
    assert len(longest) <= 2000
    figure(f"{count} damaged {name}: {refused} refused, 0 other exceptions")


# Accumulation, validation, manners


def last(run: Path) -> dict[str, torch.Tensor]:
    return Checkpoint.load(run / "weights" / "last.safetensors").tensors


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def updates(run: Path) -> int:
    state = RunDirectory(run).load_state(pytest.fail)
    assert state is not None
    return max(int(tensor) for name, tensor in state[0].items() if name.endswith(".step"))


def test_a_half_full_accumulation_counts_at_the_end_as_the_mean_of_what_is_there(data, tmp_path):
    """Two steps are all there is: summed into one update, whether two or four were asked for."""
    for name, accumulate in (("two", 2), ("four", 4)):
        said: list[str] = []
        trained(data, tmp_path / name, batch=12, epochs=1, lr=1e-3, accumulate=accumulate, say=said.append)
        assert any("one update" in line for line in said) == (accumulate == 4)
    assert equal(last(tmp_path / "two"), last(tmp_path / "four"))
    assert updates(tmp_path / "four") == 1
    trained(data, tmp_path / "three", epochs=1, accumulate=2)
    assert updates(tmp_path / "three") == 2


@pytest.mark.parametrize("question", [1, 2, 3, 4, 5])
def test_the_last_update_is_the_same_after_an_interruption(data, tmp_path, question):
    """Three steps, two to an update; 3 and 4 cut the validation short that follows the odd last update."""
    a, b = tmp_path / "a", tmp_path / "b"
    trained(data, a, epochs=1, accumulate=2)
    trained(data, b, epochs=1, accumulate=2, stop=stop_at(question))
    trained(data, b, epochs=1, accumulate=2, resume=True)
    assert same_weights(a, b)


def test_a_step_without_a_readable_picture_does_not_postpone_the_update(data, tmp_path, monkeypatch):
    batches = TrainingReader.batches

    def holes(self: TrainingReader, steps: Any) -> Any:
        for number, (step, batch) in enumerate(batches(self, steps)):
            yield step, None if number in (1, 2, 3) else batch

    monkeypatch.setattr(TrainingReader, "batches", holes)
    trained(data, tmp_path / "run", epochs=2, accumulate=2)
    assert updates(tmp_path / "run") == 2  # after steps 2 and 6; steps 3 and 4 had no picture


def test_the_validation_of_a_training_in_bf16_is_that_of_eval(data, tmp_path):
    run = tmp_path / "run"
    _, end = trained(data, run, epochs=1, precision="bf16")
    stored = json.loads((run / "eval.json").read_text())
    report, _, _ = evaluate(EvalConfig(run=run, workers=1))
    assert report.loss == pytest.approx(stored["loss"], abs=1e-5)
    assert report.top1.value == end.best_accuracy


@pytest.mark.parametrize("end", ["finished", "error", "left"])
def test_a_training_leaves_torch_as_it_was(data, tmp_path, end):
    torch.set_num_threads(2)
    try:
        torch.manual_seed(5)
        wanted = torch.rand(3).tolist()
        torch.manual_seed(5)
        if end == "finished":
            trained(data, tmp_path / "run", epochs=1)
        elif end == "error":
            with pytest.raises(DataError):
                trained(data, tmp_path / "run", lr=100.0, clip=0.0, epochs=30, precision="fp32", warmup=0.0)
        else:
            items = train(settings(data, tmp_path / "run"))
            next(items)
            items.close()
        assert torch.get_num_threads() == 2
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        assert torch.rand(3).tolist() == wanted
    finally:
        torch.set_num_threads(1)


# Weights of other classes


HEADS: dict[str, Any] = {"layers": ("blur", "gem", "heads")}


def swapped(weights: Path, path: Path) -> Path:
    """The network with its two outputs, and their names, in the other order."""
    was = Checkpoint.load(weights)
    rows = ("fc.weight", "fc.bias", "head3.weight", "head4.weight")
    tensors = {name: tensor.flip(0) if name in rows else tensor for name, tensor in was.tensors.items()}
    dataclasses.replace(was, classes=was.classes[::-1], tensors=tensors).save(path)
    return path


def still(data: Path, run: Path, weights: Path, **asked: Any) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensors after a training that moves nothing, and what was said about the weights."""
    said: list[str] = []
    trained(data, run, weights=str(weights), lr=1e-12, epochs=1, ema=0.0, say=said.append, **asked)
    return last(run), [line for line in said if line.startswith("weights:")]


def test_the_rows_of_the_last_layer_follow_the_names_of_the_classes(data, tmp_path):
    trained(data, tmp_path / "base", epochs=1, **HEADS)
    weights = tmp_path / "base" / "weights" / "best.safetensors"
    plain, said = still(data, tmp_path / "plain", weights, **HEADS)
    assert said == []
    turned, said = still(data, tmp_path / "turned", swapped(weights, tmp_path / "swapped.safetensors"), **HEADS)
    assert len(said) == 1 and "another order" in said[0]
    for name in ("fc.weight", "head3.weight", "fc.bias"):
        torch.testing.assert_close(turned[name], plain[name], rtol=0, atol=1e-6)


def test_the_last_layer_of_other_classes_is_not_taken(undisturbed, tmp_path):
    """As many classes as the weights have, under other names."""
    other = shapes(tmp_path / "other", classes=("square", "triangle"))
    weights = undisturbed / "weights" / "best.safetensors"
    found, said = still(other, tmp_path / "run", weights)
    assert len(said) == 1 and "anew" in said[0] and "circle" in said[0]
    was = Checkpoint.load(weights).tensors
    assert not torch.allclose(found["fc.weight"], was["fc.weight"], atol=1e-3)
    torch.testing.assert_close(found["layer4.0.conv1.weight"], was["layer4.0.conv1.weight"], rtol=0, atol=1e-6)


def test_weights_without_names_bring_no_last_layer(data, undisturbed, tmp_path):
    import safetensors.torch

    was = Checkpoint.load(undisturbed / "weights" / "best.safetensors").tensors
    safetensors.torch.save_file(was, tmp_path / "bare.safetensors")
    found, said = still(data, tmp_path / "run", tmp_path / "bare.safetensors")
    assert len(said) == 1 and "without names" in said[0]
    assert not torch.allclose(found["fc.weight"], was["fc.weight"], atol=1e-3)
