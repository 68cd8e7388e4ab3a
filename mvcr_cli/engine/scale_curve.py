"""Accuracy against object scale: the same pictures shown smaller and larger, with nothing cut off.

At factor f the preprocessed square of side S covers round(f S) pixels, resized straight from the picture's own pixels,
so that f > 1 shows real detail where the picture has it. It stands in the middle of a canvas of max(S, round(f S))
pixels; the rest is what evaluation pads with, which is 0 after normalisation. Factor 1 is ordinary evaluation.

The area under the curve is the mean accuracy over log2 f, by the trapezoid rule. It is linear in what each picture
contributes, so the difference of two areas has the interval of a paired mean over pictures.
"""

from __future__ import annotations

import math
import time
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mvcr_cli.checkpoint import Checkpoint
from mvcr_cli.config import LARGEST_CANVAS, EvalConfig, factor_text
from mvcr_cli.data.folder import Sample
from mvcr_cli.data.loader import PixelCache, evaluation_batches
from mvcr_cli.data.preprocess import Preprocess
from mvcr_cli.engine import (
    Say,
    Track,
    default_workers,
    find_weights,
    pick_device,
    pick_precision,
    run_directory,
    say_nothing,
    silent,
)
from mvcr_cli.engine.evaluate import evaluation_set, infer, none_readable, tell_trained_on, trained_on
from mvcr_cli.engine.metrics import Z_95, wilson
from mvcr_cli.engine.views import network_looking
from mvcr_cli.errors import ConfigMismatch, UsageError
from mvcr_cli.paths import display_name
from mvcr_cli.records import Difference, Problem, ScaleCurve, ScaleCurveReport, ScalePoint

Hits = NDArray[np.bool_]  # F factors x N pictures


def scale_curve(config: EvalConfig, *, track: Track = silent,
                say: Say = say_nothing) -> tuple[ScaleCurveReport, list[Problem]]:  # fmt: skip
    """The curve of `config.run` over `config.scales`, that of `config.against` beside it, and unreadable pictures.

    A picture that cannot be read at one factor counts at none, so that all points are about the same pictures.

    Raises: MvcrError when a run or the data cannot be used.
    """
    started = time.monotonic()
    assert config.scales is not None
    weights = find_weights(config.run)
    if config.run is None:
        say(f"run: {display_name(run_directory(weights) or weights)}")
    checkpoint = Checkpoint.load(weights)
    pictures = evaluation_set(config, weights, checkpoint)
    samples, problems = pictures.samples, pictures.problems
    pictures.tell(say)
    subjects = [Subject.of(weights, checkpoint, samples)]
    if config.against is not None:
        subjects.append(_opponent(config.against, checkpoint.classes, samples))
    for subject in subjects:
        subject.check_canvas(config.scales)
    for folder in dict.fromkeys(subject.folder for subject in subjects):
        tell_trained_on(folder, samples, say)
    cache = PixelCache(0)
    answers = [_answers(subject, config, cache, track) for subject in subjects]
    problems += cache.problems.values()
    kept = [sample.path for sample in samples if sample.path not in cache.problems]
    if not kept:
        raise none_readable("pictures", problems)
    hits = [np.array([[right[path] for path in kept] for right in each]) for each in answers]
    report = summarise(
        data=str(config.data) if config.data else "validation split",
        curves=[curve_of(subject.run, subject.checkpoint.preprocess, config.scales, hit, subject.trained_on(set(kept)))
                for subject, hit in zip(subjects, hits, strict=True)],
        hits=hits,
        missing=pictures.missing,
        skipped=len(problems),
        ignored=pictures.ignored_count,
        views=config.views,
        seconds=time.monotonic() - started,
    )  # fmt: skip
    return report, problems


@dataclass(frozen=True)
class Subject:
    """A run and the pictures that it is asked about, labels in the order of its classes."""

    run: str
    folder: Path | None
    checkpoint: Checkpoint
    samples: tuple[Sample, ...]

    @classmethod
    def of(cls, weights: Path, checkpoint: Checkpoint, samples: tuple[Sample, ...]) -> Subject:
        folder = run_directory(weights)
        return cls(str(folder or weights), folder, checkpoint, samples)

    def check_canvas(self, factors: Sequence[float]) -> None:
        """Raises: UsageError when the largest pictures would be larger than any input may be, or tiles are cut."""
        if self.checkpoint.config.zoom is not None:
            raise UsageError(
                f"--scales: {display_name(self.run)} zooms, and its tiles have the pictures' own resolution",
                "train with --zoom off to see a curve over scale",
            )
        side = self.checkpoint.preprocess.canvas(max(factors))
        if side > LARGEST_CANVAS:
            size = self.checkpoint.preprocess.size
            raise UsageError(
                f"--scales up to {factor_text(max(factors))} makes pictures of {side:,} px from the {size:,} px of "
                f"{display_name(self.run)}; the limit is {LARGEST_CANVAS:,} px",
                f"end the scales at {factor_text(2.0 ** math.floor(math.log2(LARGEST_CANVAS / size)))}",
            )

    def trained_on(self, kept: Container[str]) -> int | None:
        """How many of the kept pictures, given by their paths, the run has learned from; see `evaluate.trained_on`."""
        return trained_on(self.folder, [sample for sample in self.samples if sample.path in kept])


