"""Training: a generator of reports, one an epoch and one at the end.

Nothing random is state. The order of pictures, their augmentation, dropout and mixing are functions of (seed, epoch,
step, picture), so a state holds tensors and a few numbers, and a run goes on from any step bit for bit as if
undisturbed.
"""

from __future__ import annotations

import itertools
import json
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvcr_cli import __version__
from mvcr_cli.checkpoint import Checkpoint
from mvcr_cli.config import ModelConfig, TrainConfig
from mvcr_cli.data.loader import PixelCache, Step, TrainingReader, epoch_order, evaluation_batches
from mvcr_cli.data.preprocess import Preprocess
from mvcr_cli.engine import (
    Say,
    Stop,
    Track,
    available_cores,
    default_workers,
    never,
    peak_rss_mb,
    pick_device,
    pick_precision,
    say_nothing,
    silent,
)
from mvcr_cli.engine.clock import Clock
from mvcr_cli.engine.evaluate import infer, split_record, summarise
from mvcr_cli.engine.loss import class_weights
from mvcr_cli.engine.optim import WeightAverage, make_optimiser
from mvcr_cli.engine.prepare import Prepared, announce, default_model, fit_settings, prepare, stem_for
from mvcr_cli.engine.rundir import RunDirectory
from mvcr_cli.engine.schedule import lr_factor, size_at
from mvcr_cli.engine.session import Session
from mvcr_cli.engine.starting import Start, starting_weights
from mvcr_cli.errors import CannotCreate, ConfigMismatch, DataError
from mvcr_cli.models import build, config_for, load_trunk, useful_scales
from mvcr_cli.paths import display_name, to_json, write_json
from mvcr_cli.records import EpochReport, EvalReport, TrainReport, record

VALIDATION_SHARE = 1 / 10  # of the time, at most, when the clock decides
EVALUATION_BATCH = 64
# Settings that do not change the result; they may differ when a run is resumed, and stay out of the weights file.
_FREE = frozenset({"data", "val", "run", "resume", "started", "workers", "threads", "cache_mb", "dry_run", "offline",
                   "strict", "save_every", "device", "follow_links"})  # fmt: skip


def train(config: TrainConfig, *, track: Track = silent, say: Say = say_nothing,
          stop: Stop = never) -> Iterator[EpochReport | TrainReport]:  # fmt: skip
    """Train as the config says; the last item is the `TrainReport`.

    Args:
        track: progress over the steps.
        say: takes one line for a person: choices made, findings, warnings.
        stop: asked after every step; a signal's name ends the run after this step, resumable.

    Raises: MvcrError for every refusal; what was saved before stays intact.
    """
    clock = Clock(None, config.seconds, config.started if config.started is not None else time.monotonic())
    device = pick_device(config.device)
    prepared = prepare(config)
    announce(prepared, say)
    if config.dry_run:
        return
    resumes = config.resume and config.run is not None and RunDirectory(config.run).config.exists()
    start = None if resumes else starting_weights(config, say)
    run = open_run(config, start)
    with run.locked():
        if run.config.exists() and not config.resume:
            raise CannotCreate(
                f"{display_name(run.path)} holds a run already", "choose another --name, or go on with it: --resume"
            )
        if run.summary.exists():
            say(f"{display_name(run.path)} is finished already; nothing to do")
            return
        trainer = _begin(config, prepared, run, start, device, clock, say)
        yield from trainer.epochs(track, stop)
        yield trainer.finish()


def open_run(config: TrainConfig, start: Start | None) -> RunDirectory:
    """The run directory to write, made when it is new.

    Raises: CannotCreate when the folder is something else than a run.
    """
    if config.run is None:
        assert start is not None
        run = RunDirectory.numbered(default_model(config, start.pretrained))
    else:
        run = RunDirectory(config.run)
        if run.is_foreign():
            raise CannotCreate(f"{display_name(run.path)} exists and is no run", "choose another --name")
    run.create()
    return run


