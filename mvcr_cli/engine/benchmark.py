"""Benchmark: speed, memory and size of models, each beside the plain ResNet of the same depth, and of the reading.

A model, in each way to look through its views, and its plain twin have the same trunk, stem and classes and are timed
by turns in one loop. Presets are timed as `mvcr train` builds them from scratch at each size, a run as it is. A
training step is the one that training takes (`Session.step`: normalisation, all views, loss, backward, clipping,
fused AdamW, weight average), in the precision that it takes, and, like training, needs two pictures. A forward takes
normalised float pictures in eager mode, and in onnxruntime, where preprocessing is part of the graph, uint8 pictures.
A network that zooms is given the candidates that were cut out of a picture, ranks them and looks at the best, or is given
the tiles that cover it; searching the picture is not part of that.
What times and memory mean is said in `mvcr_cli.engine.measure`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch

from mvcr_cli.checkpoint import Checkpoint
from mvcr_cli.config import BenchmarkConfig, ModelConfig
from mvcr_cli.data.folder import Sample
from mvcr_cli.data.preprocess import Preprocess
from mvcr_cli.engine import (
    PRECISION_NAMES,
    Say,
    Track,
    find_weights,
    pick_device,
    say_nothing,
    silent,
)
from mvcr_cli.engine.contenders import EagerContender, Entry, Machine, OnnxContender, looks_of, plain_config, untrained
from mvcr_cli.engine.evaluate import tile_reader
from mvcr_cli.engine.measure import Times, interleaved, peak_memory, refusing_out_of_memory, restart_resident_peak
from mvcr_cli.engine.prepare import stem_for
from mvcr_cli.engine.reading import reading_speeds, sample_pictures
from mvcr_cli.models import config_for, plain_twin
from mvcr_cli.paths import counted, display_name
from mvcr_cli.records import BenchmarkRow, LoaderReport

DEFAULT_MODELS = ("mvcr14n", "mvcr18")
LEAST_TRAINING_BATCH = 2


def benchmark(config: BenchmarkConfig, *, track: Track = silent,
              say: Say = say_nothing) -> Iterator[BenchmarkRow | LoaderReport]:  # fmt: skip
    """One row for each model, size, batch and backend, the plain twin's after its model's; with `data`, a `LoaderReport`.

    Raises:
        ConfigMismatch: the device or precision is not there, or the run is an exported file.
        WorkerFailed: out of memory.
        MvcrError: the run or the data cannot be used.
    """
    device = pick_device(config.device)
    machine = Machine.of(device, config.precision, config.threads)
    subjects = choose(config, say)
    samples = sample_pictures(config.data) if config.data else ()
    bench = Bench(config, machine, say)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(machine.threads)
    try:
        bench.begin()
        rows: list[BenchmarkRow] = []
        for row in track(bench.rows(subjects), total=bench.row_count(subjects), label="benchmarking"):
            rows.append(row)
            yield row
        if samples:
            yield bench.loader(subjects[0], samples, rows)
    finally:
        torch.set_num_threads(threads_before)


@dataclass(frozen=True)
class Subject:
    """A preset by name, or a run by its checkpoint; and the sizes in pixels at which it is timed."""

    name: str
    sizes: tuple[int, ...]
    classes: int
    run: Checkpoint | None = None

    def entries(self, size: int) -> list[Entry]:
        """The model in each way to look through its views, and then its plain twin when it has one."""
        own = self.run or untrained(self.config(size), Preprocess(size=size))
        plain = plain_config(own.config)
        twin = [] if plain is None else [Entry.of(untrained(plain, own.preprocess))]
        return [Entry.of(own, look) for look in looks_of(own.config, size)] + twin

    def config(self, size: int) -> ModelConfig:
        return self.run.config if self.run else config_for(self.name, self.classes, stem=stem_for(size))

    @property
    def zooms(self) -> bool:
        return self.run is not None and self.run.config.zoom is not None


def choose(config: BenchmarkConfig, say: Say = say_nothing) -> list[Subject]:
    """The run and the named models, each once; a plain ResNet that is another's twin comes with that one."""
    subjects = []
    if config.run is not None:
        path = find_weights(config.run)
        run = Checkpoint.load(path)
        say(f"run: {display_name(path)}, {run.config.name} at its own {run.preprocess.size} px{_tiles_text(run)}")
        subjects.append(Subject(run.config.name, (run.preprocess.size,), run.config.classes, run))
    names = config.models or (() if subjects else DEFAULT_MODELS)
    twins = {plain_twin(name) for name in names}
    sizes = tuple(dict.fromkeys(config.sizes))
    return subjects + [Subject(name, sizes, config.classes) for name in dict.fromkeys(names) if name not in twins]