def _opponent(run: Path, classes: Sequence[str], samples: Sequence[Sample]) -> Subject:
    """Another run and the same pictures, labels mapped by name.

    Raises: ConfigMismatch when it does not know one of the pictures' classes.
    """
    weights = find_weights(run)
    checkpoint = Checkpoint.load(weights)
    order = {name: label for label, name in enumerate(checkpoint.classes)}
    unknown = sorted({classes[sample.label] for sample in samples} - set(order))
    if unknown:
        shown = ", ".join(map(display_name, unknown[:10])) + (" ..." if len(unknown) > 10 else "")
        raise ConfigMismatch(
            f"--against {display_name(run)} does not know {len(unknown)} of the classes: {shown}",
            "compare runs of the same classes, or give a DATA folder without these",
        )
    return Subject.of(
        weights, checkpoint, tuple(replace(sample, label=order[classes[sample.label]]) for sample in samples)
    )


def _answers(subject: Subject, config: EvalConfig, cache: PixelCache, track: Track) -> list[dict[str, bool]]:
    """For every factor: whether each picture that could be read was told right."""
    assert config.scales is not None
    device, preprocess = pick_device(config.device), subject.checkpoint.preprocess
    network = network_looking(subject.checkpoint, config.views)
    network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    dtype = pick_precision(config.precision, device)
    answers: dict[float, dict[str, bool]] = {}
    for factor in sorted(config.scales, reverse=True):  # what needs most memory first
        size = batch_at(config.batch, preprocess.size, preprocess.canvas(factor))
        batches = evaluation_batches(subject.samples, preprocess, size, default_workers(config.workers), cache, factor)
        total = -(-len(subject.samples) // size)
        kept, probabilities = infer(network, track(batches, total=total, label=f"scale {factor_text(factor)}"), device,
                                    dtype)  # fmt: skip
        right = probabilities.argmax(1) == np.array([sample.label for sample in kept], dtype=np.int64)
        answers[factor] = {sample.path: bool(hit) for sample, hit in zip(kept, right, strict=True)}
    return [answers[factor] for factor in config.scales]


def batch_at(batch: int, size: int, canvas: int) -> int:
    """Pictures at once on a larger canvas, so that they have no more pixels than `batch` pictures of `size`."""
    return max(1, batch * size**2 // canvas**2)


def octave_weights(factors: Sequence[float]) -> NDArray[np.float64]:
    """The trapezoid rule over log2 of increasing factors, divided by the range. Shape: (F,), sums to 1."""
    octaves = np.log2(np.asarray(factors, dtype=np.float64))
    steps = np.diff(octaves)
    weights = (np.append(steps, 0) + np.append(0, steps)) / 2
    share: NDArray[np.float64] = weights / (octaves[-1] - octaves[0])
    return share


def curve_of(run: str, preprocess: Preprocess, factors: Sequence[float], hits: Hits,
             trained_on: int | None = None) -> ScaleCurve:  # fmt: skip
    """The curve of one run from what it got right at each factor; factors increase, and 1 is among them."""
    counts = hits.sum(1)
    worst = int(counts.argmin())
    points = tuple(
        ScalePoint(factor=factor, canvas_px=preprocess.canvas(factor), accuracy=wilson(int(count), hits.shape[1]))
        for factor, count in zip(factors, counts, strict=True)
    )
    return ScaleCurve(
        run=run,
        size_px=preprocess.size,
        points=points,
        area=float(octave_weights(factors) @ hits.mean(1)),
        worst_factor=factors[worst],
        worst_accuracy=points[worst].accuracy.value,
        accuracy_at_1=points[list(factors).index(1.0)].accuracy.value,
        trained_on=trained_on,
    )


def summarise(*, data: str, curves: Sequence[ScaleCurve], hits: Sequence[Hits], missing: tuple[str, ...], skipped: int,
              seconds: float, ignored: int = 0, views: str = "all") -> ScaleCurveReport:  # fmt: skip
    """The report of one curve, or of two and their differences."""
    own, other = curves[0], curves[1] if len(curves) > 1 else None
    area_difference = None
    if other is not None:
        weights = octave_weights([point.factor for point in own.points])
        area_difference = paired_mean(weights @ hits[0] - weights @ hits[1])
    return ScaleCurveReport(
        data=data,
        images=hits[0].shape[1],
        curve=own,
        against=other,
        area_difference=area_difference,
        worst_difference=None if other is None else own.worst_accuracy - other.worst_accuracy,
        missing_classes=missing,
        skipped=skipped,
        ignored=ignored,
        views=views,
        seconds=seconds,
    )


def paired_mean(differences: NDArray[np.float64]) -> Difference:
    """The mean with its 95 % normal interval; of a single picture nothing is known: [-1, 1]. Shape: (N,)."""
    n, mean = len(differences), float(differences.mean())
    half = Z_95 * float(differences.std(ddof=1)) / math.sqrt(n) if n > 1 else 1.0 + abs(mean)
    return Difference(value=mean, low=max(-1.0, mean - half), high=min(1.0, mean + half), n=n)
