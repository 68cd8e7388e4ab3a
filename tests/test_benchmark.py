"""The benchmark's laws: what is measured, against what, and that the numbers mean what they say. Never how fast."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mvcr_cli.config import PRESET_NAMES, BenchmarkConfig
from mvcr_cli.data.preprocess import Preprocess
from mvcr_cli.engine import benchmark as engine
from mvcr_cli.engine import measure, reading
from mvcr_cli.engine.benchmark import DEFAULT_MODELS, Subject, benchmark, choose
from mvcr_cli.engine.contenders import EagerContender, Entry, Machine, plain_config, untrained
from mvcr_cli.engine.measure import Times, interleaved, peak_memory, refusing_out_of_memory, restart_resident_peak
from mvcr_cli.engine.session import Session
from mvcr_cli.errors import ConfigMismatch, DataError, InputMissing, UsageError, WorkerFailed
from mvcr_cli.models import build, config_for, parameter_count, plain_twin
from mvcr_cli.models.mvcr import MultiScaleResNet
from mvcr_cli.paths import to_json
from mvcr_cli.records import BenchmarkRow, LoaderReport, record

CPU = torch.device("cpu")
SMALL = BenchmarkConfig(
    models=("mvcr10n",),
    sizes=(32,),
    batches=(1, 2),
    rounds=2,
    threads=1,
    workers=1,
    device="cpu",
    onnx=False,
    classes=3,
)

QUICK = replace(SMALL, models=("cnn",))
OF_A_RUN = replace(
    SMALL, models=(), sizes=BenchmarkConfig.sizes, classes=BenchmarkConfig.classes, batches=(1,), rounds=1
)


@pytest.fixture(scope="module")
def rows() -> list[BenchmarkRow]:
    return [row for row in benchmark(replace(SMALL, sizes=(32, 48))) if isinstance(row, BenchmarkRow)]


def test_every_model_size_and_batch_has_a_row_followed_by_its_twin(rows: list[BenchmarkRow]) -> None:
    kinds = [("mvcr10n", "all"), ("mvcr10n", "1"), ("mvcr10n", "auto"), ("resnet10n", "all")]
    expected = [(*kind, size, batch) for size in (32, 48) for batch in (1, 2) for kind in kinds]
    assert [(row.model, row.views, row.size_px, row.batch) for row in rows] == expected


def test_looking_once_costs_what_a_plain_resnet_does_and_stopping_early_less(rows: list[BenchmarkRow]) -> None:
    for every, once, auto, plain in zip(*(rows[kind::4] for kind in range(4)), strict=True):
        assert plain.mac <= once.mac < 1.01 * plain.mac + 1e5  # blur
        assert 1.2 < every.mac / once.mac < 1.35
        assert auto.mac < 0.3 * once.mac


def test_only_a_model_with_a_twin_is_compared(rows: list[BenchmarkRow]) -> None:
    for row in rows:
        if plain_twin(row.model):
            assert row.relative_time is not None
            assert row.relative_time > 0
        else:
            assert row.relative_time is None


def test_a_plain_resnet_of_several_views_is_not_compared_with_itself(tmp_path: Path) -> None:
    config = replace(config_for("resnet10n", 2), scales=(1.0, 0.5))
    untrained(config, Preprocess(size=96)).save(tmp_path / "two.safetensors")
    found = benchmark(replace(OF_A_RUN, run=tmp_path / "two.safetensors", train=False))
    assert [row.relative_time for row in found if isinstance(row, BenchmarkRow)] == [None] * 3


def test_auto_is_counted_as_its_first_view_alone() -> None:
    config = replace(config_for("mvcr10n", 2), scales=(2.0, 1.0, 0.5), detail=True)
    entry = Entry.of(untrained(config, Preprocess(size=256)), "auto")
    plain = Entry.of(untrained(config_for("resnet10n", 2), Preprocess(size=64)))  # detail halves every view
    assert plain.mac < entry.mac < 1.05 * plain.mac + 1e5


def test_a_step_of_a_network_that_doubts_is_timed_with_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    forward = MultiScaleResNet.forward_views
    monkeypatch.setattr(MultiScaleResNet, "forward_views", lambda self, x: (seen.append(len(x)), forward(self, x))[1])
    machine = Machine(CPU, torch.float32, torch.float32, 1)
    for made in ({}, {"settings": {"unsure": 0.3}}):
        checkpoint = replace(untrained(config_for("mvcr10n", 2), Preprocess(size=64)), made=made)
        EagerContender.ready(Entry.of(checkpoint), 4, machine, trains=True).train()
    assert seen[-1] == 6 and 4 in seen


def test_speeds_follow_from_the_times(rows: list[BenchmarkRow]) -> None:
    for row in rows:
        assert row.forward_images_per_second == pytest.approx(1000 * row.batch / row.forward_p50_ms)
        assert row.forward_p95_ms >= row.forward_p50_ms > 0
        if row.train_p50_ms is not None:
            assert row.train_images_per_second == pytest.approx(1000 * row.batch / row.train_p50_ms)


def test_a_training_step_is_timed_where_training_would_take_the_batch(rows: list[BenchmarkRow]) -> None:
    assert {row.batch: row.train_p50_ms is not None for row in rows} == {1: False, 2: True}
    untimed = benchmark(replace(QUICK, batches=(2,), train=False))
    assert all(isinstance(row, BenchmarkRow) and row.train_p50_ms is None for row in untimed)


def test_steps_are_timed_in_what_training_takes_and_forwards_in_what_evaluation_does(monkeypatch) -> None:
    seen: list[tuple[bool, torch.dtype]] = []
    step, forward = Session.step, EagerContender.forward

    def watched_step(self: Session, *given: Any) -> torch.Tensor:
        seen.append((True, self.dtype))
        return step(self, *given)

    def watched_forward(self: EagerContender) -> None:
        seen.append((False, self.machine.dtype))
        forward(self)

    monkeypatch.setattr(Session, "step", watched_step)
    monkeypatch.setattr(EagerContender, "forward", watched_forward)
    for has_bf16, precision, expected in (
        (True, "auto", ("fp32", "bf16")), (False, "auto", ("fp32", "fp32")), (True, "fp32", ("fp32", "fp32")),
        (False, "bf16", ("bf16", "bf16")),
    ):  # fmt: skip
        monkeypatch.setattr("mvcr_cli.engine.cpu_has_bf16", lambda has_bf16=has_bf16: has_bf16)
        seen.clear()
        (row,) = benchmark(replace(QUICK, batches=(2,), rounds=1, precision=precision))
        assert isinstance(row, BenchmarkRow)
        assert (row.precision, row.train_precision) == expected
        assert {(trains, engine.PRECISION_NAMES[dtype]) for trains, dtype in seen} == {
            (False, expected[0]), (True, expected[1])
        }  # fmt: skip


def test_the_verdict_on_reading_says_in_what_was_trained(photo_folder: Callable[..., Path], monkeypatch) -> None:
    monkeypatch.setattr("mvcr_cli.engine.cpu_has_bf16", lambda: True)
    folder = photo_folder(images=2)
    *_, report = benchmark(replace(QUICK, data=folder, batches=(2,), rounds=1, train=False, precision="auto"))
    assert isinstance(report, LoaderReport)
    assert report.train_precision == "bf16"


def test_records_are_json(rows: list[BenchmarkRow]) -> None:
    for row in rows:
        assert json.loads(to_json(record(row))) == record(row)


def test_resnet18_at_224_has_the_published_count() -> None:
    config = replace(SMALL, models=("resnet18",), sizes=(224,), batches=(1,), rounds=1, classes=1000, train=False)
    (row,) = benchmark(config)
    assert isinstance(row, BenchmarkRow)
    assert (row.mac, row.parameters) == (1_814_073_344, 11_689_512)


def test_counting_on_the_meta_device_is_counting() -> None:
    config = config_for("mvcr10n", 3)
    assert Entry.of(untrained(config, Preprocess(size=32))).parameters == parameter_count(build(config))


@pytest.mark.parametrize("name", [name for name in PRESET_NAMES if plain_twin(name)])
def test_the_plain_config_is_the_preset_of_the_twin(name: str) -> None:
    twin = plain_twin(name)
    assert twin is not None
    assert plain_config(config_for(name, 7, stem="small")) == config_for(twin, 7, stem="small")


def test_a_twin_that_is_named_as_well_is_measured_once() -> None:
    names = ("resnet18", "mvcr18", "cnn", "mvcr18")
    assert [subject.name for subject in choose(replace(SMALL, models=names))] == ["mvcr18", "cnn"]


def test_the_default_models_are_for_no_models_and_no_run() -> None:
    assert [subject.name for subject in choose(BenchmarkConfig())] == list(DEFAULT_MODELS)


def test_small_pictures_are_timed_with_the_stem_that_training_gives_them() -> None:
    subject = Subject("mvcr10n", (80, 96), 3)
    assert [[entry.checkpoint.config.stem for entry in subject.entries(size)] for size in subject.sizes] == [
        ["small"] * 4,
        ["imagenet"] * 4,
    ]


def test_a_run_is_timed_as_it_is_beside_its_twin(tmp_path: Path) -> None:
    config = config_for("mvcr10n", 5, scales=(1.0, 0.5, 0.25))
    weights = tmp_path / "best.safetensors"
    untrained(config, Preprocess(size=40)).save(weights)
    own, twin = benchmark(replace(OF_A_RUN, run=weights))
    assert isinstance(own, BenchmarkRow)
    assert isinstance(twin, BenchmarkRow)
    assert (own.model, own.size_px, own.parameters) == ("mvcr10n", 40, parameter_count(build(config)))
    assert (twin.model, twin.size_px) == ("resnet10n", 40)
    assert own.mac > twin.mac


def test_onnxruntime_rows_stand_beside_the_eager_ones() -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    measured = list(benchmark(replace(SMALL, batches=(2,), precision="bf16", onnx=True, train=False)))
    assert all(isinstance(row, BenchmarkRow) for row in measured)
    found = [
        (row.model, row.backend, row.precision)
        for row in measured
        if isinstance(row, BenchmarkRow) and row.views == "all"
    ]
    assert found == [
        ("mvcr10n", "eager", "bf16"),
        ("resnet10n", "eager", "bf16"),
        ("mvcr10n", "onnxruntime", "fp32"),
        ("resnet10n", "onnxruntime", "fp32"),
    ]
    assert all(row.relative_time for row in measured if isinstance(row, BenchmarkRow) and row.model == "mvcr10n")


def test_a_missing_onnxruntime_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "find_spec", lambda name: None)
    said: list[str] = []
    measured = list(benchmark(replace(QUICK, batches=(1,), onnx=True), say=said.append))
    assert len(measured) == 1
    assert sum("onnxruntime" in line for line in said) == 1


def test_the_announced_total_is_the_number_of_rows() -> None:
    totals: list[int | None] = []

    def track(items, *, total, label):  # type: ignore[no-untyped-def]
        totals.append(total)
        return iter(items)

    measured = list(
        benchmark(replace(SMALL, models=("mvcr10n", "cnn"), batches=(1,), rounds=1, train=False), track=track)
    )
    assert totals == [len(measured)] == [5]


def test_the_callers_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    measuring = benchmark(replace(QUICK, batches=(1,), threads=before + 1))
    next(measuring)
    assert torch.get_num_threads() == before + 1
    measuring.close()  # type: ignore[attr-defined]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("train", [True, False])
def test_reading_is_compared_with_training(photo_folder: Callable[..., Path], train: bool) -> None:
    folder = photo_folder(images=5)
    (folder / "circle" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n, and then nothing")
    said: list[str] = []
    *_, report = benchmark(replace(QUICK, data=folder, batches=(4,), train=train), say=said.append)
    assert isinstance(report, LoaderReport)
    assert report.images == 10
    assert min(report.decode_images_per_second, report.loader_images_per_second, report.train_images_per_second) > 0
    slower = report.loader_images_per_second < report.train_images_per_second
    assert report.bottleneck == ("loader" if slower else "network")
    assert any("1 of the pictures" in line for line in said)
    assert json.loads(to_json(record(report)))["record"] == "loader"


def test_a_large_folder_is_sampled_evenly(photo_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PICTURES", 4)
    labels = Counter(sample.label for sample in reading.sample_pictures(photo_folder(images=5)))
    assert labels == {0: 2, 1: 2}


def test_what_cannot_be_measured_is_refused_before_anything_is(tmp_path: Path) -> None:
    missing = next(name for name in ("cuda", "mps") if not getattr(torch, name).is_available())
    with pytest.raises(ConfigMismatch, match=missing):
        next(benchmark(replace(QUICK, device=missing)))  # type: ignore[arg-type]
    with pytest.raises(ConfigMismatch, match="fp16"):
        next(benchmark(replace(QUICK, precision="fp16")))
    with pytest.raises(InputMissing):
        next(benchmark(replace(QUICK, run=tmp_path / "nothing")))
    with pytest.raises(InputMissing):
        next(benchmark(replace(QUICK, data=tmp_path / "nothing")))
    (tmp_path / "a.onnx").write_bytes(b"")
    with pytest.raises(ConfigMismatch, match="exported"):
        next(benchmark(replace(QUICK, run=tmp_path / "a.onnx")))


def test_a_folder_of_broken_pictures_is_bad_data(tmp_path: Path) -> None:
    (tmp_path / "data" / "cat").mkdir(parents=True)
    (tmp_path / "data" / "cat" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n, and then nothing")
    with pytest.raises(DataError, match="none of the pictures"):
        list(benchmark(replace(QUICK, batches=(2,), data=tmp_path / "data")))


def test_calls_take_turns() -> None:
    called: list[str] = []
    times = interleaved([lambda: called.append("a"), lambda: called.append("b")], 3, CPU)
    assert "".join(called[-6:]) == "ababab"
    assert [len(taken.wall) for taken in times] == [3, 3]


def test_the_ratio_on_a_cpu_is_of_processor_time() -> None:
    busy, waiting = Times(wall=[1.0, 1.0], processor=[0.4, 0.4]), Times(wall=[9.0, 9.0], processor=[0.2, 0.2])
    assert busy.over(waiting, CPU) == 2
    assert Times(wall=[3.0], processor=[0.0]).over(Times(wall=[1.0], processor=[0.0]), CPU) == 3


def test_peak_memory_counts_what_the_work_needed_and_nothing_before() -> None:
    if not restart_resident_peak():
        pytest.skip("this system cannot restart the count")
    before = torch.ones(64 << 18)  # 64 MiB
    _, peak = peak_memory(CPU, lambda: torch.ones(32 << 18).sum().item())
    assert before[0] == 1
    assert 31 < peak < 48  # the kernel counts in batches of pages


def test_memory_of_the_whole_process_is_said_to_be_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "restart_resident_peak", lambda: False)
    monkeypatch.setattr(measure, "restart_resident_peak", lambda: False)
    said: list[str] = []
    (row,) = benchmark(replace(QUICK, batches=(1,)), say=said.append)
    assert isinstance(row, BenchmarkRow)
    assert row.peak_memory_mb > 50
    assert any("whole process" in line for line in said)


@pytest.mark.parametrize("threads", [0, -1, 1025])
def test_an_impossible_number_of_threads_is_refused(threads: int) -> None:
    with pytest.raises(UsageError, match="--threads"):
        replace(SMALL, threads=threads)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("CUDA out of memory."), torch.OutOfMemoryError("out of memory")]
)
def test_out_of_memory_has_a_way_out(error: Exception) -> None:
    with pytest.raises(WorkerFailed, match="mvcr18, 224 px") as failed, refusing_out_of_memory("mvcr18, 224 px", CPU):
        raise error
    assert "--batch" in failed.value.hint


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shape"), refusing_out_of_memory("here", CPU):
        raise RuntimeError("shape mismatch")


def test_more_memory_than_there_is_is_refused_and_not_granted() -> None:
    resource = pytest.importorskip("resource")
    if not Path("/proc/meminfo").exists():
        pytest.skip("this system does not tell how much memory is free")
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    with refusing_out_of_memory("here", CPU):
        assert resource.getrlimit(resource.RLIMIT_DATA) != limits
    with pytest.raises(WorkerFailed), refusing_out_of_memory("here", CPU):
        torch.empty(1 << 48)
    assert resource.getrlimit(resource.RLIMIT_DATA) == limits


def test_a_batch_that_cannot_fit_ends_in_an_error() -> None:
    with pytest.raises(WorkerFailed, match="batch 65536"):
        list(benchmark(replace(QUICK, sizes=(8192,), batches=(65_536,))))
