"""A torch file becomes weights with the same numbers under the same names, or is refused in one sentence."""

from __future__ import annotations

import argparse
import copy
import io
import json
import os
import signal
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from small_run import shapes, trained

from mvcr_cli import torch_worker
from mvcr_cli.checkpoint import load_bare, pack
from mvcr_cli.cli import main
from mvcr_cli.config import ExportConfig, TrainConfig
from mvcr_cli.confined import Confined, Refused
from mvcr_cli.engine import convert as engine
from mvcr_cli.engine.convert import convert
from mvcr_cli.engine.starting import starting_weights
from mvcr_cli.errors import CannotCreate, CheckpointError, InputMissing
from mvcr_cli.models import build, config_for
from mvcr_cli.torch_worker import converted, repacked, state_dict

SOME = {"fc.weight": torch.arange(6.0).view(3, 2), "fc.bias": torch.ones(3)}


class Here:
    """The other process's work, in this one."""

    def __init__(self, work: object, shown: str, **_: str) -> None:
        self.shown = shown

    def ask(self, raw: bytes) -> bytes:
        try:
            return converted(repacked(raw))
        except Refused as refused:
            raise CheckpointError(f"{self.shown} {refused.args[0]}", refused.args[1]) from refused


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The current folder, where conversions cost no start of a process."""
    monkeypatch.setattr(engine, "Confined", Here)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def saved(value: object, **more: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **more)
    return buffer.getvalue()


def config(name: str = "x.pt", **more: Any) -> ExportConfig:
    return ExportConfig(from_torch=Path(name), format="safetensors", **more)


# The way of a good file


def test_a_run_begins_from_a_converted_file(tmp_path, monkeypatch, capfd):
    """The real command and the real process; a checkpoint as training scripts write it, of a network on two devices."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(5)
    network = build(config_for("resnet10n", 2, stem="small"))
    network.train()(torch.randn(4, 3, 48, 48))
    optimiser = torch.optim.AdamW(network.parameters())
    torch.save(
        {
            "epoch": 3, "arch": "resnet10n", "best_acc1": torch.tensor(0.5), "optimizer": optimiser.state_dict(),
            "state_dict": {f"module.{name}": tensor for name, tensor in network.state_dict().items()},
        },
        "mine.pth.tar",
    )  # fmt: skip
    with pytest.raises(SystemExit) as left:
        main(["export", "--from-torch", "mine.pth.tar", "--json"])
    assert left.value.code == 0
    record = json.loads(capfd.readouterr().out)
    assert record["record"] == "conversion" and record["file"] == "mine.pth.safetensors"
    assert record["tensors"] == len(network.state_dict())
    start = starting_weights(TrainConfig(data=tmp_path, weights=record["file"]), print)
    assert start.tensors is not None
    assert start.tensors.keys() == network.state_dict().keys()
    assert all(torch.equal(start.tensors[name], tensor) for name, tensor in network.state_dict().items())
    trained(shapes(tmp_path / "data", images=6), tmp_path / "run", model="resnet10n", weights=record["file"], epochs=1)
    begun = json.loads((tmp_path / "run" / "config.json").read_text())["start"]
    assert begun["source"] == "weights of mine.pth.safetensors" and begun["new_parts"] == ["fc.bias", "fc.weight"]


def test_the_numbers_are_the_same_bits(here):
    values = {
        "f32": torch.randn(3, 5).t(), "f16": torch.randn(4).half(), "bf16": torch.randn(4).bfloat16(),
        "f64": torch.randn(2).double(), "i64": torch.tensor(7),
        "u8": torch.arange(9, dtype=torch.uint8)[2:7:2], "none": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }  # fmt: skip
    values["again"] = values["f32"]
    torch.save(values, "x.pt")
    report = convert(config())
    found = safetensors.torch.load_file(report.file)
    assert found.keys() == values.keys() and report.tensors == len(values)
    for name, tensor in values.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor.detach()), name
    assert load_bare(Path(report.file)).keys() == values.keys()
    assert Path(report.file).stat().st_size == pytest.approx(report.megabytes * 1e6)


def test_the_command_tells_file_format_and_size(here, capfd):
    torch.save(SOME, "x.pt")
    with pytest.raises(SystemExit) as left:
        main(["export", "--from-torch", "x.pt", "--format", "safetensors", "--out", "y.safetensors"])
    out, err = capfd.readouterr()
    assert (left.value.code, err) == (0, "")
    assert out == "y.safetensors  safetensors, 0.0 MB\n2 tensors of x.pt, all of them finite\n"


def test_what_exists_is_kept_and_nothing_half_is_left(here):
    torch.save(SOME, "x.pt")
    Path("x.safetensors").write_bytes(b"mine")
    with pytest.raises(CannotCreate, match="exists"):
        convert(config())
    assert Path("x.safetensors").read_bytes() == b"mine"
    convert(config(overwrite=True))
    assert load_bare(Path("x.safetensors")).keys() == SOME.keys()
    with pytest.raises(CannotCreate, match="no folder"):
        convert(config(out=Path("none/x.safetensors")))
    Path("x.pt").write_bytes(b"no zip")
    with pytest.raises(CheckpointError):
        convert(config(out=Path("z.safetensors")))
    assert sorted(os.listdir()) == ["x.pt", "x.safetensors"]


