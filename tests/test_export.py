"""An exported file does what its run does, on every size of picture, or it is not written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from PIL import Image
from small_run import NOWHERE, needs_proc

from mvcr_cli.checkpoint import Checkpoint
from mvcr_cli.config import ExportConfig, PredictConfig
from mvcr_cli.data.folder import scan
from mvcr_cli.data.preprocess import Preprocess
from mvcr_cli.engine import export as engine
from mvcr_cli.engine.evaluate import split_record, validation_split
from mvcr_cli.engine.export import CHECK_SIZES, compare, export
from mvcr_cli.engine.onnx_predictor import OnnxPredictor
from mvcr_cli.engine.predict import predict
from mvcr_cli.engine.views import first_view
from mvcr_cli.errors import CannotCreate, CheckFailed, CheckpointError
from mvcr_cli.models import build, config_for
from mvcr_cli.paths import write_json
from mvcr_cli.records import Prediction

SIDE = 48


def checkpoint(name: str = "mvcr10n", fit: str = "pad") -> Checkpoint:
    torch.manual_seed(7)
    config = config_for(name, 2, stem="small")
    network = build(config)
    for parameter in network.parameters():  # no weight at its neutral value, so that every part counts
        torch.nn.init.normal_(parameter, 0.1, 0.1)
    preprocess = Preprocess(size=SIDE, fit=fit)  # type: ignore[arg-type]
    return Checkpoint(config=config, classes=("circle", "square"), preprocess=preprocess, tensors=network.state_dict())


@pytest.fixture
def run(tmp_path: Path, photo_folder: Callable[..., Path]) -> Path:
    """A run folder with random weights and real files in its split."""
    folder = tmp_path / "runs" / "r"
    (folder / "weights").mkdir(parents=True)
    index = scan(photo_folder("data", images=6, size=(70, 50)))
    write_json(folder / "split.json", split_record((), index.samples, index.classes))
    write_json(folder / "config.json", {})
    checkpoint().save(folder / "weights" / "best.safetensors")
    return folder


def odd_pictures() -> Iterator[Image.Image]:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8))
    for size in CHECK_SIZES:
        yield noise.resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("format_", ["onnx", "torch", "safetensors"])
@pytest.mark.parametrize("fit", ["pad", "stretch"])
def test_every_format_agrees_on_ten_odd_sizes(format_: str, fit: str) -> None:
    made = checkpoint(fit=fit)
    _, runner = engine._FORMATS[format_](made)
    parity = compare(made, runner, odd_pictures())
    assert parity.same == len(parity.sizes) == 10
    assert parity.difference <= 1e-4


@pytest.mark.parametrize("name", ["resnet10n", "cnn"])
def test_models_of_one_view_are_exported_too(name: str) -> None:
    made = checkpoint(name)
    _, runner = engine._FORMATS["onnx"](made)
    assert compare(made, runner, list(odd_pictures())[:3]).difference <= 1e-4


def test_onnx_file_is_self_contained_and_described(run: Path) -> None:
    report = export(ExportConfig(run=run))
    assert [int(size.split("x")[0]) for size in report.sizes] == sorted(
        int(size.split("x")[0]) for size in report.sizes
    )
    model = onnx.load(report.file, load_external_data=False)
    assert Path(report.file).stat().st_size == pytest.approx(report.megabytes * 1e6)
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [18]
    facts = json.loads({prop.key: prop.value for prop in model.metadata_props}["mvcr"])
    assert facts["classes"] == ["circle", "square"]
    assert facts["preprocess"]["size"] == SIDE
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in shape] == ["N", "H", "W", 3]
    assert report.images == 12


def test_predict_gives_the_same_record_from_the_exported_file(run: Path) -> None:
    report = export(ExportConfig(run=run))
    inputs = (str(run.parent.parent / "data"),)
    own = list(predict(PredictConfig(inputs=inputs, run=run)))
    theirs = list(predict(PredictConfig(inputs=inputs, run=Path(report.file))))
    assert len(own) == 12
    for a, b in zip(own, theirs, strict=True):
        assert isinstance(a, Prediction)
        assert isinstance(b, Prediction)
        assert (a.path, a.label, a.width, a.height) == (b.path, b.label, b.width, b.height)
        assert a.probability == pytest.approx(b.probability, abs=1e-4)


def test_batch_of_equal_sizes_is_each_picture_alone(run: Path) -> None:
    import onnxruntime

    raw, _ = engine._FORMATS["onnx"](checkpoint())
    session = onnxruntime.InferenceSession(raw, providers=["CPUExecutionProvider"])
    batch = np.random.default_rng(1).integers(0, 256, (3, 33, 57, 3), np.uint8)
    together = session.run(None, {"images": batch})[0]
    alone = [session.run(None, {"images": picture[None]})[0][0] for picture in batch]
    np.testing.assert_allclose(together, np.stack(alone), atol=1e-5)


def test_the_name_of_a_run_may_have_a_dot(run: Path) -> None:
    dotted = run.rename(run.parent / "leaves-0.5")
    assert Path(export(ExportConfig(run=dotted, format="safetensors")).file).name == "leaves-0.5.safetensors"


def test_the_run_in_the_current_folder_names_the_file(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    assert export(ExportConfig(run=Path("."), format="safetensors")).file == "r.safetensors"


@pytest.mark.parametrize(("limit", "expected"), [(12, range(12)), (7, (0, 1, 3, 5, 6, 8, 10)), (50, range(12))])
def test_the_checked_pictures_are_spread_over_all(run: Path, limit: int, expected: Sequence[int]) -> None:
    made = checkpoint()
    every = validation_split(run, made.classes)
    assert len(every) == 12
    assert engine._checked_samples(run, made, limit) == tuple(every[place] for place in expected)


def test_failed_check_writes_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(made: Checkpoint) -> tuple[bytes, engine.Runner]:
        return b"x", lambda pixels: np.array([0.5, 0.5])

    monkeypatch.setitem(engine._FORMATS, "onnx", wrong)
    with pytest.raises(CheckFailed, match="no file was written"):
        export(ExportConfig(run=run))
    assert not list(run.glob("*.onnx"))


def test_existing_file_is_kept(run: Path) -> None:
    target = run / "mine.onnx"
    target.write_bytes(b"mine")
    with pytest.raises(CannotCreate):
        export(ExportConfig(run=run, out=target))
    assert target.read_bytes() == b"mine"
    assert export(ExportConfig(run=run, out=target, overwrite=True)).file == str(target)
    assert target.read_bytes() != b"mine"


@pytest.mark.parametrize("name", ["data/x.onnx", "data/circle/x.onnx", "link/x.onnx"])
def test_nothing_is_exported_into_the_data_of_the_run(run: Path, name: str) -> None:
    place = run.parent.parent
    (place / "link").symlink_to("data")
    write_json(run / "config.json", {"train": {"data": str(place / "data")}})
    with pytest.raises(CannotCreate, match="inside the data folder") as caught:
        export(ExportConfig(run=run, out=place / name))
    assert caught.value.hint == "choose an --out outside of it"
    assert not list(place.rglob("x.onnx"))


@needs_proc
def test_a_place_that_takes_no_file_is_refused_before_the_work(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "compare", None)
    out = NOWHERE.with_suffix(".onnx")
    with pytest.raises(CannotCreate, match=f"^cannot create {out}: No such file"):
        export(ExportConfig(run=run, out=out))


def test_safetensors_holds_the_plain_trunk(run: Path) -> None:
    report = export(ExportConfig(run=run, format="safetensors"))
    tensors = safetensors.torch.load_file(report.file)
    assert {"conv1.weight", "layer1.0.bn1.running_mean", "fc.weight"} <= set(tensors)


def external(raw: bytes) -> bytes:
    model = onnx.load_from_string(raw)
    tensor = model.graph.initializer[0]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../secret.bin"
    return model.SerializeToString()  # type: ignore[no-any-return]


def foreign_domain(raw: bytes) -> bytes:
    model = onnx.load_from_string(raw)
    model.opset_import.add(domain="evil", version=1)
    return model.SerializeToString()  # type: ignore[no-any-return]


def stranger(raw: bytes) -> bytes:
    model = onnx.load_from_string(raw)
    del model.metadata_props[:]
    return model.SerializeToString()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "spoil", [external, foreign_domain, stranger, lambda raw: raw[: len(raw) // 2], lambda raw: b"hello"]
)
def test_foreign_onnx_files_are_refused(spoil: Callable[[bytes], bytes]) -> None:
    raw, _ = engine._FORMATS["onnx"](checkpoint())
    with pytest.raises(CheckpointError):
        OnnxPredictor.from_bytes(spoil(raw), "x.onnx")


def test_the_first_view_alone_is_exported_as_a_plain_network():
    made = checkpoint()
    plain = first_view(made)
    network, whole = plain.network(), made.network()
    whole.look = "1"
    x = made.preprocess.tensor(next(odd_pictures()))[None]
    with torch.inference_mode():
        assert torch.equal(network(x), whole(x))
    raw, runner = engine._FORMATS["onnx"](plain)
    assert compare(plain, runner, list(odd_pictures())[:3]).difference <= 1e-4
    assert len(raw) < len(engine._FORMATS["onnx"](made)[0])


@pytest.mark.parametrize("scales", [(2.0, 1.0, 0.5), (2**0.5, 1.0, 0.5**0.5)])
def test_views_that_are_only_looked_through_are_exported(scales):
    made = checkpoint()
    config = replace(made.config, scales=scales, taught=(1.0,), surest=True)
    torch.manual_seed(1)
    made = replace(made, config=config, tensors=build(config).state_dict())
    _, runner = engine._FORMATS["onnx"](made)
    parity = compare(made, runner, odd_pictures())
    assert parity.same == len(parity.sizes) == 10
    assert parity.difference <= 1e-4