def _begin(config: TrainConfig, prepared: Prepared, run: RunDirectory, start: Start | None, device: torch.device,
           clock: Clock, say: Say) -> Trainer:  # fmt: skip
    """Settings, network and optimiser of a new run, or of a resumed one (`config.json` is there)."""
    stored = run.read_json(run.config) if run.config.exists() else None
    if stored is not None:
        start = Start.restored(stored["start"])
    elif start is None:
        start = starting_weights(config, say)
    settings = (
        _agree(config, stored, prepared, run) if stored else fit_settings(config, prepared, device, start.pretrained)
    )
    assert settings.imgsz is not None
    assert settings.model is not None
    assert settings.threads is not None
    torch.set_num_threads(settings.threads)
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # every operation here writes what it allocates
    torch.manual_seed(settings.seed)
    stem = "imagenet" if start.pretrained else stem_for(settings.imgsz)
    model = config_for(settings.model, len(prepared.classes), scales=settings.scales, stem=stem)
    model = replace(model, scales=useful_scales(model.scales, settings.imgsz, stem))
    session = _session(settings, prepared, start, model, device)
    precision = str(session.dtype).removeprefix("torch.")
    if stored is None:
        write_json(run.split, split_record(prepared.train, prepared.val, prepared.classes))
        write_json(run.config, {
            "mvcr": __version__, "train": settings.to_dict(), "model": model.to_dict(), "start": start.to_dict(),
            "preprocess": session.preprocess.to_dict(), "classes": list(prepared.classes),
            "findings": list(prepared.findings),
            "environment": {"torch": torch.__version__, "python": platform.python_version(), "device": device.type,
                            "precision": precision},
        })  # fmt: skip
    trainer = Trainer(settings, prepared, run, session, clock, say)
    trainer.restore()
    length = f"{settings.seconds:.0f} s" if settings.seconds else f"{settings.epochs} epochs"
    say(
        f"run {display_name(run.path)}: {settings.model} from {start.source}, {settings.imgsz} px, batch "
        f"{settings.batch}, learning rate {settings.lr:.2g}, {length}, {precision} on {device.type}"
    )
    return trainer


def _agree(config: TrainConfig, stored: dict[str, Any], prepared: Prepared, run: RunDirectory) -> TrainConfig:
    """The stored settings, when what is asked now does not contradict them.

    Raises: ConfigMismatch that names the first contradiction.
    """
    was = stored["train"]
    fitted = {key: was[key] for key in ("model", "imgsz", "batch", "epochs", "lr") if getattr(config, key) is None}
    config = replace(
        config, **fitted, workers=default_workers(config.workers), threads=config.threads or available_cores()
    )
    for key, now in json.loads(to_json(config.to_dict())).items():
        if key not in _FREE and now != was.get(key):
            raise ConfigMismatch(
                f"{display_name(run.path)} was started with {key} = {display_name(str(was.get(key)))}, "
                f"not {display_name(str(now))}",
                "resume with the same settings, or start a new run",
            )
    if tuple(stored["classes"]) != prepared.classes:
        raise ConfigMismatch(f"{display_name(run.path)} has other classes than the data", "start a new run")
    recorded = run.read_json(run.split)
    for side, samples in (("train", prepared.train), ("val", prepared.val)):
        if [row[2] for row in recorded[side]] != [sample.digest for sample in samples]:
            raise ConfigMismatch(
                f"the {side} pictures are not those that {display_name(run.path)} was started with", "start a new run"
            )
    return config


def _session(config: TrainConfig, prepared: Prepared, start: Start, model: ModelConfig,
             device: torch.device) -> Session:  # fmt: skip
    assert config.lr is not None
    assert config.imgsz is not None
    network = build(model, exact=start.pretrained)
    new_parts = set(load_trunk(network, start.tensors)) if start.tensors is not None else set()
    network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    dtype = pick_precision(config.precision, device)
    counts = [0] * len(prepared.classes)
    for sample in prepared.train:
        counts[sample.label] += 1
    weights = class_weights(counts, config.balance)
    return Session(
        config=config,
        network=network.train(),
        average=WeightAverage(network, config.ema),
        optimiser=make_optimiser(network, config.lr, config.weight_decay, new_parts),
        preprocess=Preprocess(size=config.imgsz, fit=config.fit),
        device=device,
        dtype=dtype,
        weights=None if weights is None else weights.to(device),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
    )