def test_what_is_not_there_is_missing_and_what_is_no_file_never_blocks(here):
    with pytest.raises(InputMissing):
        convert(config("none.pt"))
    os.mkfifo("pipe.pt")
    Path("folder.pt").mkdir()
    for name in ("pipe.pt", "folder.pt"):
        with pytest.raises(CheckpointError, match="not a file"):
            convert(config(name))


# What is a state dict


@pytest.mark.parametrize("key", [None, "state_dict", "model", "model_state_dict", "ema", "state_dict_ema"])
def test_a_state_dict_is_found_at_the_top_or_one_level_below(key):
    found = SOME if key is None else {key: SOME, "epoch": 3, "args": {"lr": 0.1}, "step": torch.tensor(1)}
    assert state_dict(found) == SOME


@pytest.mark.parametrize(
    ("names", "plain"),
    [
        (("module.a", "module.b.c"), ["a", "b.c"]),
        (("module.module.a",), ["module.a"]),
        (("module.a", "b"), ["module.a", "b"]),
        (("a.module.b",), ["a.module.b"]),
    ],
)
def test_the_prefix_goes_when_all_have_it(names, plain):
    assert list(state_dict(dict.fromkeys(names, torch.zeros(1)))) == plain


@pytest.mark.parametrize(
    "found",
    [{"state_dict": SOME, "state_dict_ema": SOME}, {"model": SOME, "model_ema": SOME}, {"ema": SOME, "model": SOME}],
    ids=lambda found: " ".join(found),
)
def test_of_two_state_dicts_none_is_guessed(found):
    with pytest.raises(Refused, match="2 state dicts"):
        state_dict(found)


@pytest.mark.parametrize(
    "found",
    [
        {}, [], None, 3, torch.zeros(2), {"state_dict": {}}, {"net": SOME}, {"model": {"state_dict": SOME}},
        {1: torch.zeros(1)}, {"a": [torch.zeros(1)]}, {"a": torch.zeros(1), "b": 1}, [SOME], {"model": {1: torch.zeros(1)}},
    ],
    ids=lambda found: str(found)[:40],
)  # fmt: skip
def test_what_is_no_state_dict_is_refused(found):
    with pytest.raises(Refused, match="no state dict"):
        state_dict(found)


ODD: dict[str, Callable[[], torch.Tensor]] = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "complex": lambda: torch.zeros(2, dtype=torch.complex64),
    "truth": lambda: torch.zeros(2) > 0,
    "eight bits": lambda: torch.zeros(2).to(torch.float8_e4m3fn),
    "without numbers": lambda: torch.zeros(2, device="meta"),
    "negated when read": lambda: torch.zeros(2, dtype=torch.complex64).conj().imag,
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_tensors_that_are_more_than_numbers_are_refused(name):
    with pytest.raises(Refused, match="no dense tensor"):
        converted(repacked(saved({"w": ODD[name]()})))


@pytest.mark.parametrize("count", [10_000, 2**40])
def test_one_number_that_is_repeated_does_not_fill_the_memory(count):
    with pytest.raises(Refused, match="grow"):
        converted(repacked(saved({"w": torch.zeros(1).expand(count)})))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("fc.bias", float("nan"), "not finite"), ("fc.bias", float("-inf"), "not finite"), ("bn1.running_var", -1.0, "negative")],
)  # fmt: skip
def test_numbers_that_are_none_are_refused_as_in_any_weights(here, name, value, words):
    torch.save({"a": torch.zeros(2), name: torch.tensor([1.0, value])}, "x.pt")
    with pytest.raises(CheckpointError, match=words):
        convert(config())
    assert os.listdir() == ["x.pt"]


# What is an archive of torch.save


def rezipped(raw: bytes, change: Callable[[zipfile.ZipInfo, bytes], tuple[str, bytes]], **more: Any) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(out, "w", **more) as new:
        for entry in old.infolist():
            new.writestr(*change(entry, old.read(entry)))
    return out.getvalue()


def overlapping(raw: bytes) -> bytes:
    """Many names for the same bytes."""
    out = io.BytesIO(raw)
    with zipfile.ZipFile(out, "a") as archive:
        largest = max(archive.filelist, key=lambda entry: entry.file_size)
        for number in range(9):
            twin = copy.copy(largest)
            twin.filename = f"archive/data/{number + 10}"
            archive.filelist.append(twin)
            archive.NameToInfo[twin.filename] = twin
        archive._didModify = True  # type: ignore[attr-defined]
    return out.getvalue()


