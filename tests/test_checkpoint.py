"""A weights file gives back exactly what was saved, or is refused; it never runs code."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from mvcr_cli import checkpoint as module
from mvcr_cli.checkpoint import Checkpoint, load_bare, pack, unpack
from mvcr_cli.config import ModelConfig
from mvcr_cli.data.preprocess import Preprocess
from mvcr_cli.engine.measure import peak_memory, restart_resident_peak
from mvcr_cli.errors import CheckpointError, ConfigMismatch, InputMissing, MvcrError
from mvcr_cli.models import build

CONFIG = ModelConfig(
    name="mvcr10n", classes=3, block="basic", depths=(1, 1, 1, 1), width=4, scales=(1.0, 0.5), stem="small", blur=True,
    gem=True, heads=True,
)  # fmt: skip
CLASSES = ("\x1b[31mcat", "../dog", "=cmd()")


def made() -> Checkpoint:
    torch.manual_seed(3)
    network = build(CONFIG)
    network.train()(torch.randn(4, 3, 32, 32))  # statistics that are not those of a new network
    return Checkpoint(
        config=CONFIG, classes=CLASSES, preprocess=Preprocess(size=32), tensors=network.state_dict(), made={"step": 7}
    )


@pytest.fixture(scope="module")
def good() -> Checkpoint:
    return made()


@pytest.fixture(scope="module")
def raw(good: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "good.safetensors"
    good.save(path)
    return path.read_bytes()


def written(folder: Path, content: bytes, name: str = "x.safetensors") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


@torch.inference_mode()
def test_save_and_load_give_the_same_bits(good, tmp_path):
    path = tmp_path / "w.safetensors"
    good.save(path)
    again = Checkpoint.load(path)
    assert (again.config, again.classes, again.preprocess, again.made) == (CONFIG, CLASSES, good.preprocess, good.made)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(good.network()(x), again.network()(x))
    assert not again.network().training
    assert os.stat(path).st_mode & 0o044  # others may read it, as any file


@pytest.mark.parametrize("layers", [{}, {"sacs": (3, 4), "detail": True, "sift": True}])
def test_a_network_of_a_file_is_not_filled_with_chance_first(layers):
    config = dataclasses.replace(CONFIG, **layers)
    tensors = build(config).state_dict()
    before = torch.get_rng_state()
    network = Checkpoint(config=config, classes=CLASSES, preprocess=Preprocess(size=32), tensors=tensors).network()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(tensor.data_ptr() == tensors[name].data_ptr() for name, tensor in network.state_dict().items())


def test_equal_content_gives_equal_bytes(raw, tmp_path):
    made().save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == raw


def test_other_tools_can_read_the_tensors(good, raw):
    tensors = safetensors.torch.load(raw)
    assert tensors.keys() == good.tensors.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in good.tensors.items())


def test_every_flipped_byte_is_noticed(raw, tmp_path):
    """The length, the header, the padding, the digest and the data: no byte may change unseen."""
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    chance = random.Random(0)
    places = [*range(120), *range(header - 12, header + 12), len(raw) - 1]
    places += [chance.randrange(header) for _ in range(150)] + [chance.randrange(header, len(raw)) for _ in range(50)]
    path = tmp_path / "flipped.safetensors"
    for place in places:
        flipped = bytearray(raw)
        flipped[place] ^= 1 << chance.randrange(8)
        for read in (Checkpoint.load, load_bare):
            with pytest.raises(CheckpointError):
                read(written(tmp_path, bytes(flipped)))
    for end in (0, 1, 7, 8, 100, header, len(raw) - 1):
        with pytest.raises(CheckpointError):
            Checkpoint.load(written(tmp_path, raw[:end]))
    with pytest.raises(CheckpointError):
        Checkpoint.load(written(tmp_path, raw + b"PK\3\4"))
    assert not path.exists()


def test_padding_that_changes_hands_is_noticed(tmp_path):
    """A header one space shorter has its data one byte earlier; nothing but the digest can tell."""
    tensors = {"a": torch.zeros(8, dtype=torch.uint8)}
    whole = next(pack(tensors, {"n": "x" * n}) for n in range(16) if pack(tensors, {"n": "x" * n})[:-8].endswith(b"  "))
    length = struct.unpack("<Q", whole[:8])[0]
    with pytest.raises(CheckpointError):
        unpack(struct.pack("<Q", length - 1) + whole[8:], tmp_path)


Change = Callable[[dict[str, torch.Tensor], dict[str, Any]], None]


def repacked(good: Checkpoint, change: Change) -> bytes:
    """A file whose digest is right and whose content is `change`d."""
    tensors = {name: tensor.clone() for name, tensor in good.tensors.items()}
    meta = {
        "format_version": module.FORMAT_VERSION, "model": json.loads(json.dumps(CONFIG.to_dict())),
        "classes": list(CLASSES), "preprocess": Preprocess(size=32).to_dict(), "made": {},
    }  # fmt: skip
    change(tensors, meta)
    return pack(tensors, meta)


LIES: dict[str, Change] = {
    "nan": lambda t, m: t["conv1.weight"].view(-1)[3:4].fill_(float("nan")),
    "infinite": lambda t, m: t["fc.bias"].fill_(float("inf")),
    "negative variance": lambda t, m: t["bn1.running_var"][0:1].fill_(-1),
    "negative private variance": lambda t, m: t["bn1.scales.0.running_var"][0:1].fill_(-1),
    "other shape": lambda t, m: t.update({"fc.weight": torch.zeros(5, 32), "fc.bias": torch.zeros(5)}),
    "extra tensor": lambda t, m: t.update({"evil.weight": torch.zeros(1)}),
    "missing tensor": lambda t, m: t.pop("fc.bias"),
    "half precision": lambda t, m: t.update({"fc.bias": t["fc.bias"].half()}),
    "integers": lambda t, m: t.update({"fc.bias": t["fc.bias"].long()}),
    "no classes": lambda t, m: m.pop("classes"),
    "classes no list": lambda t, m: m.update(classes={"a": 1}),
    "classes twice": lambda t, m: m.update(classes=["a", "a", "b"]),
    "too few classes": lambda t, m: m.update(classes=["a"]),
    "classes no text": lambda t, m: m.update(classes=[1, 2, 3]),
    "empty class": lambda t, m: m.update(classes=["", "b", "c"]),
    "class with NUL": lambda t, m: m.update(classes=["a\0", "b", "c"]),
    "class of 10 MB": lambda t, m: m.update(classes=["x" * 10_000_000, "b", "c"]),
    "class no Unicode": lambda t, m: m.update(classes=["\udce9", "b", "c"]),
    "no version": lambda t, m: m.pop("format_version"),
    "version no number": lambda t, m: m.update(format_version="1"),
    "no model": lambda t, m: m.pop("model"),
    "model no record": lambda t, m: m.update(model=[1, 2]),
    "unknown model field": lambda t, m: m["model"].update(surprise=1),
    "endless model": lambda t, m: m["model"].update(depths=[1, 1, 1, 10**9]),
    "model of text": lambda t, m: m["model"].update(depths="1111"),
    "model of fractions": lambda t, m: m["model"].update(width=4.0),
    "no preprocessing": lambda t, m: m.pop("preprocess"),
    "preprocessing no record": lambda t, m: m.update(preprocess="pad"),
    "size no number": lambda t, m: m["preprocess"].update(size="32"),
    "no deviation": lambda t, m: m["preprocess"].update(std=[0, 1, 1]),
    "mean no list": lambda t, m: m["preprocess"].update(mean=3),
}


def test_the_unchanged_repacked_file_loads(good, tmp_path):
    assert Checkpoint.load(written(tmp_path, repacked(good, lambda tensors, meta: None))).classes == CLASSES


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_contradicts_itself_is_refused(good, tmp_path, lie):
    path = written(tmp_path, repacked(good, LIES[lie]))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.load(path)
    assert len(caught.value.message) < 600
    assert caught.value.message.isprintable()


def test_a_newer_format_asks_for_the_newer_program(good, tmp_path):
    path = written(tmp_path, repacked(good, lambda t, m: m.update(format_version=999, mvcr="9.8.7")))
    with pytest.raises(ConfigMismatch) as caught:
        Checkpoint.load(path)
    assert "9.8.7" in caught.value.hint


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def header(value: object, data: bytes = b"") -> bytes:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(start: int, end: int, shape: tuple[int, ...] = (4,)) -> dict[str, Any]:
    return {"dtype": "U8", "shape": list(shape), "data_offsets": [start, end]}


FOREIGN: dict[str, bytes] = {
    "nothing": b"",
    "text": b"hello, this is no weights file",
    "huge header": struct.pack("<Q", 1 << 62) + b"{}",
    "negative header": b"\xff" * 8 + b"{}",
    "no json": header(b"{not json"),
    "no object": header([1, 2]),
    "deep json": header(b'{"__metadata__":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001),
    "overlap": header({"a": tensor(0, 4), "b": tensor(2, 6)}, b"123456"),
    "hole": header({"a": tensor(0, 4), "b": tensor(6, 10)}, b"1234567890"),
    "twice": header(b'{"a":%s,"a":%s}' % ((json.dumps(tensor(0, 4)).encode(),) * 2), b"1234"),
    "overflow": header({"a": tensor(0, 4, (2**40, 2**40))}, b"1234"),
    "metadata no text": header({"__metadata__": {"mvcr": 1}, "a": tensor(0, 4)}, b"1234"),
    "metadata no object": header({"__metadata__": [], "a": tensor(0, 4)}, b"1234"),
    "no digest": header({"__metadata__": {"mvcr": "{}"}, "a": tensor(0, 4)}, b"1234"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_weights_file_is_refused(tmp_path, name):
    path = written(tmp_path, FOREIGN[name])
    for read in (Checkpoint.load, load_bare):
        with pytest.raises(CheckpointError):
            read(path)


def test_a_refusal_needs_little_time_and_memory(good, tmp_path, figure):
    """Whatever the file claims: less than 100 MB for each. Time is printed, not bounded."""
    if not restart_resident_peak():
        pytest.skip("needs /proc")
    refused = []
    for number, content in enumerate([*FOREIGN.values(), *(repacked(good, lie) for lie in LIES.values())]):
        path, began = written(tmp_path, content, f"{number}.safetensors"), time.process_time()
        error, megabytes = peak_memory(torch.device("cpu"), lambda path=path: refusal(path))
        refused.append((megabytes, time.process_time() - began))
        assert isinstance(error, CheckpointError)
    largest, slowest = (max(values) for values in zip(*refused, strict=True))
    figure(f"{len(refused)} files refused, at most {slowest:.2f} s of CPU and {largest:.0f} MiB each")
    assert largest < 100


def refusal(path: Path) -> MvcrError | None:
    try:
        Checkpoint.load(path)
    except MvcrError as error:
        return error
    return None


@pytest.mark.parametrize("name", ["evil.pt", "evil.safetensors"])
@pytest.mark.parametrize("form", ["zip", "legacy", "bare"])
def test_pickles_are_refused_and_never_run(tmp_path, name, form):
    path, marker = tmp_path / name, tmp_path / "PWNED"
    if form == "bare":
        path.write_bytes(pickle.dumps(Evil(marker)))
    else:
        torch.save({"model": Evil(marker)}, path, _use_new_zipfile_serialization=form == "zip")
    for read in (Checkpoint.load, load_bare):
        with pytest.raises(CheckpointError, match="pickle") as caught:
            read(path)
        assert caught.value.hint.endswith(f"mvcr export --from-torch {path}")
    assert not marker.exists()


@pytest.mark.parametrize("length", [640, 896, 1152, 1408, 0x4B50])
def test_a_header_length_that_looks_like_a_pickle_is_none(tmp_path, length):
    text = json.dumps({"a": tensor(0, 4)}).encode().ljust(length)
    assert load_bare(written(tmp_path, struct.pack("<Q", length) + text + b"1234"))["a"].tolist() == [49, 50, 51, 52]


def test_bare_weights_say_what_they_are_for(tmp_path):
    path = written(tmp_path, safetensors.torch.save({"fc.bias": torch.zeros(3).half()}))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.load(path)
    assert "--weights" in caught.value.hint
    assert load_bare(path)["fc.bias"].dtype == torch.float32


def test_what_is_not_there_is_missing_and_what_is_no_file_never_blocks(tmp_path):
    for read in (Checkpoint.load, load_bare):
        with pytest.raises(InputMissing) as caught:
            read(tmp_path / "none.safetensors")
        assert caught.value.hint == "check the path"
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path in (tmp_path, tmp_path / "pipe.safetensors"):
        with pytest.raises(CheckpointError):
            Checkpoint.load(path)


def test_numbers_that_json_has_not_are_refused_when_writing(good, tmp_path):
    broken = Checkpoint(config=CONFIG, classes=CLASSES, preprocess=good.preprocess, tensors=good.tensors,
                        made={"loss": float("nan")})  # fmt: skip
    with pytest.raises(ValueError, match="JSON"):
        broken.save(tmp_path / "w.safetensors")
    assert not list(tmp_path.iterdir())