@dataclass
class Trainer:
    """One run in progress: where it stands, and what it writes."""

    config: TrainConfig
    prepared: Prepared
    run: RunDirectory
    session: Session
    clock: Clock
    say: Say
    step: int = 0
    best: float = -1.0
    best_epoch: int = 0
    stopped_by: str = "finished"
    pending: bool = False  # an epoch is complete but not validated yet
    records: list[dict[str, Any]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert self.config.batch is not None
        self.cache = PixelCache(self.config.cache_mb)
        self.per_epoch = max(1, len(self.prepared.train) // self.config.batch)
        if self.config.epochs is not None and self.config.seconds is None:
            self.clock.total_steps = self.config.epochs * self.per_epoch

    def restore(self) -> None:
        """Go on from the newest undamaged state, if there is one."""
        state = self.run.load_state(self.say)
        if state is None:
            return
        tensors, meta = state
        self.session.load_state(tensors, meta["scaler"])
        self.step, self.best, self.best_epoch = meta["step"], meta["best"], meta["best_epoch"]
        self.pending, self.clock.before = meta["pending"], meta["elapsed"]
        self.records = self.run.read_metrics(meta["records"])
        self.losses = [tensors["losses"]] if "losses" in tensors else []
        self.say(f"resumed at step {self.step}")

    def epochs(self, track: Track, stop: Stop) -> Iterator[EpochReport]:
        """Train until the end or a signal; one report for every validated epoch."""
        self.clock.begin()
        if self.pending:
            if report := self._validate(stop):
                yield report
            if (signal := stop()) or self._out_of_patience():
                self.stopped_by = signal or "patience"
                return
        batches = self._reader().batches(self._steps())
        planned = None if self.clock.total_steps is None else self.clock.total_steps - self.step
        if self.clock.total_steps is not None and self.step >= self.clock.total_steps:
            batches = iter(())
        mark, mark_step = time.monotonic(), self.step
        for plan, batch in track(batches, total=planned, label="training"):
            if batch is not None:
                self.losses.append(self.session.step(batch, self.step, self.clock.progress(self.step)))
            self.step += 1
            ended = self.clock.finished(self.step)
            epoch_ended = self.step % self.per_epoch == 0
            if epoch_ended or ended:
                speed = self._speed(mark, mark_step)
                self.pending = True
                if (ended or self._due()) and (report := self._validate(stop, plan.size, speed)):
                    yield report
                mark, mark_step = time.monotonic(), self.step
            signal = stop()
            out_of_patience = self._out_of_patience()
            if signal or ended or epoch_ended or out_of_patience or self._asked_to_save():
                self._save()
            if signal or ended or out_of_patience:
                self.stopped_by = signal or ("patience" if out_of_patience and not ended else "finished")
                return

    def finish(self) -> TrainReport:
        """The end of the run; only a run that came to its end is marked as finished."""
        last = self.records[-1]["val_accuracy"] if self.records else 0.0
        report = TrainReport(
            run=str(self.run.path),
            best_accuracy=max(self.best, 0.0),
            best_epoch=self.best_epoch,
            last_accuracy=last,
            epochs=math.ceil(self.step / self.per_epoch),
            steps=self.step,
            seconds=self.clock.elapsed(),
            stopped_by=self.stopped_by,
            train_images=len(self.prepared.train),
            val_images=len(self.prepared.val),
            skipped=len(self.prepared.skipped) + len(self.cache.problems),
            peak_rss_mb=peak_rss_mb(),
        )
        self._report_bad_pictures()
        if not self.stopped_by.startswith("SIG"):
            write_json(self.run.summary, record(report))
        return report

    def _steps(self) -> Iterator[Step]:
        """What every step reads, from the current one on; sizes follow the schedule."""
        assert self.config.batch is not None
        assert self.config.imgsz is not None
        samples, order, of_epoch = self.prepared.train, [], -1
        last = self.clock.total_steps
        for step in itertools.count(self.step) if last is None else range(self.step, last):
            epoch, position = divmod(step, self.per_epoch)
            if epoch != of_epoch:
                order, of_epoch = epoch_order(len(samples), self.config.seed, epoch), epoch
            chosen = order[position * self.config.batch : (position + 1) * self.config.batch]
            size = size_at(self.clock.progress(step), self.config.imgsz, self.config.progressive)
            yield Step(epoch, size, tuple(samples[index] for index in chosen))

    def _reader(self) -> TrainingReader:
        config = self.config
        assert config.imgsz is not None
        assert config.workers is not None
        assert config.batch is not None
        # Enough pixels for the smallest crop and the strongest zoom to be sharp, within reason.
        enlargement = min(2.0, (1 + config.augment.zoom) / math.sqrt(config.augment.crop))
        base = math.ceil(config.imgsz * enlargement)
        return TrainingReader(
            self.cache, self.session.preprocess, config.augment, base, config.seed, config.workers, 3 * config.batch
        )

    def _validate(self, stop: Stop, size: int | None = None, speed: float = 0.0) -> EpochReport | None:
        """Evaluate the averaged weights, keep them, and record the epoch; None when a signal cut it short."""
        began = time.monotonic()
        found = self._evaluate(stop)
        if found is None:
            return None
        self.clock.validation_seconds = time.monotonic() - began
        accuracy = found.top1.value
        epoch = math.ceil(self.step / self.per_epoch)
        if accuracy > self.best:
            self.best, self.best_epoch = accuracy, epoch
            self._keep(self.run.best, found)
            write_json(self.run.evaluation, record(found))
        self._keep(self.run.last, found)
        report = self._epoch_report(epoch, found, size, speed)
        self.records.append(record(report))
        self.run.write_metrics(self.records)
        self.losses, self.pending = [], False
        return report

    def _evaluate(self, stop: Stop) -> EvalReport | None:
        session, began = self.session, time.monotonic()
        assert self.config.workers is not None
        batches = evaluation_batches(
            self.prepared.val, session.preprocess, EVALUATION_BATCH, self.config.workers, self.cache
        )
        kept, probabilities = infer(session.average.network, batches, session.device, session.dtype, stop)
        if stop():
            return None
        if not kept:
            raise DataError("none of the validation pictures can be read", "look at them with an image viewer")
        if not np.isfinite(probabilities).all():
            raise DataError(
                f"the network's verdicts are no numbers any more at step {self.step}",
                "lower --lr; the weights saved before are intact",
            )
        return summarise(
            run=self.run.path.name, data="validation split", labels=np.array([sample.label for sample in kept]),
            probabilities=probabilities, classes=self.prepared.classes, missing=(),
            skipped=len(self.prepared.val) - len(kept), seconds=time.monotonic() - began,
        )  # fmt: skip

    def _epoch_report(self, epoch: int, found: EvalReport, size: int | None, speed: float) -> EpochReport:
        progress = min(1.0, self.clock.progress(self.step))
        assert self.config.lr is not None
        assert self.config.imgsz is not None
        return EpochReport(
            epoch=epoch,
            epochs=self.config.epochs if self.config.seconds is None else self._planned_epochs(progress),
            step=self.step,
            size_px=size or size_at(self.clock.progress(self.step - 1), self.config.imgsz, self.config.progressive),
            lr=self.config.lr * lr_factor(progress, self.config.warmup),
            train_loss=float(torch.cat([loss.reshape(-1) for loss in self.losses]).mean()) if self.losses else 0.0,
            val_loss=found.loss,
            val_accuracy=found.top1.value,
            best_accuracy=self.best,
            images_per_second=speed,
            seconds=self.clock.elapsed(),
            left_seconds=self.clock.left(self.step),
        )

    def _planned_epochs(self, progress: float) -> int | None:
        return max(1, round(self.step / self.per_epoch / progress)) if progress > 0 else None

    def _keep(self, path: Path, found: EvalReport) -> None:
        settings = {key: value for key, value in self.config.to_dict().items() if key not in _FREE}
        Checkpoint(
            config=self.session.network.config,
            classes=self.prepared.classes,
            preprocess=self.session.preprocess,
            tensors=self.session.average.network.state_dict(),
            made={
                "by": f"mvcr {__version__}",
                "step": self.step,
                "val_accuracy": found.top1.value,
                "settings": settings,
            },
        ).save(path)

    def _save(self) -> None:
        tensors = self.session.state()
        if self.losses:
            tensors["losses"] = torch.cat([loss.reshape(-1) for loss in self.losses]).cpu()
        meta = {"scaler": self.session.scaler_state(), "best": self.best, "best_epoch": self.best_epoch,
                "pending": self.pending, "elapsed": self.clock.elapsed(), "records": len(self.records)}  # fmt: skip
        self.run.save_state(self.step, tensors, meta)

    def _due(self) -> bool:
        """Every epoch; when the clock decides, no more than a tenth of the time goes into validation."""
        if self.config.seconds is None or not self.records:
            return True
        since = self.clock.elapsed() - self.records[-1]["seconds"]
        return bool(since * VALIDATION_SHARE >= self.clock.validation_seconds)

    def _speed(self, mark: float, mark_step: int) -> float:
        assert self.config.batch is not None
        return (self.step - mark_step) * self.config.batch / max(time.monotonic() - mark, 1e-9)

    def _asked_to_save(self) -> bool:
        every = self.config.save_every
        return every > 0 and self.step % every == 0

    def _out_of_patience(self) -> bool:
        patience = self.config.patience
        if not patience or not self.records or self.pending:
            return False
        return bool(self.records[-1]["epoch"] - self.best_epoch >= patience)

    def _report_bad_pictures(self) -> None:
        bad = sorted(self.cache.problems.values(), key=lambda problem: problem.path)
        if bad:
            names = ", ".join(f"{display_name(problem.path)} ({problem.code})" for problem in bad[:20])
            self.say(f"warning: {len(bad)} pictures could not be read and were left out: {names}")
