"""Model files from strangers: nothing runs, everything is refused in one sentence, and labels go by name."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pickle
import random
import shlex
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from mutants import fuzz, mutate
from onnx import TensorProto, helper
from small_run import shapes, trained
from worker_forks import WorkerForks

import mvcr_cli
from mvcr_cli import checkpoint as module
from mvcr_cli import onnx_worker
from mvcr_cli.checkpoint import Checkpoint, load_named, pack, unpack
from mvcr_cli.cli import main
from mvcr_cli.config import ExportConfig, ModelConfig, PredictConfig
from mvcr_cli.data.preprocess import Preprocess
from mvcr_cli.engine.convert import convert
from mvcr_cli.engine.export import onnx_bytes
from mvcr_cli.engine.onnx_predictor import OnnxPredictor, Worker
from mvcr_cli.engine.predict import predict
from mvcr_cli.errors import CheckpointError, ConfigMismatch, DataError
from mvcr_cli.models import TRUNKS, build

Figure = Callable[[str], None]
CONFIG = ModelConfig(
    name="mvcr10n", classes=3, block="basic", depths=(1, 1, 1, 1), width=4, scales=(1.0, 0.5), stem="small", blur=True,
    gem=True, heads=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def good() -> Checkpoint:
    torch.manual_seed(3)
    network = build(CONFIG)
    return Checkpoint(
        config=CONFIG, classes=("a", "b", "c"), preprocess=Preprocess(size=32), tensors=network.state_dict()
    )


@pytest.fixture(scope="module")
def raw(good: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "good.safetensors"
    good.save(path)
    return path.read_bytes()


# Nothing runs


class Evil:
    """Runs when it is unpickled: makes the folder `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def saved(value: object, **more: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **more)
    return buffer.getvalue()


def with_entry(zipped: bytes, name: str, content: bytes) -> bytes:
    """A torch file in which the entry of that name is another."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(zipped)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as new:
        for entry in old.infolist():
            new.writestr(entry, content if entry.filename.endswith(f"/{name}") else old.read(entry))
    return out.getvalue()


def deflated(zipped: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(zipped)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    return out.getvalue()


def external_onnx(location: str) -> bytes:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    graph = helper.make_graph([helper.make_node("Identity", ["w"], ["y"])], "g", [], [output], [tensor])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    helper.set_model_props(model, {"mvcr": json.dumps({"classes": ["a"], "preprocess": Preprocess(size=32).to_dict()})})
    return model.SerializeToString()  # type: ignore[no-any-return]


def poison(folder: Path, raw: bytes) -> Iterator[Path]:
    """Files that run code, leave their folder or grow without end where they are opened carelessly."""
    marker = folder / "PWNED"
    secret = folder / "secret.bin"
    secret.write_bytes(b"\0" * 16)
    (folder / "link.bin").symlink_to(secret)
    os.link(secret, folder / "hard.bin")
    state = {"w": torch.zeros(2, 2)}
    objects = np.array([Evil(marker)], dtype=object)
    array = io.BytesIO()
    np.save(array, objects, allow_pickle=True)
    archive = io.BytesIO()
    np.savez(archive, evil=objects)
    files: dict[str, bytes] = {
        "evil.pt": saved({"model": Evil(marker)}),
        "legacy.pth": saved({"model": Evil(marker)}, _use_new_zipfile_serialization=False),
        "bare.pkl": pickle.dumps(Evil(marker)),
        "protocol0.ckpt": pickle.dumps(Evil(marker), protocol=0),
        "evil.safetensors": saved({"model": Evil(marker)}),
        "evil.onnx": saved({"model": Evil(marker)}),
        "named.safetensors": pickle.dumps(Evil(marker)),
        "module.pt": saved(torch.nn.Linear(2, 2)),
        "needs.pt": with_entry(saved({"a": 1}), "data.pkl", b"\x80\x02cattacker_chosen_package\nThing\n."),
        "bomb.pt": deflated(saved({"w": torch.zeros(1 << 22)})),
        "plain.pt": saved(state),
        "cut.pt": saved(state)[:-100],
        "objects.npy": array.getvalue(),
        "objects.npz": archive.getvalue(),
        "train.cache": pickle.dumps(Evil(marker)),
        "model.yaml": f"!!python/object/apply:os.mkdir ['{marker}']\n".encode(),
        "program.pt2": saved({"model": Evil(marker)}),
        "polyglot.safetensors": raw + saved({"model": Evil(marker)}),
        "polyglot.pt": saved({"model": Evil(marker)}) + raw,
        "dotdot.onnx": external_onnx("../secret.bin"),
        "nested.onnx": external_onnx("sub/../secret.bin"),
        "absolute.onnx": external_onnx(str(secret)),
        "symlink.onnx": external_onnx("link.bin"),
        "hardlink.onnx": external_onnx("hard.bin"),
        "memory.onnx": external_onnx("*/_ORT_MEM_ADDR_/*"),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
        yield folder / name


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def no_network(*_: object) -> NoReturn:
    raise AssertionError("the network is used")  # which is the exit code of a bug


def test_no_command_runs_what_a_file_brings(raw, tmp_path, monkeypatch, capfd, figure):
    """Every subcommand on every file: refused with a code of the contract; nothing written, started or asked for."""
    folder, programs = tmp_path / "files", tmp_path / "bin"
    folder.mkdir()
    programs.mkdir()
    for name in ("pip", "uv", "gs", "sh", "python", "git", "curl"):
        (programs / name).write_text(f"#!/bin/sh\n> {tmp_path}/STARTED\n")
        (programs / name).chmod(0o755)
    files = list(poison(folder, raw))
    data = shapes(tmp_path / "data", images=3)
    for name in ("evil.pt", "train.cache", "objects.npy", "model.yaml"):
        (data / name).write_bytes((folder / name).read_bytes())
        (data.with_suffix(".cache")).write_bytes((folder / "train.cache").read_bytes())
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setattr("socket.socket.connect", no_network)
    monkeypatch.setattr("socket.getaddrinfo", no_network)
    monkeypatch.chdir(folder)
    before = listing(tmp_path)
    tried, codes = 0, set()
    for file in files:
        uses = [["eval", data, "--run", file], ["predict", data / "circle" / "000.png", "--run", file],
                ["predict", file], ["export", "--run", file, "--format", "safetensors"], ["benchmark", "--run", file],
                ["train", data, "--run", tmp_path / "run", "--weights", file, "--model", "mvcr10n"],
                ["train", file, "--run", tmp_path / "run"]]  # fmt: skip
        for argv in uses:
            with pytest.raises(SystemExit) as left:
                main([*map(str, argv), *(["--offline"] if argv[0] in ("train", "predict") else [])])
            tried += 1
            codes.add(left.value.code)
            assert left.value.code in (2, 65, 66, 69, 73, 77, 78), (argv, capfd.readouterr().err)
    assert "Traceback" not in capfd.readouterr().err
    assert listing(tmp_path) == before
    assert not (folder / "PWNED").exists() and not (tmp_path / "STARTED").exists() and not (tmp_path / "run").exists()
    figure(f"{tried} command lines on {len(files)} files: exit codes {sorted(map(int, codes))}, nothing ran")


FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "import_module", "unpickle", "yaml.load", "torch.load", "pickle.load",
    "pickle.loads", "joblib.load", "torch.jit.load", "torch.hub.load", "torch.export.load", "os.system", "os.popen",
    "shelve.open", "marshal.loads", "runpy.run_path", "pd.read_pickle",
}  # fmt: skip
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml", "runpy"}
READS_TORCH_FILES = {"mvcr_cli/torch_worker.py"}  # which is confined
STARTS_PROGRAMS = {"mvcr_cli/confined.py"}
IMPORTS_ITS_OWN_NAMES = {"mvcr_cli/__init__.py"}  # from a table in its source


def test_the_source_has_no_way_to_run_what_a_file_says():
    root, reached = Path(mvcr_cli.__file__).parent, 0
    for path in sorted(root.rglob("*.py")):
        where = str(path.relative_to(root.parent))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                own = called == "import_module" and where in IMPORTS_ITS_OWN_NAMES
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                own |= called == "torch.load" and where in READS_TORCH_FILES and given.get("weights_only") == "True"
                assert called not in FORBIDDEN_CALLS or own, f"{where}:{node.lineno} {called}"
                reached += called == "torch.load"
                assert not any(keyword.arg in ("allow_pickle", "shell") for keyword in node.keywords), where
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):
                names.append(node.module or "")
            assert not FORBIDDEN_MODULES & {name.partition(".")[0] for name in names}, where
            assert "subprocess" not in names or where in STARTS_PROGRAMS, where
            assert not (isinstance(node, ast.ImportFrom) and node.module == "torch" and "load" in names), where
    assert reached == 1  # and has no other name


# Pickles


def test_the_way_out_of_a_pickle_works(tmp_path, monkeypatch):
    """The command that the hint gives makes a file that loads, with the same numbers."""
    monkeypatch.chdir(tmp_path)
    tied = torch.randn(3, 4)
    torch.save({"w": tied.t(), "again": tied, "n": torch.tensor(3)}, "my weights.pt")
    with pytest.raises(CheckpointError, match="pickle") as caught:
        load_named(Path("my weights.pt"))
    command = shlex.split(caught.value.hint.partition(": ")[2])
    assert command[0] == "mvcr"
    with pytest.raises(SystemExit) as left:
        main(command[1:])
    assert left.value.code == 0
    tensors, classes = load_named(Path("my weights.safetensors"))
    assert torch.equal(tensors["w"], tied.t()) and torch.equal(tensors["again"], tied) and classes == ()


def test_no_torch_file_runs_or_opens_anything_when_it_is_converted(raw, tmp_path, monkeypatch, capfd, figure):
    """The whole command on every file of strangers, once each by content: only the state dict comes out of it."""
    folder = tmp_path / "files"
    folder.mkdir()
    files = {path.read_bytes(): path for path in poison(folder, raw)}
    marker = folder / "PWNED"
    files |= {content: folder / name for name, content in {
        "protocol0.pt": with_entry(saved({"a": 1}), "data.pkl", pickle.dumps(Evil(marker), protocol=0)),
        "protocol2.pt": with_entry(saved({"a": 1}), "data.pkl", pickle.dumps(Evil(marker), protocol=2)),
        "half.pt": saved({"w": torch.zeros(9)})[:500],
    }.items()}  # fmt: skip
    monkeypatch.chdir(tmp_path)
    codes: dict[str, int] = {}
    for content, path in files.items():
        path.write_bytes(content)
        with pytest.raises(SystemExit) as left:
            main(["export", "--from-torch", str(path), "--out", "out.safetensors", "--overwrite"])
        codes[path.name] = int(left.value.code or 0)
        out, err = capfd.readouterr()
        if codes[path.name] != 0:
            assert (out, err.count("\nhint: "), err.count("\n")) == ("", 1, 2), err
            assert err.startswith(f"error: {path.name} ")
        assert not marker.exists()
    assert {name: code for name, code in codes.items() if code != 65} == {"plain.pt": 0}
    assert load_named(tmp_path / "out.safetensors")[0].keys() == {"w"}
    assert {path.name for path in tmp_path.iterdir()} == {"files", "out.safetensors"}
    figure(f"{len(codes) - 1} files refused with 65, 1 state dict converted, nothing ran")


BURGLAR = """
import os, resource, socket, sys
import torch
from mvcr_cli import torch_worker
load = torch.load
def burgle(*args, **more):
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0]:
        return load(*args, **more)  # the rehearsal
    ways = {"read": lambda: open(os.devnull), "write": lambda: open(sys.argv[1], "w"), "socket": socket.socket,
            "pipe": os.pipe, "memory": lambda: bytearray(4 << 30), "import": lambda: __import__("this"),
            "limits": lambda: open("/proc/self/limits")}
    for name, way in ways.items():
        try:
            way()
        except (OSError, MemoryError, ImportError):
            print("kept from", name)  # to stderr, for what is printed is no answer
        else:
            print("got", name)
    sys.stdout.flush()
    return load(*args, **more)
torch.load = burgle
torch_worker.main()
"""


def test_the_process_that_reads_a_torch_file_opens_nothing(tmp_path):
    """Whatever the file might make torch do in there; and the state dict comes out all the same."""
    content = saved({"w": torch.ones(2)})
    done = subprocess.run(
        [sys.executable, "-P", "-c", BURGLAR, str(tmp_path / "PWNED")], input=len(content).to_bytes(8, "little") + content,
        capture_output=True, check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    told = done.stderr.decode().split("\n")[:-1]
    assert told == [f"kept from {way}" for way in ("read", "write", "socket", "pipe", "memory", "import", "limits")]
    assert safetensors.torch.load(done.stdout[9:])["w"].tolist() == [1, 1]
    assert done.stdout[8:9] == b"+" and not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".pkl"])
def test_the_content_chooses_the_reader_and_not_the_name(raw, tmp_path, suffix):
    (tmp_path / f"x{suffix}").write_bytes(raw)
    assert Checkpoint.load(tmp_path / f"x{suffix}").classes == ("a", "b", "c")
    (tmp_path / f"y{suffix}").write_bytes(pickle.dumps({"w": 1}, protocol=0))
    with pytest.raises(CheckpointError, match="pickle"):
        load_named(tmp_path / f"y{suffix}")


# Mutants


def reseal(content: bytes) -> bytes:
    """The digest made right again, so that what stands behind it is reached."""
    at = module._DIGEST_AT
    if len(content) < at.stop:
        return content
    return content[: at.start] + module._digest(content[: at.stop], memoryview(content)[at.stop :]) + content[at.stop :]


def words(chance: random.Random, content: bytes) -> bytes:
    """The record of a weights file with one value changed to something that a stranger might put there."""
    _, meta = unpack(content, Path("x"))
    place: Any = meta
    while True:
        key = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if isinstance(place[key], dict | list) and place[key] and chance.random() < 0.8:
            place = place[key]
            continue
        place[key] = chance.choice((None, True, -1, 0, 10**9, 10**400, 1e308, -0.0, "", "a\0", "\ud800", "x" * 10**5, [], {},
                                    [1] * 300, [[[[]]]], {"a": {}}, "..", "\x1b[2J", 0.3, 2**63, ["a"] * 3))  # fmt: skip
        break
    end = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:end])
    header["__metadata__"]["mvcr"] = json.dumps(meta)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content[end:]


def read_all(path: Path) -> None:
    """Both ways into a weights file. The second one's refusal is as good as the first one's."""
    with contextlib.suppress(CheckpointError, ConfigMismatch):
        load_named(path)
    Checkpoint.load(path)


@pytest.mark.parametrize("count", [2000, pytest.param(50_000, marks=pytest.mark.slow)])
def test_mutated_weights_files_give_the_checkpoint_error_and_nothing_else(raw, tmp_path, figure, count):
    """Half as they come, a third with the digest made right again, a sixth with strange values in the record."""
    bare = safetensors.torch.save({"conv1.weight": torch.zeros(4, 3, 3, 3), "fc.bias": torch.zeros(3)})
    state = pack({"model.fc.bias": torch.zeros(3)}, {"step": 3})
    seeds = [raw, bare, state, bytes(saved({"a": 1}))]

    def make(chance: random.Random) -> bytes:
        kind = chance.choice(("as it comes", "as it comes", "as it comes", "resealed", "resealed", "words"))
        if kind == "as it comes":
            return mutate(chance, seeds, head=800)
        return reseal(mutate(chance, [raw, state], head=4000) if kind == "resealed" else words(chance, raw))

    (tmp_path / "good.safetensors").write_bytes(raw)
    read_all(tmp_path / "good.safetensors")  # so that no child has to load what this needs
    found = fuzz(read_all, (CheckpointError, ConfigMismatch), make, count, tmp_path)
    figure(f"{count} mutants, {len(found.faults)} faults, peak {found.peak_mb} MB: {dict(found.results.most_common())}")
    assert found.faults == []
    assert found.peak_mb < 2048
    assert found.results["accepted"] < count / 5


# Mutants of torch files


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerForks]:
    forks = WorkerForks()
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: forks.start())
    yield forks
    forks.close()


class Ended(CheckpointError):
    """A sentence, but because the process died or was stopped."""


STRANGE_VALUES: tuple[Callable[[random.Random], Any], ...] = (
    lambda chance: chance.choice(
        (None, True, -1, 10**400, 1e308, "", "\ud800", b"x" * 10**4, [], {}, (), {1, 2}, ..., 1j)
    ),
    lambda chance: {
        chance.choice(("model", "state_dict", "ema", 1, None, "")): {"w": torch.zeros(2)} for _ in range(3)
    },
    lambda chance: torch.zeros(1).expand(chance.choice((2, 10**4, 2**40))),
    lambda chance: torch.eye(2).to_sparse(),
    lambda chance: torch.zeros(2, dtype=chance.choice((torch.complex64, torch.bool, torch.float8_e4m3fn, torch.int16))),
    lambda chance: torch.full((3,), chance.choice((float("nan"), float("inf"), -1.0))),
    lambda chance: torch.zeros(2, device="meta"),
    lambda chance: torch.nn.Parameter(torch.zeros(chance.choice((0, 1, 1000)))),
    lambda chance: torch.zeros(40)[:: chance.choice((1, 2, 39))],
    lambda chance: [torch.zeros(2)] * 3,
)


def strange(chance: random.Random) -> bytes:
    """A torch file as `torch.save` writes it, of something that is perhaps no state dict."""
    name = chance.choice(
        ("w", "module.w", "bn1.running_var", "__metadata__", "", "\x1b[2J", "a\0b", "x" * 10**5, "é", "\ud800")
    )
    value = chance.choice(STRANGE_VALUES)(chance)
    return saved(chance.choice((value, {name: value}, {name: value, "b": torch.ones(2)}, {"model": {name: value}})))


def torch_mutant(chance: random.Random, seeds: list[bytes]) -> bytes:
    """A quarter as they come; others with right checksums and another pickle, other numbers or values, which are reached."""
    kind = chance.choice(("as it comes", "pickle", "pickle", "pickle", "entry", "strange"))
    if kind == "strange":
        return strange(chance)
    if kind == "as it comes":
        return mutate(chance, seeds)
    seed = chance.choice(seeds)
    with zipfile.ZipFile(io.BytesIO(seed)) as archive:
        names = [name.partition("/")[2] for name in archive.namelist()]
    name = "data.pkl" if kind == "pickle" else chance.choice(names)
    with contextlib.ExitStack() as stack:
        archives = [stack.enter_context(zipfile.ZipFile(io.BytesIO(content))) for content in seeds]
        contents = [archive.read(f"archive/{name}") for archive in archives if f"archive/{name}" in archive.namelist()]
    return with_entry(seed, name, mutate(chance, contents))


@pytest.mark.filterwarnings("ignore:Validating sparse")
@pytest.mark.parametrize("count", [60, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_torch_files_give_the_checkpoint_error_and_nothing_else(tmp_path, workers, figure, count):
    """The conversion without the command line, each file in a confined process of its own."""
    state = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2)).state_dict()
    network = torch.nn.Linear(3, 2)
    seeds = [
        saved(state),
        saved({"epoch": 3, "lr": 0.1, "state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}),
        saved({"model": network.state_dict(), "optimizer": torch.optim.SGD(network.parameters(), momentum=0.9).state_dict()}),
        saved({"a": torch.ones(3).half(), "b": torch.nn.Parameter(torch.ones(2, 2)), "c": torch.arange(4)[1:]}),
        saved(torch.nn.Linear(2, 2)),
    ]  # fmt: skip
    target = tmp_path / "converted.safetensors"

    def read(path: Path) -> None:
        try:
            convert(ExportConfig(from_torch=path, format="safetensors", out=target, overwrite=True))
        except CheckpointError as error:
            if not (error.message.isprintable() and error.message.startswith("mutant.pt")):
                raise ValueError(f"not a sentence: {error.message!r}") from error
            if "it was stopped" in error.message or "took down" in error.message:
                raise Ended(error.message) from error
            raise
        load_named(target)

    def make(chance: random.Random) -> bytes:
        return torch_mutant(chance, seeds)

    for seed in seeds[:-1]:
        (tmp_path / "mutant.pt").write_bytes(seed)
        read(tmp_path / "mutant.pt")
    found = fuzz(read, (CheckpointError,), make, count, tmp_path, suffix=".pt")
    figure(f"{count} mutants, {len(found.faults)} faults: {dict(found.results.most_common())}")
    assert found.faults == []
    assert count / 20 < found.results["accepted"] < count * 0.6
    assert found.results["Ended"] == 0


# ONNX


@pytest.fixture(scope="module")
def exported(good: Checkpoint) -> bytes:
    return onnx_bytes(good)


def changed(exported: bytes, change: Callable[[Any], object]) -> bytes:
    model = onnx.load_from_string(exported)
    change(model)
    return model.SerializeToString()  # type: ignore[no-any-return]


def facts(model: Any, **change: Any) -> None:
    props = {prop.key: prop.value for prop in model.metadata_props}
    helper.set_model_props(model, {**props, "mvcr": json.dumps({**json.loads(props["mvcr"]), **change})})


def nested_external(model: Any) -> None:
    """External data in a graph inside an attribute of a node of a graph inside an attribute."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    inner = helper.make_graph([helper.make_node("Constant", [], ["c"], value=tensor)], "inner", [], [])
    condition = helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    outer = helper.make_graph([condition], "outer", [], [])
    model.graph.node.append(helper.make_node("If", ["x"], ["z"], then_branch=outer, else_branch=outer))


def memory_bomb(model: Any) -> None:
    """One number, tiled to a terabyte when the session is made or run."""
    del model.graph.node[:]
    del model.graph.initializer[:]
    model.graph.initializer.append(helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0]))
    model.graph.initializer.append(helper.make_tensor("times", TensorProto.INT64, [1], [2**38]))
    model.graph.node.append(helper.make_node("Tile", ["one", "times"], ["probabilities"]))


def endless_loop(model: Any) -> None:
    """A loop of 2^62 turns."""
    del model.graph.node[:]
    del model.graph.initializer[:]
    value, flag = helper.make_tensor_value_info, TensorProto.BOOL
    body = helper.make_graph(
        [helper.make_node("Identity", ["on"], ["still"]), helper.make_node("Identity", ["x"], ["next"])], "body",
        [value("i", TensorProto.INT64, []), value("on", flag, []), value("x", TensorProto.FLOAT, [1])],
        [value("still", flag, []), value("next", TensorProto.FLOAT, [1])],
    )  # fmt: skip
    model.graph.initializer.append(helper.make_tensor("turns", TensorProto.INT64, [], [2**62]))
    model.graph.initializer.append(helper.make_tensor("go", flag, [], [True]))
    model.graph.initializer.append(helper.make_tensor("x", TensorProto.FLOAT, [1], [1.0]))
    model.graph.node.append(helper.make_node("Loop", ["turns", "go", "x"], ["probabilities"], body=body))


STRANGE: dict[str, Callable[[Any], object]] = {
    "training graph": lambda model: model.training_info.add(),
    "function": lambda model: model.functions.add(name="f", domain=""),
    "foreign domain of a node": lambda model: model.graph.node.add(op_type="Relu", domain="com.evil"),
    "external data without the flag": lambda model: model.graph.initializer[0].external_data.add(
        key="location", value="x"
    ),
    "external data in depth": nested_external,
    "no output": lambda model: model.graph.ClearField("output"),
    "fewer numbers than classes": lambda model: facts(model, classes=["a", "b", "c", "d"]),
    "classes twice": lambda model: facts(model, classes=["a", "a", "b"]),
    "classes no list": lambda model: facts(model, classes={"a": 1}),
    "size no number": lambda model: facts(model, preprocess={"size": "32"}),
    "facts no record": lambda model: helper.set_model_props(model, {"mvcr": "[1]"}),
    "facts of 80 MB": lambda model: helper.set_model_props(model, {"mvcr": '"' + "x" * (80 << 20) + '"'}),
    "memory": memory_bomb,
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_strange_onnx_file_is_refused_in_one_sentence(exported, tmp_path, name):
    path = tmp_path / "x.onnx"
    path.write_bytes(changed(exported, STRANGE[name]))
    picture = shapes(tmp_path / "data", images=1) / "circle" / "000.png"
    with pytest.raises(CheckpointError) as caught:
        list(predict(PredictConfig(inputs=(str(picture),), run=path, workers=1)))
    assert caught.value.exit_code == 65
    assert caught.value.message.isprintable() and caught.value.message.startswith("x.onnx ")


def test_an_onnx_file_that_never_ends_is_stopped(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_worker, "SECONDS", 8)
    path = tmp_path / "x.onnx"
    path.write_bytes(changed(exported, endless_loop))
    picture = shapes(tmp_path / "data", images=1) / "circle" / "000.png"
    with pytest.raises(CheckpointError, match="longer than 8 s"):
        list(predict(PredictConfig(inputs=(str(picture),), run=path, workers=1)))


def test_a_crash_of_the_runtime_is_a_sentence(exported):
    import signal

    predictor = OnnxPredictor.from_bytes(exported, "x.onnx")
    os.kill(predictor._graph._process.pid, signal.SIGSEGV)
    for _ in range(2):  # another thread may ask as well
        with pytest.raises(CheckpointError, match="SIGSEGV"):
            predictor.probabilities([np.zeros((8, 8, 3), np.uint8)])


def test_an_answer_without_end_is_told_from_a_crash(exported, monkeypatch):
    predictor = OnnxPredictor.from_bytes(exported, "x.onnx")
    monkeypatch.setattr(onnx_worker, "LONGEST_ANSWER", 8)
    with pytest.raises(CheckpointError, match="an answer may have"):
        predictor.probabilities([np.zeros((8, 8, 3), np.uint8)])


def test_no_pixels_are_an_answer_of_the_file_and_no_bug(exported):
    predictor = OnnxPredictor.from_bytes(exported, "x.onnx")
    with pytest.raises(CheckpointError, match=r"^x\.onnx "):
        predictor.probabilities([np.zeros((0, 8, 3), np.uint8)])


def test_the_process_that_runs_a_file_is_confined(exported, monkeypatch):
    """It may open neither file nor socket, knows no secrets of the environment, and is gone with its predictor."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    predictor = OnnxPredictor.from_bytes(exported, "x.onnx")
    process = predictor._graph._process
    limits = Path(f"/proc/{process.pid}/limits")
    if not limits.exists():
        pytest.skip("needs /proc")
    rows = {line[:26].strip(): line[26:].split()[0] for line in limits.read_text().splitlines()[1:]}
    assert rows["Max open files"] == "0" and rows["Max file size"] == "0" and rows["Max core file size"] == "0"
    assert rows["Max data size"] != "unlimited" and rows["Max cpu time"] != "unlimited"
    assert b"hf_secret" not in Path(f"/proc/{process.pid}/environ").read_bytes()
    assert os.readlink(f"/proc/{process.pid}/cwd") == "/"
    assert "torch" not in Path(f"/proc/{process.pid}/maps").read_text()
    del predictor
    assert process.wait(10) is not None


def test_modules_in_the_current_folder_are_not_those_that_are_imported(exported, tmp_path, monkeypatch):
    for name in ("onnx", "onnxruntime", "numpy", "json", "mvcr_cli"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'PWNED')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    OnnxPredictor.from_bytes(exported, "x.onnx")
    assert not (tmp_path / "PWNED").exists()


def test_an_answer_that_is_no_answer_is_refused():
    for message in (b"", b"\x08\x01", os.urandom(1000)):
        with pytest.raises(CheckpointError):
            Worker(message, "x.onnx")


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutated_onnx_files_give_the_checkpoint_error_and_nothing_else(exported, tmp_path, figure, count):
    """In the process that would run them: a crash there is a sentence here, and is counted."""

    def read(path: Path) -> None:
        content = path.read_bytes()
        onnx_worker.inspect(content)
        onnx_worker._session(content)

    found = fuzz(
        read, (onnx_worker.Refused,), lambda chance: mutate(chance, [exported]), count, tmp_path, suffix=".onnx"
    )
    figure(f"{count} mutants, peak {found.peak_mb} MB: {dict(found.results.most_common())}")
    assert not [fault for fault in found.faults if not fault.startswith("SIG")]


# Labels


def test_labels_of_an_evaluation_go_by_name(tmp_path):
    """Folders that lack a class, have one more, or stand in another order, after training on three."""
    from mvcr_cli.config import EvalConfig
    from mvcr_cli.engine.evaluate import evaluate

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TRUNKS, "10n", dataclasses.replace(TRUNKS["10n"], width=8))
        data = shapes(tmp_path / "data", classes=("circle", "square", "triangle"), images=6)
        trained(data, tmp_path / "run", epochs=1, batch=4)
    lacks = shapes(tmp_path / "lacks", classes=("triangle", "square"), images=2, first=40)
    report, results, _ = evaluate(EvalConfig(data=lacks, run=tmp_path / "run", workers=1))
    assert report.missing_classes == ("circle",)
    assert {(Path(result.path).parent.name, result.label) for result in results} == {
        ("square", "square"), ("triangle", "triangle"),
    }  # fmt: skip
    extra = shapes(tmp_path / "extra", classes=("square",), images=2, first=40)
    (extra / "Circle").mkdir()
    (extra / "Circle" / "x.png").write_bytes((extra / "square" / "040.png").read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match="Circle"):
        evaluate(EvalConfig(data=extra, run=tmp_path / "run", workers=1))
    report, results, _ = evaluate(EvalConfig(data=extra, run=tmp_path / "run", workers=1, ignore_extra_classes=True))
    assert report.images == 2 and {result.label for result in results} == {"square"}


def test_a_weights_file_of_a_terabyte_is_refused_unread(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 100))
    os.truncate(path, 1 << 40)
    for read in (Checkpoint.load, load_named):
        with pytest.raises(CheckpointError, match="limit"):
            read(path)


def test_the_bytes_of_a_weights_file_are_the_same_in_every_process(raw):
    assert hashlib.sha256(raw).hexdigest() == hashlib.sha256(pack(*unpack(raw, Path("x")))).hexdigest()
