"""Records as text and tables for people. Nothing is printed here, and no name is trusted."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterable, Sequence

from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mvcr_cli.config import factor_text
from mvcr_cli.paths import counted, display_name
from mvcr_cli.records import (
    BenchmarkRow,
    CheckReport,
    ConversionReport,
    EpochReport,
    EvalReport,
    ExportReport,
    Interval,
    LoaderReport,
    ScaleCurve,
    ScaleCurveReport,
    TrainReport,
)

CONFUSION_CLASSES = 12  # more do not fit a terminal
CLASSES_SHOWN = 100
NAME_CHARACTERS = 32
COLUMNS = 80  # of a terminal, at least
CELL_FRAME = 3  # a space on either side and a line


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def epoch_status(report: EpochReport) -> str:
    """What a progress bar keeps in sight of the last validated epoch, the most important first."""
    return (
        f"epoch {report.epoch}: val {percent(report.val_accuracy)}, loss {report.train_loss:.3f},"
        f" {report.images_per_second:,.0f} images/s"
    )


def epoch_line(report: EpochReport, width: int | None = None) -> str:
    """One validated epoch; in fewer columns than it needs, the less important parts are left out."""
    of = "" if report.epochs is None else f"/{report.epochs}"
    left = "" if report.left_seconds is None else f"{duration(report.left_seconds)} left"
    parts = [
        f"epoch {report.epoch}{of}", f"step {report.step:,}", f"{report.size_px} px", f"loss {report.train_loss:.3f}",
        f"val {percent(report.val_accuracy)}", f"(best {percent(report.best_accuracy)})",
        f"{report.images_per_second:,.0f} images/s", left,
    ]  # fmt: skip
    for place in (2, 5, 1, 6):  # size, best, step, speed
        if width is None or len(_joined(parts)) <= width:
            break
        parts[place] = ""
    return _joined(parts)


def _joined(parts: Sequence[str]) -> str:
    return "  ".join(filter(None, parts)).replace("  (best", " (best")


def training(report: TrainReport) -> str:
    best = f"best {percent(report.best_accuracy)} on {counted(report.val_images, 'validation picture')}, at epoch"
    skipped = f", {report.skipped:,} skipped" if report.skipped else ""
    out_of_patience = f"stopped by --patience: no epoch after {report.best_epoch} was better\n"
    patience = out_of_patience if report.stopped_by == "patience" else ""
    return (
        (f"{best} {report.best_epoch} of {report.epochs}\n" if report.best_epoch else "no epoch was validated yet\n")
        + f"{counted(report.train_images, 'training picture')}{skipped}, {counted(report.steps, 'step')},"
        f" {duration(report.seconds)}, {report.peak_rss_mb:,.0f} MB\n{patience}"
    )


def check(report: CheckReport) -> str:
    """What a dry run found, in two lines."""
    compared = (
        "" if report.compared + report.broken >= report.decoded else f", copies looked for among {report.compared:,}"
    )
    return (
        f"{len(report.classes):,} classes, {report.train_images:,} training and {report.val_images:,} validation pictures;"
        f" decoded {report.decoded:,}, {report.broken:,} broken{compared}\n"
        f"{counted(len(report.findings), 'finding')}{'' if report.findings else ': nothing stands out'}\n"
    )


def next_commands(run: str) -> tuple[str, ...]:
    """What to do with a finished run, in lines."""
    quoted = shlex.quote(display_name(run))
    return f"next: mvcr eval --run {quoted}", f"      mvcr predict img.jpg --run {quoted}"


def export(report: ExportReport) -> str:
    difference = f"{report.max_probability_difference:.1e} (allowed {report.tolerance:.0e})"
    return (
        f"{', '.join(map(display_name, report.files))}  {report.format}, {report.megabytes:,.1f} MB\n"
        f"checked on {counted(report.images, 'picture')} at {', '.join(map(display_name, report.sizes))}:"
        f" same class for {percent(report.top1_agreement)}, probabilities differ by at most {difference}\n"
    )


def conversion(report: ConversionReport) -> str:
    return (
        f"{display_name(report.file)}  {report.format}, {report.megabytes:,.1f} MB\n"
        f"{counted(report.tensors, 'tensor')} of {display_name(report.source)}, all of them finite\n"
    )


def evaluation(report: EvalReport) -> RenderableType:
    """Headline with intervals, one row a class, and the confusion matrix when it fits."""
    parts: list[RenderableType] = [Text(_headline(report)), _class_table(report)]
    if len(report.classes) > CLASSES_SHOWN:
        parts.append(Text(f"{len(report.classes) - CLASSES_SHOWN:,} more classes: see --out"))
    if 1 < len(report.confusion) <= CONFUSION_CLASSES:
        parts.append(_confusion_table(report))
    if report.missing_classes:
        names = ", ".join(display_name(name, NAME_CHARACTERS) for name in report.missing_classes[:20])
        parts.append(Text(f"no pictures of {len(report.missing_classes):,} classes: {names}"))
    return Group(*parts)


def _headline(report: EvalReport) -> str:
    top5 = "" if report.top5 is None else f"top-5 {_interval(report.top5)}\n"
    commonest = display_name(report.commonest.label, NAME_CHARACTERS)
    auroc = "" if report.auroc is None else f"  AUROC {report.auroc:.3f}"
    skipped = f", {report.skipped:,} skipped" if report.skipped else ""
    return (
        f"{display_name(report.run)} on {display_name(report.data)}: {counted(report.images, 'picture')}{skipped},"
        f"{_views(report.views)} {duration(report.seconds)}\n"
        f"top-1 {_interval(report.top1)}\n{top5}"
        f"always answering {commonest} would get {percent(report.majority_accuracy)}\n"
        f"balanced accuracy {percent(report.balanced_accuracy)}  macro F1 {report.macro_f1:.3f}{auroc}\n"
        f"loss {report.loss:.3f}  calibration error {percent(report.calibration_error)}\n"
    )


def _views(views: str) -> str:
    """How the network looked, where it was not as usual."""
    return "" if views == "all" else f" --views {views},"


def _interval(share: Interval) -> str:
    return f"{percent(share.value)}  (95 % interval {percent(share.low)} to {percent(share.high)}, n = {share.n:,})"


def _class_table(report: EvalReport) -> Table:
    table = _table("class", "n", "precision", "recall", "F1")
    for row in report.classes[:CLASSES_SHOWN]:
        f1 = "–" if row.f1 is None else f"{row.f1:.3f}"
        table.add_row(_name(row.label), *map(Text, (f"{row.n:,}", percent(row.precision), percent(row.recall), f1)))
    return table


def _confusion_table(report: EvalReport) -> Table:
    labels = [row.label for row in report.classes]
    corner = "true \\ predicted"
    first = max(len(corner), *(len(display_name(label, NAME_CHARACTERS)) for label in labels))
    room = (COLUMNS - 1 - (first + CELL_FRAME)) // len(labels) - CELL_FRAME
    limit = min(max(room - 1, 8), NAME_CHARACTERS)  # a shortened name is one longer
    table = _table(corner, *(display_name(label, limit) for label in labels))
    for index, (label, counts) in enumerate(zip(labels, report.confusion, strict=True)):
        styles = ("bold" if column == index else "red" if count else "dim" for column, count in enumerate(counts))
        table.add_row(
            _name(label), *(Text(f"{count:,}", style=style) for count, style in zip(counts, styles, strict=True))
        )
    return table


def scale_curve(report: ScaleCurveReport) -> RenderableType:
    """Area and worst scale, then one row a scale; another run's columns and the differences beside it."""
    own, other = report.curve, report.against
    columns = ["accuracy %", "95 % interval"] + ([] if other is None else ["other %", "95 % interval", "points"])
    table = _table("scale", *columns)
    for index, point in enumerate(own.points):
        cells = [_number(point.accuracy.value), _bounds(point.accuracy)]
        if other is not None:
            beside = other.points[index].accuracy
            cells += [_number(beside.value), _bounds(beside), f"{100 * (point.accuracy.value - beside.value):+.1f}"]
        table.add_row(Text(factor_text(point.factor)), *map(Text, cells))
    return Group(Text(_curve_headline(report)), table)