def twice(raw: bytes) -> bytes:
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(out := io.BytesIO(raw), "a") as archive:
        archive.writestr("archive/data.pkl", b"")
    return out.getvalue()


def with_flags(raw: bytes, flags: int) -> bytes:
    """As the directory of the archive claims."""
    content = bytearray(raw)
    at = content.rindex(b"PK\1\2")
    content[at + 8] |= flags
    return bytes(content)


def tarred(raw: bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        info = tarfile.TarInfo("pickle")
        info.size = len(raw)
        archive.addfile(info, io.BytesIO(raw))
    return out.getvalue()


def with_constants(raw: bytes) -> bytes:
    with zipfile.ZipFile(out := io.BytesIO(raw), "a") as archive:
        archive.writestr("archive/constants.pkl", b"")
    return out.getvalue()


ARCHIVES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "compressed": (lambda raw: rezipped(raw, lambda entry, content: (entry.filename, content),
                                        compression=zipfile.ZIP_DEFLATED), "compressed"),
    "file twice": (twice, "twice"),
    "encrypted": (lambda raw: with_flags(raw, 1), "encrypted"),
    "overlapping": (overlapping, "claims more"),
    "another folder": (lambda raw: rezipped(raw, lambda entry, content: (entry.filename.replace("data/0", "../x"), content)),
                       "damaged"),
    "files outside": (lambda raw: rezipped(raw, lambda entry, content: (entry.filename.replace("archive/version", "x"),
                                                                        content)), "not one that torch.save"),
    "no pickle": (lambda raw: rezipped(raw, lambda entry, content: (entry.filename.replace("data.pkl", "x"), content)),
                  "not one that torch.save"),
    "no files": (lambda raw: b"PK\5\6" + b"\0" * 18, "today's format"),
    "TorchScript": (with_constants, "TorchScript"),
    "something before it": (lambda raw: pack(SOME, {}) + raw, "today's format"),
    "cut": (lambda raw: raw[:-100], "damaged"),
    "half": (lambda raw: raw[: len(raw) // 2], "damaged"),
    "flipped bit": (lambda raw: raw.replace(b"\0\0\x80?", b"\0\0\x81?"), "damaged"),
    "tar": (tarred, "today's format"),
    "legacy": (lambda raw: saved(SOME, _use_new_zipfile_serialization=False), "today's format"),
    "nothing": (lambda raw: b"", "today's format"),
    "text": (lambda raw: b"hello, this is no archive", "today's format"),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHIVES)
def test_what_is_no_archive_of_torch_is_refused(name):
    change, words = ARCHIVES[name]
    raw = saved(SOME)
    spoiled = change(raw)
    assert spoiled != raw
    with pytest.raises(Refused, match=words):
        converted(repacked(spoiled))


def test_a_bomb_is_refused_before_anything_is_unpacked(monkeypatch):
    bomb = rezipped(saved({"w": torch.zeros(1 << 24)}), lambda entry, raw: (entry.filename, raw),
                    compression=zipfile.ZIP_DEFLATED)  # fmt: skip
    assert len(bomb) < 1 << 17

    def read(*_: object) -> bytes:
        raise AssertionError("unpacked")

    monkeypatch.setattr(zipfile.ZipFile, "read", read)
    with pytest.raises(Refused, match="compressed"):
        repacked(bomb)


def test_what_a_pickle_asks_for_is_named_and_torch_does_not_give_advice():
    with pytest.raises(Refused) as caught:
        converted(repacked(saved({"model": SOME, "args": argparse.Namespace(lr=1)})))
    message, hint = caught.value.args
    assert message == "asks for argparse.Namespace, which is no tensor; it was not run"
    assert "state_dict" in hint and "weights_only" not in message + hint


# The process


def test_a_process_that_takes_too_long_is_stopped(monkeypatch):
    monkeypatch.setattr(torch_worker, "SECONDS", 0.5)  # less than the import of torch
    with pytest.raises(CheckpointError, match=r"longer than 0\.5 s"):
        Confined(torch_worker, "x.pt").ask(saved(SOME))


def test_a_process_that_dies_is_a_sentence():
    confined = Confined(torch_worker, "x.pt")
    os.kill(confined._process.pid, signal.SIGSEGV)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"x\.pt took down the process that opened it: SIGSEGV"):
            confined.ask(saved(SOME))


@pytest.mark.parametrize(
    "answer",
    [b"", b"nonsense", b"\x80\x02", saved(SOME), pack(SOME, {"classes": ["a"]}), pack(SOME, {})[:-1]],
    ids=["nothing", "nonsense", "pickle", "torch file", "a record", "cut"],
)
def test_an_answer_that_is_no_weights_is_refused(here, monkeypatch, answer):
    torch.save(SOME, "x.pt")
    monkeypatch.setattr(Here, "ask", lambda self, raw: answer)
    with pytest.raises(CheckpointError, match=r"^x\.pt "):
        convert(config())
    assert os.listdir() == ["x.pt"]
