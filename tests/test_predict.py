"""Prediction: one record an input, in the order of the inputs, whatever becomes of it."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_run import shapes

from mvcr_cli.checkpoint import Checkpoint
from mvcr_cli.config import ModelConfig, PredictConfig
from mvcr_cli.data.images import load_rgb
from mvcr_cli.data.preprocess import Preprocess
from mvcr_cli.engine.predict import expand, predict
from mvcr_cli.errors import CheckpointError, InputMissing, UsageError
from mvcr_cli.models import build
from mvcr_cli.records import Prediction, Problem

CLASSES = ("circle", "square", "triangle")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained network whose verdicts differ from picture to picture."""
    torch.manual_seed(0)
    config = ModelConfig(
        name="mvcr10n",
        classes=3,
        block="basic",
        depths=(1, 1, 1, 1),
        width=8,
        scales=(1.0, 0.5),
        stem="small",
        gem=True,
    )
    network = build(config, exact=True)
    torch.nn.init.normal_(network.fc.weight, 0, 1.0)
    path = tmp_path_factory.mktemp("run") / "model.safetensors"
    checkpoint = Checkpoint(
        config=config, classes=CLASSES, preprocess=Preprocess(size=48), tensors=network.state_dict()
    )
    checkpoint.save(path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes(tmp_path_factory.mktemp("in") / "pictures", images=4)


def run(weights: Path, *inputs: str | Path, stdin: Any = (), **options: Any) -> list[Prediction | Problem]:
    config = PredictConfig(inputs=tuple(map(str, inputs)), run=weights, device="cpu", **({"workers": 1} | options))
    return list(predict(config, stdin=stdin))


def paths(items: list[Prediction | Problem]) -> list[str]:
    return [item.path for item in items]


def test_every_record_is_a_verdict_of_the_network(weights, pictures):
    checkpoint = Checkpoint.load(weights)
    network = checkpoint.network()
    items = run(weights, pictures)
    assert len({item.probability for item in items}) == 8
    for item in items:
        with torch.inference_mode():
            row = network(checkpoint.preprocess.tensor(load_rgb(item.path))[None])[0].double().softmax(-1).numpy()
        assert isinstance(item, Prediction)
        assert {label.label: pytest.approx(label.probability, abs=1e-6) for label in item.topk} == {
            name: float(p) for name, p in zip(CLASSES, row, strict=True)
        }
        ranked = [label.probability for label in item.topk]
        assert ranked == sorted(ranked, reverse=True)
        assert math.fsum(ranked) == pytest.approx(1, abs=1e-12)
        assert (item.label, item.probability) == (item.topk[0].label, item.topk[0].probability)
        assert (item.width, item.height) == (48, 48)


@pytest.mark.parametrize("topk", [1, 2, 3, 50])
def test_topk_is_capped_by_the_classes(weights, pictures, topk):
    assert {len(item.topk) for item in run(weights, pictures, topk=topk)} == {min(topk, 3)}


@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("workers", [0, 1, 4])
def test_records_come_in_the_order_of_the_inputs_bad_ones_in_their_place(weights, pictures, tmp_path, batch, workers):
    good = sorted(map(str, pictures.rglob("*.png")))
    cut = tmp_path / "cut.png"
    cut.write_bytes(Path(good[0]).read_bytes()[:200])
    text = tmp_path / "text.jpg"
    text.write_text("no picture")
    inputs = [good[3], str(cut), good[1], good[1], "nowhere.png", good[0], str(text), *good]
    items = run(weights, *inputs, batch=batch, workers=workers)
    assert paths(items) == inputs
    bad = {item.path: item.code for item in items if isinstance(item, Problem)}
    assert bad == {str(cut): "corrupt", "nowhere.png": "missing", str(text): "unknown_format"}
    assert len({item.probability for item in items if item.path == good[1]}) <= 2  # equal but for the batch


def test_folders_are_walked_in_sorted_order_with_problems_inside(weights, pictures, tmp_path):
    root = shutil.copytree(pictures, tmp_path / "root")
    (root / "circle" / "001b.png").write_text("no picture")
    (root / "circle" / "notes.txt").write_text("text")
    (root / ".hidden").mkdir()
    shutil.copyfile(root / "circle" / "000.png", root / ".hidden" / "x.png")
    items = run(weights, root, root / "square" / "000.png")
    expected = sorted(str(path) for path in root.rglob("*") if path.is_file() and ".hidden" not in path.parts)
    assert paths(items) == [*expected, str(root / "square" / "000.png")]
    codes = {Path(item.path).name: item.code for item in items if isinstance(item, Problem)}
    assert codes == {"001b.png": "unknown_format", "notes.txt": "not_an_image"}


def test_patterns_mean_files_and_one_that_matches_none_is_a_record(weights, pictures):
    items = run(weights, pictures / "circle" / "00[12].png", pictures / "nothing*", pictures / "**")
    good = sorted(map(str, pictures.rglob("*.png")))
    assert paths(items) == [*good[1:3], str(pictures / "nothing*"), *good]
    assert [item.code for item in items if isinstance(item, Problem)] == ["missing"]


def test_an_address_is_told_that_none_is_fetched(weights):
    addresses = ("http://a.b/c.png", "https://a.b/c?d=*", "s3://a/b.png")
    gone, *found = run(weights, "gone.png", *addresses)
    assert [(item.path, item.code) for item in found] == [(address, "missing") for address in addresses]
    assert {item.detail for item in found} == {"addresses are not fetched; download the picture first"}
    assert "link to nothing" in gone.detail


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(weights, pictures, tmp_path):
    odd = tmp_path / "x[1]*.png"
    shutil.copyfile(pictures / "circle" / "000.png", odd)
    items = run(weights, odd)
    assert paths(items) == [str(odd)]
    assert isinstance(items[0], Prediction)


def test_names_on_stdin_are_answered_one_by_one(weights, pictures):
    good = sorted(pictures.rglob("*.png"))
    answered: list[str] = []

    def names() -> Iterator[bytes]:
        for number, path in enumerate(good):
            assert len(answered) == number  # each answer is out before the next name is read
            yield os.fsencode(path) + (b"\r\n" if number % 2 else b"\n")
        yield b"\n"
        yield b"nowhere.png"

    config = PredictConfig(inputs=("-",), run=weights, device="cpu", workers=2)
    for item in predict(config, stdin=names()):
        answered.append(item.path)
    assert answered == [*map(str, good), "nowhere.png"]


def test_a_name_of_any_bytes_is_only_a_name(weights, pictures, tmp_path):
    names = [b"caf\xe9.png", b"new\nline.png", b"\x1b[31mred.png", b"-rf.png", b"%s{0}.png", b"a" * 250 + b".png"]
    for name in names:
        shutil.copyfile(pictures / "circle" / "000.png", os.path.join(os.fsencode(tmp_path), name))
    items = run(weights, tmp_path)
    assert [os.path.basename(os.fsencode(item.path)) for item in items] == sorted(names)
    assert all(isinstance(item, Prediction) for item in items)
    assert [item.code for item in run(weights, "nul\0.png", "a" * 5000, "")] == ["missing", "not_a_file", "missing"]


def test_a_slow_consumer_is_given_the_first_record_at_once(weights, pictures):
    """The first picture is judged alone, so it does not wait for a whole batch to be read."""
    read: list[str] = []
    config = PredictConfig(inputs=(str(pictures),), run=weights, device="cpu", workers=1, batch=3)
    items = predict(config, track=lambda entries, **_: (read.append(e) or e for e in entries))
    next(items)
    assert len(read) <= 2 * 3 + 1
    items.close()


def test_sizes_are_those_of_the_upright_picture_even_when_it_is_decoded_smaller(weights, tmp_path):
    large = Image.fromarray(np.random.default_rng(0).integers(0, 256, (900, 1200, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    large.save(tmp_path / "turned.jpg", exif=exif)
    (item,) = run(weights, tmp_path / "turned.jpg")
    assert (item.width, item.height) == (900, 1200)


def test_without_a_run_and_without_a_network_there_is_a_way_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MVCR_HOME", str(tmp_path / "cache"))
    with pytest.raises(InputMissing) as caught:
        list(predict(PredictConfig(inputs=("x.png",), device="cpu", offline=True)))
    assert "mvcr train" in caught.value.hint


def test_weights_that_are_none_are_refused_before_any_record(pictures, tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no weights")
    with pytest.raises(CheckpointError):
        next(iter(predict(PredictConfig(inputs=(str(pictures),), run=broken, device="cpu"))))


def test_expanding_reads_stdin_only_where_it_is_named(tmp_path):
    assert list(expand(["a.png", "-", "b.png"], [b"one.png\n", b"", b"two.png"])) == [
        "a.png",
        "one.png",
        "two.png",
        "b.png",
    ]


def test_progress_knows_how_many_files_there_will_be(weights, pictures):
    files = sorted(map(str, (pictures / "circle").iterdir()))[:2]
    totals: list[int | None] = []

    def track(items, *, total, label):
        totals.append(total)
        return iter(items)

    for inputs in (files, [*files, "gone.png"], [*files, str(pictures)], [*files, "*.png"], [*files, "-"]):
        list(predict(PredictConfig(inputs=tuple(inputs), run=weights, device="cpu", workers=1), track=track))
    assert totals == [2, 3, None, None, None]


@pytest.mark.parametrize("change", [{"views": "auto"}, {"explain": Path("why")}])
def test_what_an_exported_file_cannot_do_is_a_wrong_option(change, tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"")
    with pytest.raises(UsageError):
        list(predict(PredictConfig(inputs=("a.png",), run=tmp_path / "a.onnx", **change)))


def test_a_folder_without_pictures_or_permission_is_one_record_and_the_rest_goes_on(
    weights, pictures, tmp_path, monkeypatch
):
    for name in ("empty", "locked", "gone"):
        (tmp_path / name).mkdir()
    read = os.scandir

    def refuse(folder: str) -> Any:
        if os.fspath(folder).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        if os.fspath(folder).endswith("gone"):
            raise FileNotFoundError(2, "No such file or directory")
        return read(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    items = run(weights, tmp_path / "empty", tmp_path / "locked", tmp_path / "gone", pictures / "circle")
    assert [(Path(item.path).name, item.code) for item in items if isinstance(item, Problem)] == [
        ("empty", "missing"),
        ("locked", "permission"),
        ("gone", "missing"),
    ]
    assert len(items) == 3 + 4
