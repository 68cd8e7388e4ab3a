"""Training: a generator of reports, one an epoch and one at the end.

Nothing random is state. The order of pictures, their augmentation, dropout and mixing are functions of (seed, epoch,
step, picture), so a state holds tensors and a few numbers, and a run goes on from any step bit for bit as if
undisturbed.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mvcr_cli.config import TrainConfig
from mvcr_cli.data.loader import Batch
from mvcr_cli.data.trail import Trail
from mvcr_cli.engine import Say, Stop, Track, never, peak_rss_mb, pick_device, say_nothing, silent
from mvcr_cli.engine.agreement import agree_on_settings
from mvcr_cli.engine.beginning import begin, claim_run, make_run, torch_settings_kept
from mvcr_cli.engine.clock import Clock
from mvcr_cli.engine.feed import Feed
from mvcr_cli.engine.findings import record_findings
from mvcr_cli.engine.prepare import Prepared, announce, check, prepare
from mvcr_cli.engine.rundir import RunDirectory
from mvcr_cli.engine.schedule import lr_factor
from mvcr_cli.engine.session import Session
from mvcr_cli.engine.validation import averaged, keep, validate
from mvcr_cli.errors import CheckpointError, DataError, is_out_of_memory
from mvcr_cli.paths import display_name, json_path, write_json
from mvcr_cli.records import SCHEMA, CheckReport, EpochReport, EvalReport, PicturePair, Problem, TrainReport, record


def train(config: TrainConfig, *, track: Track = silent, say: Say = say_nothing,
          stop: Stop = never) -> Iterator[EpochReport | TrainReport | CheckReport | Problem | PicturePair]:  # fmt: skip
    """Train as the config says; the last item is the `TrainReport`. A dry run gives problems, pairs and a `CheckReport`.

    Args:
        track: progress over the steps.
        say: takes one line for a person: choices made, findings, warnings.
        stop: asked after every step; a signal's name ends the run after this step, resumable.

    A finished run is resumed by its `TrainReport` alone. What is wrong with the folder of the run is told before the data are
    read.

    Raises: MvcrError for every refusal; what was saved before stays intact.
    """
    clock = Clock(None, config.seconds, config.started if config.started is not None else time.monotonic())
    device = pick_device(config.device)
    with torch_settings_kept(), contextlib.ExitStack() as held:
        run, start = claim_run(config, held), None
        if run is not None and run.summary.exists():
            yield _finished(run, config, say)
            return
        prepared = prepare(config, track)
        announce(prepared, say)
        if config.dry_run:
            yield from check(config, prepared)
            return
        if run is None:
            run, start = make_run(config, held, say)
        if run.summary.exists():  # by another process, while this one read the data
            yield _finished(run, config, say)
            return
        if config.resume and not run.config.exists():
            say(f"nothing to resume in {display_name(run.path)}: a new run begins")
        trail = Trail(run.reading)
        announce_trail(trail, say)
        session = begin(config, prepared, run, start, device, say)
        record_findings(run.path, (*prepared.skipped, *prepared.look.broken, *prepared.look.pairs))
        trainer = Trainer(session.config, prepared, run, session, clock, say, trail)
        trainer.restore()
        with trail.opened():
            yield from trainer.epochs(track, stop)
        yield trainer.finish()


def _finished(run: RunDirectory, config: TrainConfig, say: Say) -> TrainReport:
    """What a run reported that has ended already. Raises: ConfigMismatch when it had other settings."""
    run.sweep()
    report = run.read_summary()
    agree_on_settings(config, run.read_config(), report.train_images, run)
    say(f"{display_name(run.path)} is finished already; nothing to do")
    return report


def announce_trail(trail: Trail, say: Say) -> None:
    if left := trail.left_behind():
        say(f"warning: the process before this one was killed or crashed while it read {', '.join(left)}; "
            "if that happens again at the same picture, take it out")  # fmt: skip


@dataclass
class Trainer:
    """One run in progress: where it stands, and what it writes."""

    config: TrainConfig
    prepared: Prepared
    run: RunDirectory
    session: Session
    clock: Clock
    say: Say
    trail: Trail | None = None
    step: int = 0
    best: float = -1.0
    best_epoch: int = 0
    stopped_by: str = "finished"
    pending: bool = False  # an epoch is complete but not validated yet
    records: list[dict[str, Any]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    track: Track = silent

    def __post_init__(self) -> None:
        self.feed = Feed(self.config, self.prepared, self.session, self.clock, self.trail)
        self.per_epoch = self.feed.per_epoch
        if self.config.epochs is not None:
            self.clock.total_steps = self.config.epochs * self.per_epoch

    def restore(self) -> None:
        """Go on from the newest undamaged state, if there is one."""
        state = self.run.load_state(self.say)
        if state is None:
            return
        tensors, meta = state
        try:
            self.session.load_state(tensors, meta["scaler"], meta["held"])
        except (RuntimeError, KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
            if is_out_of_memory(error):
                raise
            raise CheckpointError(
                f"the newest state of {display_name(self.run.path)} is not that of this network", "start a new run"
            ) from error
        self.feed.search()
        self.step, self.best, self.best_epoch = meta["step"], meta["best"], meta["best_epoch"]
        self.pending, self.clock.before = meta["pending"], meta["elapsed"]
        self.clock.first = meta.get("first", 0.0)
        self.records = self.run.read_metrics(meta["records"])
        self.losses = [tensors["losses"].to(self.session.device)] if "losses" in tensors else []
        self.say(f"resumed at step {self.step}")

    def epochs(self, track: Track, stop: Stop) -> Iterator[EpochReport]:
        """Train until the end or a signal; one report for every validated epoch."""
        self.track = track
        self.clock.begin()
        if self.clock.total_steps is not None and self.config.accumulate > self.clock.total_steps:
            self.say(
                f"warning: --accumulate is more than the {self.clock.total_steps} steps of this run: one update in all"
            )
        signal = None
        if self.pending:
            if report := self._validate(stop):
                self._save()
                yield report
            signal = stop()
        if signal or self._out_of_patience():
            self.stopped_by = signal or "patience"
            return
        batches = self.feed.batches(self.step)
        planned = None if self.clock.total_steps is None else self.clock.total_steps - self.step
        if self.clock.total_steps is not None and self.step >= self.clock.total_steps:
            batches = iter(())
        mark, mark_step = time.monotonic(), self.step
        for plan, batch in track(batches, total=planned, label="step"):
            if batch is not None:
                self.losses.append(self._move(batch))
            self.step += 1
            self._foresee_validation(plan.size, self._speed(mark, mark_step))
            ended = self.clock.finished(self.step)
            if ended or self.step % self.config.accumulate == 0:
                self.session.flush(self.step - 1, plan.size)
            epoch_ended = self.step % self.per_epoch == 0
            if epoch_ended or ended:
                speed = self._speed(mark, mark_step)
                self.pending = True
                if (ended or self._due()) and (report := self._validate(stop, plan.size, speed)):
                    yield report
                mark, mark_step = time.monotonic(), self.step
                ended = ended and self.clock.ended(self.step)
            signal = stop()
            out_of_patience = self._out_of_patience()
            if signal or ended or epoch_ended or out_of_patience or self._asked_to_save():
                self._save()
            if signal or ended or out_of_patience:
                self.stopped_by = signal or ("patience" if out_of_patience and not ended else "finished")
                return

    def _move(self, batch: Batch) -> Tensor:
        progress = self.clock.progress(self.step)
        try:
            return self.session.step(batch, self.step, progress)
        except DataError:
            paths = [json_path(path)["path"] for path in batch.paths]
            self.run.note({"record": "nonfinite", "schema": SCHEMA, "step": self.step, "train_loss": None,
                           "nonfinite": True, "paths": paths})  # fmt: skip
            raise

    def finish(self) -> TrainReport:
        """The end of the run; only a run that came to its end is marked as finished."""
        last = self.records[-1]["val_accuracy"] if self.records else 0.0
        broken = {problem.path for problem in (*self.prepared.look.broken, *self.feed.problems())}
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
            skipped=self.prepared.left_out + len(broken),
            peak_rss_mb=peak_rss_mb(),
        )
        self._report_bad_pictures()
        if not self.stopped_by.startswith("SIG"):
            write_json(self.run.summary, record(report))
        return report

    def _validate(self, stop: Stop, size: int | None = None, speed: float = 0.0) -> EpochReport | None:
        """Evaluate the averaged weights, keep them, and record the epoch; None when a signal cut it short."""
        began = time.monotonic()
        if self.losses and not math.isfinite(self._train_loss()):  # an accelerator is not asked at every step
            raise DataError(
                f"the loss was no number before step {self.step}", "lower --lr; the weights saved before are intact"
            )
        network = averaged(self.feed, stop)
        found = validate(self.feed, network, self.run.path.name, self.step, self.track, stop)
        if found is None:
            return None
        self.clock.took_validation(time.monotonic() - began)
        accuracy = found.top1.value
        epoch = math.ceil(self.step / self.per_epoch)
        if accuracy > self.best:
            self.best, self.best_epoch = accuracy, epoch
            keep(self.feed, network, self.run.best, self.step, accuracy)
            write_json(self.run.evaluation, record(found))
        keep(self.feed, network, self.run.last, self.step, accuracy)
        report = self._epoch_report(epoch, found, size, speed)
        self.records.append(record(report))
        self.run.write_metrics(self.records)
        self.losses, self.pending = [], False
        return report

    def _epoch_report(self, epoch: int, found: EvalReport, size: int | None, speed: float) -> EpochReport:
        progress = min(1.0, self.clock.progress(self.step))
        assert self.config.lr is not None
        return EpochReport(
            epoch=epoch,
            epochs=self.config.epochs if self.config.seconds is None else self._planned_epochs(epoch, progress),
            step=self.step,
            size_px=size or self.feed.size(self.step - 1),
            lr=self.config.lr * lr_factor(progress, self.config.warmup),
            train_loss=self._train_loss(),
            val_loss=found.loss,
            val_accuracy=found.top1.value,
            best_accuracy=self.best,
            images_per_second=speed,
            seconds=self.clock.elapsed(),
            cpu_seconds=time.process_time(),
            left_seconds=self.clock.left(self.step),
        )

    def _train_loss(self) -> float:
        return float(torch.cat([loss.reshape(-1) for loss in self.losses]).mean()) if self.losses else 0.0

    def _planned_epochs(self, epoch: int, progress: float) -> int | None:
        return max(epoch, round(self.step / self.per_epoch / progress)) if progress > 0 else None

    def _save(self) -> None:
        tensors = self.session.state()
        if self.losses:
            tensors["losses"] = torch.cat([loss.reshape(-1) for loss in self.losses]).cpu()
        meta = {
            "scaler": self.session.scaler_state(), "held": self.session.held, "best": self.best,
            "best_epoch": self.best_epoch, "pending": self.pending, "elapsed": self.clock.elapsed(),
            "first": self.clock.first,
            "records": len(self.records),
        }  # fmt: skip
        self.run.save_state(self.step, tensors, meta)

    def _foresee_validation(self, size: int, speed: float) -> None:
        assert self.config.imgsz is not None
        self.clock.foresee_validation(len(self.prepared.val), speed, (self.config.imgsz / size) ** 2)

    def _due(self) -> bool:
        """Every epoch, unless the clock has something against it."""
        since = self.clock.elapsed() - self.records[-1]["seconds"] if self.records else None
        return self.clock.allows_validation(since)

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
        """Record the pictures that turned out to be broken, and name those that were not found before the training."""
        bad = sorted(self.feed.problems(), key=lambda problem: problem.path)
        record_findings(self.run.path, bad)
        told = {problem.path for problem in self.prepared.look.broken}
        bad = [problem for problem in bad if problem.path not in told]
        if bad:
            names = ", ".join(f"{display_name(problem.path)} ({problem.code})" for problem in bad[:20])
            self.say(f"warning: {len(bad)} pictures could not be read and were left out: {names}")
