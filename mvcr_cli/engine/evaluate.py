"""Evaluation that can be trusted: every picture accounted for, labels by name, intervals and calibration."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvcr_cli.checkpoint import Checkpoint
from mvcr_cli.config import EvalConfig
from mvcr_cli.data.files import read_contents
from mvcr_cli.data.folder import Sample, extra_classes, find_evaluation, relabel, scan
from mvcr_cli.data.loader import Input, PixelCache, ZoomInput, evaluation_batches
from mvcr_cli.data.preprocess import Preprocess
from mvcr_cli.data.tiles import TileReader
from mvcr_cli.data.trail import Trail
from mvcr_cli.engine import (
    Say,
    Stop,
    Track,
    autocast,
    default_workers,
    find_weights,
    never,
    pick_device,
    pick_precision,
    run_directory,
    say_nothing,
    silent,
)
from mvcr_cli.engine.metrics import (
    auroc,
    balanced_accuracy,
    calibration_error,
    class_reports,
    confusion_matrix,
    log_loss,
    macro_f1,
    topk_right,
    wilson,
)
from mvcr_cli.engine.rundir import RunDirectory, refuse_in_data
from mvcr_cli.engine.views import network_looking
from mvcr_cli.engine.zoom_step import look
from mvcr_cli.errors import ConfigMismatch, DataError, InputMissing, MvcrError, WorkerFailed
from mvcr_cli.models import Network
from mvcr_cli.models.zoom import ZoomResNet
from mvcr_cli.paths import check_creatable, display_name
from mvcr_cli.records import NO_LOSS, EvalReport, ImageResult, Problem

Probabilities = NDArray[np.float64]
CLASSES_NAMED = 20
_UNTOLD = NO_LOSS | {"twin_classes"}  # what a scan finds and an evaluation does not mention


def evaluate(config: EvalConfig, *, track: Track = silent,
             say: Say = say_nothing) -> tuple[EvalReport, list[ImageResult], list[Problem]]:  # fmt: skip
    """Evaluate a run on its own validation split or on any class-per-folder set.

    Returns: the report, one result a picture, and the pictures that could not be read.
    Raises: MvcrError when the run or the data cannot be used.
    """
    started = time.monotonic()
    weights = find_weights(config.run)
    if config.run is None:
        say(f"run: {display_name(run_directory(weights) or weights)}")
    checkpoint = Checkpoint.load(weights)
    pictures = evaluation_set(config, weights, checkpoint)
    samples, problems, folder = pictures.samples, pictures.problems, run_directory(weights)
    pictures.tell(say)
    tell_trained_on(folder, samples, say)
    device = pick_device(config.device)
    network = network_looking(checkpoint, config.views).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    cache, zoom = PixelCache(0), tile_reader(network, checkpoint.preprocess, 0)
    batch = config.batch if zoom is None else zoom.at_once(config.batch)
    batches = evaluation_batches(
        samples, checkpoint.preprocess, batch, default_workers(config.workers), cache, zoom=zoom
    )
    kept, probabilities = infer(
        network, track(batches, total=-(-len(samples) // batch), label="evaluating"), device,
        pick_precision(config.precision, device),
    )  # fmt: skip
    problems += (cache if zoom is None else zoom).problems.values()
    if not kept:
        raise none_readable("pictures", problems)
    report = summarise(
        run=str(folder or weights),
        data=str(config.data) if config.data else "validation split",
        labels=np.array([sample.label for sample in kept]),
        probabilities=probabilities,
        classes=checkpoint.classes,
        missing=pictures.missing,
        skipped=len(problems),
        ignored=pictures.ignored_count,
        trained_on=trained_on(folder, kept),
        views=config.views,
        seconds=time.monotonic() - started,
    )
    return report, image_results(kept, probabilities, checkpoint.classes), problems


def none_readable(what: str, problems: Sequence[Problem]) -> MvcrError:
    """That of all the pictures none is left, and what is wrong with one of them, or with the machine."""
    if problems and all(problem.code == "out_of_memory" for problem in problems):
        return WorkerFailed(
            f"out of memory: none of the {what} can be decoded",
            "a smaller --batch needs less; or end other programs",
        )
    first = f"; {display_name(problems[-1].path)}: {problems[-1].code}, {problems[-1].detail}" if problems else ""
    return DataError(f"none of the {what} can be read{first}", "look at them with an image viewer")


@dataclass(frozen=True)
class Pictures:
    """What a run is evaluated on.

    Args:
        samples: with labels that count into the run's classes.
        missing: classes of the run without a picture.
        problems: what was skipped.
        ignored: how many pictures of each class that the run does not know were left out, as asked for.
    """

    samples: tuple[Sample, ...]
    missing: tuple[str, ...] = ()
    problems: list[Problem] = field(default_factory=list)
    ignored: Mapping[str, int] = field(default_factory=dict)

    @property
    def ignored_count(self) -> int:
        return sum(self.ignored.values())

    def tell(self, say: Say) -> None:
        """Say what was left out as asked for."""
        if self.ignored:
            shown = [f"{display_name(name)} {count:,}" for name, count in self.ignored.items()]
            more = f" and {len(shown) - CLASSES_NAMED:,} classes more" if len(shown) > CLASSES_NAMED else ""
            names = ", ".join(shown[:CLASSES_NAMED]) + more
            say(f"left out {self.ignored_count:,} pictures of classes that the run does not know: {names}")


def evaluation_set(config: EvalConfig, weights: Path, checkpoint: Checkpoint) -> Pictures:
    """The pictures of `config.data`, else of the run's own validation split.

    Raises: MvcrError when they cannot be used, or `config.out` lies among them or cannot be made.
    """
    folder = run_directory(weights)
    if config.out is not None:
        refuse_in_data(folder, config.out, "the results", "an --out")
        check_creatable(config.out)
    if config.data is not None:
        index = scan(find_evaluation(config.data), follow_links=config.follow_links)
        samples, missing = relabel(index, checkpoint.classes, ignore_extra=config.ignore_extra_classes)
        problems = [problem for problem in index.skipped if problem.code not in _UNTOLD]
        return Pictures(samples, missing, problems, extra_classes(index, checkpoint.classes))
    if folder is None:
        raise ConfigMismatch(
            f"{display_name(weights)} stands alone and has no validation split",
            "name a folder: mvcr eval DATA --run FILE",
        )
    samples, changed = unchanged(validation_split(folder, checkpoint.classes))
    return Pictures(samples, problems=changed)


def tell_trained_on(folder: Path | None, samples: Sequence[Sample], say: Say) -> None:
    """Say how many of the pictures a run has learned from, where it has from any."""
    if folder is not None and (seen := trained_on(folder, samples)):
        say(f"{display_name(folder)} was trained on {seen:,} of these {len(samples):,} pictures")


def trained_on(folder: Path | None, samples: Sequence[Sample]) -> int | None:
    """How many of the pictures the run has learned from; None where no record of its training pictures is left."""
    if folder is None:
        return None
    run = RunDirectory(folder)
    try:
        rows = run.read_json(run.split).get("train")
    except ConfigMismatch:
        return None
    if not isinstance(rows, list):
        return None
    learned = {str(row[-1]) for row in rows if isinstance(row, list) and row}
    return sum(sample.digest in learned for sample in samples)


def unchanged(samples: tuple[Sample, ...]) -> tuple[tuple[Sample, ...], list[Problem]]:
    """The pictures that are still those that were recorded, and the others. What cannot be read is told by the reader."""
    kept, problems = [], []
    for sample, content in zip(samples, read_contents([sample.path for sample in samples]), strict=True):
        if isinstance(content, Problem) or content.digest == sample.digest:
            kept.append(sample)
        else:
            problems.append(Problem(path=sample.path, code="changed", detail="another picture than the run recorded"))
    return tuple(kept), problems


def validation_split(folder: Path, classes: tuple[str, ...]) -> tuple[Sample, ...]:
    """The validation pictures that the run recorded, labels by name.

    Raises:
        InputMissing: the data folder of the run is not there.
        ConfigMismatch: the record is missing, damaged, or of other classes.
    """
    run = RunDirectory(folder)
    recorded = run.read_split()
    entries, root = recorded.get("val", []), recorded.get("root", "")
    if isinstance(root, str) and root and not os.path.lexists(root):
        raise InputMissing(
            f"the data of this run are not in {display_name(root)} any more",
            "put them back there, or name a folder: mvcr eval DATA --run RUN",
        )
    order = {name: index for index, name in enumerate(classes)}
    try:
        return tuple(
            Sample(path=os.path.join(root, path), label=order[name], digest=str(digest))
            for path, name, digest in entries
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigMismatch(
            f"{display_name(run.split)} does not fit the weights", "name a folder: mvcr eval DATA --run RUN"
        ) from error


def tile_reader(
    network: Network, preprocess: Preprocess, megabytes: int, trail: Trail | None = None
) -> TileReader | None:
    """What reads pictures for a network that zooms; None for any other. See `TileReader`."""
    if not isinstance(network, ZoomResNet):
        return None
    reader = TileReader(network.zoom, preprocess, megabytes, trail)
    reader.search_with(network.learned_proposal(preprocess.mean, preprocess.std))
    return reader


def infer(network: Network, batches: Iterable[tuple[list[Sample], Input]], device: torch.device, dtype: torch.dtype,
          stop: Stop = never) -> tuple[list[Sample], Probabilities]:  # fmt: skip
    """Probabilities of every picture. Shape: (N, K), float64, rows sum to 1. Cut short once `stop` says so."""
    kept: list[Sample] = []
    rows: list[Tensor] = []
    for samples, x in batches:
        if stop():
            break
        kept += samples
        rows.append(probabilities_of(network, x, device, dtype))
    columns = network.config.classes
    return kept, torch.cat(rows).numpy() if rows else np.empty((0, columns))


@torch.inference_mode()
def probabilities_of(network: Network, x: Input, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Shape: (N, 3, S, S), with tiles where the network zooms -> (N, K), float64 on the CPU."""
    glance = x.x if isinstance(x, ZoomInput) else x
    glance = glance.to(device).contiguous(memory_format=torch.channels_last)
    with autocast(device, dtype):
        if isinstance(x, ZoomInput) and isinstance(network, ZoomResNet):
            logits = look(network, glance, x.tiles.to(device), x.preprocess).verdict.logits
        else:
            logits = network(glance)
    return logits.float().cpu().double().softmax(-1)


