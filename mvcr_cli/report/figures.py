"""The sections that draw: learning curves, the confusion matrix, and the table of classes."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence

from mvcr_cli.records import ClassReport, EpochReport
from mvcr_cli.report.parts import decimal, finite_or, percent, section, table
from mvcr_cli.report.plots import LABELLED, confusion_png
from mvcr_cli.report.run_files import RunFiles
from mvcr_cli.report.svg import Series, confusion_chart, line_chart, shown

LISTED = 60  # classes in the table before it shows the weakest first
WEAKEST = 20
PAIRS = 10
NAME_CHARS = 80


def curves(run: RunFiles) -> str:
    """Loss, accuracy, picture size and learning rate over epochs."""
    if not run.epochs:
        return section("Learning curves", "No epoch has been recorded yet.")
    first_best = max(run.epochs, key=lambda epoch: (finite_or(epoch.val_accuracy, -1.0), -epoch.epoch))
    best = run.summary.best_epoch if run.summary else first_best.epoch
    loss = (
        Series("training loss", "other", [epoch.train_loss for epoch in run.epochs]),
        Series("validation loss", "main", [epoch.val_loss for epoch in run.epochs]),
    )
    charts = (
        _chart(run.epochs, "Loss", loss, lambda value: f"{value:.4g}"),
        _chart(run.epochs, "Validation accuracy", [_series(run, "val_accuracy")], _percent_tick, best),
        _chart(run.epochs, "Picture size, px", [_series(run, "size_px", steps=True)], lambda value: f"{value:.4g}"),
        _chart(run.epochs, "Learning rate", [_series(run, "lr")], _scientific),
    )
    note = (
        f"The dot marks the best epoch, {best}; its weights are the run's result. The training loss is of augmented pictures "
        "and counts all that is taught, such as the verdicts of tiles, so it may lie above the validation loss."
    )
    return section("Learning curves", note, f'<div class="pair">{"".join(charts)}</div>')


def mistakes(run: RunFiles) -> str:
    """The confusion matrix and the pairs that are mixed up most."""
    report = run.evaluation
    if report is None:
        return ""
    labels = [one.label for one in report.classes]
    if len(labels) <= LABELLED:
        matrix = confusion_chart(report.confusion, labels)
    else:
        png = base64.b64encode(confusion_png(report.confusion, labels)).decode()
        matrix = f'<img class="picture" alt="confusion matrix" src="data:image/png;base64,{png}">'
    note = "Rows are true classes; a stronger colour is a larger share of the row."
    return section("Mistakes", note, matrix, _frequent(report.confusion, labels))


def classes(run: RunFiles) -> str:
    """Precision, recall and F1 of each class; of many classes the weakest first."""
    if run.evaluation is None:
        return ""
    reports = run.evaluation.classes
    missing = run.evaluation.missing_classes
    note = "Recall: the share of a class that is found. Precision: the share of its answers that are right."
    absent = f'<p class="note">No validation picture: {", ".join(map(shown, missing[:50]))}.</p>' if missing else ""
    if len(reports) <= LISTED:
        return section("Classes", note, _class_table(reports), absent)
    weakest = sorted((one for one in reports if one.f1 is not None), key=lambda one: one.f1 or 0.0)[:WEAKEST]
    everything = f"<details><summary>All {len(reports):,} classes</summary>{_class_table(reports)}</details>"
    return section("Classes", f"{note} The {WEAKEST} weakest come first.", _class_table(weakest), everything, absent)


def _frequent(confusion: Sequence[Sequence[int]], labels: Sequence[str]) -> str:
    pairs = [
        (count, count / sum(row), labels[i], labels[j])
        for i, row in enumerate(confusion)
        for j, count in enumerate(row)
        if i != j and count
    ]
    if not pairs:
        return '<p class="note">There is no mistake among these pictures.</p>'
    pairs.sort(key=lambda pair: (-pair[0], -pair[1]))
    rows = [
        f'<tr>{_label(true)}{_label(guess)}<td class="n">{count:,}</td><td class="n">{percent(share)}</td></tr>'
        for count, share, true, guess in pairs[:PAIRS]
    ]
    head = '<tr><th>true class</th><th>taken for</th><th class="n">pictures</th><th class="n">of the class</th></tr>'
    return f"<div><h3>Most frequent mistakes</h3>{table(head, rows)}</div>"


def _class_table(reports: Sequence[ClassReport]) -> str:
    rows = [
        f'<tr>{_label(one.label)}<td class="n">{one.n:,}</td>'
        f'<td class="n">{percent(one.precision)}</td><td class="n">{percent(one.recall)}</td>'
        f'<td class="n">{decimal(one.f1)}</td>'
        f'<td class="bar"><i style="width:{100 * finite_or(one.f1, 0.0):.1f}%"></i></td></tr>'
        for one in reports
    ]
    columns = "".join(f'<th class="n">{name}</th>' for name in ("pictures", "precision", "recall", "F1"))
    return table(f"<tr><th>class</th>{columns}<th></th></tr>", rows)


def _label(name: str) -> str:
    return f'<td class="label"><bdi>{shown(name, NAME_CHARS)}</bdi></td>'


def _chart(
    epochs: Sequence[EpochReport],
    title: str,
    lines: Sequence[Series],
    write: Callable[[float], str],
    best: int | None = None,
) -> str:
    marks = "".join(f'<i class="{line.style}"></i>{line.name}' for line in lines)
    legend = f'<span class="legend">{marks}</span>' if len(lines) > 1 else ""
    chart = line_chart(f"{title} over epochs", [epoch.epoch for epoch in epochs], lines, write, best)
    return f"<div><h3>{legend}{title}</h3>{chart}</div>"


def _series(run: RunFiles, field: str, *, steps: bool = False) -> Series:
    return Series(field.replace("_", " "), "main", [getattr(epoch, field) for epoch in run.epochs], steps)


def _percent_tick(share: float) -> str:
    return f"{100 * share:.4g}\u202f%"


def _scientific(value: float) -> str:
    """`7.5e-4`: a learning rate in few characters."""
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}" if value else "0"