def _curve_headline(report: ScaleCurveReport) -> str:
    factors = [factor_text(point.factor) for point in report.curve.points]
    skipped = f", {report.skipped:,} skipped" if report.skipped else ""
    lines = [
        f"{display_name(report.curve.run)} on {display_name(report.data)}: {counted(report.images, 'picture')}{skipped} at "
        f"{len(factors)} scales,{_views(report.views)} {duration(report.seconds)}",
        f"area {percent(report.curve.area)} (mean accuracy over log2 scale from {factors[0]} to {factors[-1]})",
        _extremes(report.curve),
    ]
    if report.against is not None and report.area_difference is not None and report.worst_difference is not None:
        change = report.area_difference
        lines += [
            f"other run {display_name(report.against.run)}: area {percent(report.against.area)}, "
            f"{_extremes(report.against)}",
            f"difference in points: area {100 * change.value:+.1f} (95 % interval {100 * change.low:+.1f} to "
            f"{100 * change.high:+.1f}), worst {100 * report.worst_difference:+.1f}",
        ]
    return "\n".join(lines) + "\n"


def _extremes(curve: ScaleCurve) -> str:
    worst = f"worst {percent(curve.worst_accuracy)} at {factor_text(curve.worst_factor)}"
    return f"{worst}, {percent(curve.accuracy_at_1)} at 1 ({curve.size_px} px)"