@dataclass(frozen=True)
class Bench:
    """What all rows share."""

    config: BenchmarkConfig
    machine: Machine
    say: Say

    @property
    def batches(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(self.config.batches))

    @property
    def onnx(self) -> bool:
        return self.config.onnx and self.machine.device.type == "cpu" and _has_onnxruntime()

    def exports(self, subject: Subject) -> bool:
        """Whether it is timed in onnxruntime, too; a network that zooms is several graphs."""
        return self.onnx and not subject.zooms

    def begin(self) -> None:
        """Say under which conditions is measured, and load what the first network would be charged for."""
        device, threads, rounds = self.machine.device.type, self.machine.threads, self.config.rounds
        self.say(f"torch {torch.__version__} on {device}, threads: {threads}, medians of {counted(rounds, 'round')}")
        if self.config.onnx and device == "cpu" and not self.onnx:
            self.say('onnxruntime is not installed and left out; to add it: pip install "mvcr[onnx]"')
        if device == "cpu" and not restart_resident_peak():
            self.say("memory is the peak of the whole process so far: this system cannot tell that of one network")
        smallest = Entry.of(untrained(config_for("cnn", 2), Preprocess(size=32)))
        EagerContender.worked(smallest, LEAST_TRAINING_BATCH, self.machine, trains=True).forward()
        if self.onnx:
            (graph,) = _graphs([smallest])
            OnnxContender.worked(graph, smallest.size, LEAST_TRAINING_BATCH, self.machine)

    def row_count(self, subjects: Sequence[Subject]) -> int:
        rows = 0
        for subject in subjects:
            twins = 0 if plain_twin(subject.name) is None else 1
            for size in subject.sizes:
                eager = len(looks_of(subject.config(size), size)) + twins
                rows += eager + (1 + twins if self.exports(subject) else 0)
        return rows * len(self.batches)

    def rows(self, subjects: Sequence[Subject]) -> Iterator[BenchmarkRow]:
        for subject in subjects:
            for size in subject.sizes:
                entries = subject.entries(size)
                exported = [entry for entry in entries if entry.look == "all"]
                graphs = _graphs(exported) if self.exports(subject) else []
                for batch in self.batches:
                    what = f"{subject.name}, {size} px, batch {batch}"
                    with refusing_out_of_memory(what, self.machine.device):
                        rows = self._eager(entries, batch)
                    yield from rows
                    if graphs:
                        with refusing_out_of_memory(what, self.machine.device):
                            rows = self._onnxruntime(exported, graphs, batch)
                        yield from rows

    def _eager(self, entries: list[Entry], batch: int) -> list[BenchmarkRow]:
        trains = self.config.train and batch >= LEAST_TRAINING_BATCH
        make = partial(EagerContender.worked, batch=batch, machine=self.machine)
        contenders, memory = [], []
        for entry in entries:
            ready = partial(make, entry, trains=trains and entry.look == "all")
            contender, peak = peak_memory(self.machine.device, ready)
            contender.network.eval()
            contenders.append(contender)
            memory.append(peak)
        forward = interleaved([contender.forward for contender in contenders], self.config.rounds, self.machine.device)
        taught = [contender for contender in contenders if contender.session is not None]
        steps = iter(self._training(taught) if taught else [])
        times = [None if contender.session is None else next(steps) for contender in contenders]
        return self._rows("eager", entries, batch, forward, memory, times)

    def _training(self, contenders: list[EagerContender]) -> list[Times]:
        for contender in contenders:
            contender.network.train()
        return interleaved([contender.train for contender in contenders], self.config.rounds, self.machine.device)

    def _onnxruntime(self, entries: list[Entry], graphs: list[bytes], batch: int) -> list[BenchmarkRow]:
        make = partial(OnnxContender.worked, size=entries[0].size, batch=batch, machine=self.machine)
        made = [peak_memory(self.machine.device, partial(make, graph)) for graph in graphs]
        forward = interleaved([contender.forward for contender, _ in made], self.config.rounds, self.machine.device)
        return self._rows("onnxruntime", entries, batch, forward, [peak for _, peak in made], None)

    def _rows(self, backend: str, entries: list[Entry], batch: int, forward: list[Times], memory: list[float],
              steps: list[Times | None] | None) -> list[BenchmarkRow]:  # fmt: skip
        """One row an entry, compared with the plain twin where the last one is that."""
        rows = []
        for index, entry in enumerate(entries):
            times, step = forward[index], None if steps is None else steps[index]
            has_twin = entries[-1].name == plain_twin(entry.name)
            row = BenchmarkRow(
                model=entry.name,
                views=entry.look,
                backend=backend,
                device=self.machine.device.type,
                precision=PRECISION_NAMES[self.machine.dtype] if backend == "eager" else "fp32",
                size_px=entry.size,
                batch=batch,
                parameters=entry.parameters,
                mac=entry.mac,
                forward_p50_ms=times.p50_ms,
                forward_p95_ms=times.p95_ms,
                forward_images_per_second=times.per_second(batch),
                train_precision=None if step is None else PRECISION_NAMES[self.machine.train_dtype],
                train_p50_ms=None if step is None else step.p50_ms,
                train_images_per_second=None if step is None else step.per_second(batch),
                peak_memory_mb=memory[index],
                relative_time=times.over(forward[-1], self.machine.device) if has_twin else None,
            )
            rows.append(row)
        return rows

    def loader(self, subject: Subject, samples: Sequence[Sample], rows: Sequence[BenchmarkRow]) -> LoaderReport:
        """Reading against the training of the first model at its first size and the largest batch."""
        entry = subject.entries(subject.sizes[0])[0]
        batch = max(LEAST_TRAINING_BATCH, *self.batches)
        timed = {(row.model, row.size_px, row.batch): row.train_images_per_second for row in reversed(rows)}
        speed = timed.get((entry.name, entry.size, batch))
        if speed is None:
            with refusing_out_of_memory(f"{entry.name}, {entry.size} px, batch {batch}", self.machine.device):
                contender = EagerContender.ready(entry, batch, self.machine, trains=True)
                speed = self._training([contender])[0].per_second(batch)
        zoom = tile_reader(entry.checkpoint.network(), entry.checkpoint.preprocess, 0)
        read = reading_speeds(samples, entry.checkpoint.preprocess, batch, self.config.workers, self.say, zoom)
        return LoaderReport(
            images=read.images,
            decode_images_per_second=read.decode,
            loader_images_per_second=read.loader,
            train_images_per_second=speed,
            train_precision=PRECISION_NAMES[self.machine.train_dtype],
            bottleneck="loader" if read.loader < speed else "network",
        )


def _tiles_text(run: Checkpoint) -> str:
    zoom = run.config.zoom
    if zoom is None:
        return ""
    tiles = f"{zoom.tiles}" if zoom.covers else f"{zoom.tiles} of {zoom.candidates}"
    return f" and {tiles} tiles of {zoom.tile_px} px; its several graphs are not timed in onnxruntime"


def _has_onnxruntime() -> bool:
    return find_spec("onnx") is not None and find_spec("onnxruntime") is not None


def _graphs(entries: list[Entry]) -> list[bytes]:
    from mvcr_cli.engine.export import onnx_bytes

    return [onnx_bytes(entry.checkpoint) for entry in entries]