def summarise(*, run: str, data: str, labels: NDArray[np.int64], probabilities: Probabilities,
              classes: tuple[str, ...], missing: tuple[str, ...], skipped: int, seconds: float,
              ignored: int = 0, trained_on: int | None = None, views: str = "all") -> EvalReport:  # fmt: skip
    """The report of one evaluation, from labels and probabilities alone."""
    predicted = probabilities.argmax(1)
    confusion = confusion_matrix(labels, predicted, len(classes))
    return EvalReport(
        run=run,
        data=data,
        images=len(labels),
        top1=wilson(topk_right(probabilities, labels, 1), len(labels)),
        top5=wilson(topk_right(probabilities, labels, 5), len(labels)) if len(classes) > 5 else None,
        balanced_accuracy=balanced_accuracy(confusion),
        macro_f1=macro_f1(confusion),
        auroc=auroc(probabilities, labels),
        loss=log_loss(probabilities, labels),
        calibration_error=calibration_error(probabilities, labels),
        classes=class_reports(confusion, classes),
        confusion=tuple(tuple(int(count) for count in row) for row in confusion),
        missing_classes=missing,
        skipped=skipped,
        ignored=ignored,
        trained_on=trained_on,
        views=views,
        seconds=seconds,
    )


def image_results(
    samples: Sequence[Sample], probabilities: Probabilities, classes: tuple[str, ...]
) -> list[ImageResult]:
    def one(sample: Sample, row: NDArray[np.float64]) -> ImageResult:
        best = int(row.argmax())
        return ImageResult(
            path=sample.path,
            label=classes[sample.label],
            predicted=classes[best],
            correct=best == sample.label,
            probability=float(row[best]),
            probabilities=tuple(float(p) for p in row),
        )

    return [one(sample, row) for sample, row in zip(samples, probabilities, strict=True)]


def split_record(
    train: Iterable[Sample], val: Iterable[Sample], classes: tuple[str, ...], data: Path | None = None
) -> dict[str, Any]:
    """The content of `split.json`: path, class and digest of every picture, whatever the current folder is later.

    Args:
        data: `root` of the record; names below it are relative to it, all others absolute.
    """
    here = os.getcwd()
    root = "" if data is None else os.path.join(here, data)

    def name(path: str) -> str:
        # Neither normpath nor relpath: ".." behind a link leads elsewhere than the text says.
        path = os.path.join(here, path)
        return path.removeprefix(os.path.join(root, "")) if root else path

    def rows(samples: Iterable[Sample]) -> Iterator[list[str]]:
        for sample in samples:
            yield [name(sample.path), classes[sample.label], sample.digest]

    return {"classes": list(classes), "root": root, "train": list(rows(train)), "val": list(rows(val))}