def _bounds(share: Interval) -> str:
    return f"{_number(share.low)} to {_number(share.high)}"


def _number(share: float) -> str:
    """In percent, for a column that says so."""
    return f"{100 * share:.1f}"


def benchmark(rows: Sequence[BenchmarkRow]) -> RenderableType:
    """A table for all rows at one input and backend, narrow enough for 80 columns."""
    parts: list[RenderableType] = []
    for (size, batch, backend, where), same in itertools.groupby(rows, _circumstances):
        group = list(same)
        trained = next((f", training in {row.train_precision}" for row in group if row.train_precision), "")
        parts += [Text(f"\n{size} px, batch {batch}, {backend} on {where}{trained}"), _benchmark_table(group)]
    if any(row.views == "auto" for row in rows):
        parts.append(Text("\nviews auto: at best, when the cheapest view is sure at once"))
    return Group(*parts)


def _circumstances(row: BenchmarkRow) -> tuple[int, int, str, str]:
    return row.size_px, row.batch, row.backend, f"{row.device} {row.precision}"


def _benchmark_table(rows: Iterable[BenchmarkRow]) -> Table:
    table = _table(
        "model", "views", "M\nparams", "G mac", "p50 ms", "p95 ms", "img/s", "train\nimg/s", "MB", "x ResNet"
    )
    table.box, table.show_edge, table.pad_edge, table.padding = SIMPLE, False, False, (0, 1, 0, 0)
    for row in rows:
        numbers = (
            f"{row.parameters / 1e6:.2f}", f"{row.mac / 1e9:.3f}", _short(row.forward_p50_ms),
            _short(row.forward_p95_ms), _short(row.forward_images_per_second),
            "–" if row.train_images_per_second is None else _short(row.train_images_per_second),
            f"{row.peak_memory_mb:,.0f}", "–" if row.relative_time is None else f"{row.relative_time:.2f}",
        )  # fmt: skip
        table.add_row(_name(row.model), Text(row.views), *map(Text, numbers))
    return table


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def loader(report: LoaderReport) -> str:
    return (
        f"reading {counted(report.images, 'picture')}: decode {report.decode_images_per_second:,.1f}, loader"
        f" {report.loader_images_per_second:,.1f}, training {report.train_images_per_second:,.1f} images/s"
        f" in {report.train_precision};"
        f" the {report.bottleneck} is the bottleneck\n"
    )


def _table(first: str, *numbers: str) -> Table:
    table = Table(highlight=False)
    table.add_column(Text(first), overflow="fold")
    for name in numbers:
        table.add_column(Text(name), justify="right", overflow="fold")
    return table


def _name(text: str, limit: int = NAME_CHARACTERS) -> Text:
    return Text(display_name(text, limit))
