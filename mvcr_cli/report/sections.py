"""The sections in words and numbers; each is a function of the run, and empty when there is nothing to say."""

from __future__ import annotations

import math
from collections.abc import Mapping

from mvcr_cli.records import EvalReport
from mvcr_cli.report.parts import decimal, duration, grid, percent, plain, section, tile
from mvcr_cli.report.run_files import Finding, RunFiles
from mvcr_cli.report.svg import shown

ADVICE = {
    "leak": "The same pictures are in training and in validation, so the scores are too good.",
    "conflict": "The same pictures have two labels, and one of them is wrong.",
    "alike": "Pictures in validation look the same as some in training, so the scores may be too good.",
    "alike_conflict": "Pictures that look the same have two labels, and one of them may be wrong.",
}
GROUPS = {
    "train": "Training",
    "augment": "Augmentation",
    "model": "Model",
    "preprocess": "Pixels",
    "environment": "Software",
}
UNTOLD = {"started", "dry_run", "resume"}  # how the command was called, not what was trained


def lead(run: RunFiles) -> str:
    """One sentence that says what was trained on what, and how it did."""
    model = shown(str(run.settings["model"].get("name") or run.settings["train"].get("model") or "A network"))
    trained = run.summary.train_images if run.summary else run.pictures.get("train")
    on = f" trained on {trained:,} pictures" if trained else ""
    if run.evaluation is None:
        return f"<bdi>{model}</bdi>{on}."
    right = sum(row[k] for k, row in enumerate(run.evaluation.confusion))
    return (
        f"<bdi>{model}</bdi>{on} tells {len(run.evaluation.classes):,} classes apart and gets "
        f"{right:,} of {run.evaluation.top1.n:,} validation pictures right."
    )


def result(run: RunFiles) -> str:
    """The headline: accuracy with its interval, the scores that accuracy hides, and the cost."""
    notes, tiles = [], []
    if run.evaluation is None:
        notes.append(
            "No evaluation is stored in this run, so intervals, scores of the classes and mistakes are missing here. "
            f"<code>mvcr eval --run {shown(run.option)}</code> measures them."
        )
    else:
        tiles += _scores(run.evaluation)
        notes.append(
            "The best epoch was chosen on these same pictures. Pictures that played no part, given to "
            "<code>mvcr eval</code>, are the fairer judge."
        )
    if run.summary is None:
        notes.append("Training has not finished, so its totals are missing here.")
    tiles += _costs(run)
    body = [_headline(run), grid(tiles)]
    body += [f'<p class="note">{note}</p>' for note in notes]
    return section("Result", "", *body, style="hero")


def data(run: RunFiles) -> str:
    """How many pictures there were, and what was wrong with some."""
    pictures = dict(run.pictures)
    if run.summary:
        pictures = {"train": run.summary.train_images, "val": run.summary.val_images} | pictures
    if not pictures and not run.findings:
        return ""
    names = {"train": "training pictures", "val": "validation pictures", "test": "test pictures"}
    tiles = [tile(names.get(part, part), f"{count:,}") for part, count in pictures.items()]
    if run.summary:
        tiles.append(tile("skipped", f"{run.summary.skipped:,}", "files and folders left out"))
    rows = [
        f'<tr><td><span class="pill">{shown(one.code)}</span></td><td class="n">{one.count:,}</td>'
        f"<td>{_told(one)}</td></tr>"
        for one in run.findings
    ]
    head = '<tr><th>finding</th><th class="n">count</th><th></th></tr>'
    table = f'<table class="warned"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>' if rows else ""
    return section("Data", "", grid(tiles), table)


def _told(one: Finding) -> str:
    """What to think of a finding, and an example; or its own words."""
    if one.code not in ADVICE:
        return shown(one.detail, 400)
    _, _, example = one.detail.partition("for example ")
    return _sentences(ADVICE[one.code], f"For example {example}" if example else one.detail)


def usage(run: RunFiles) -> str:
    option = shown(run.option)
    commands = (
        ("Classify pictures, folders or patterns.", f"mvcr predict img.jpg --run {option}"),
        ("Measure it on other pictures, in one folder a class.", f"mvcr eval ./test --run {option}"),
        ("Make one file that takes pixels and gives probabilities.", f"mvcr export --format onnx --run {option}"),
    )
    return section(
        "Use it", "", *(f'<div><pre>{code}</pre><p class="note">{text}</p></div>' for text, code in commands)
    )


def settings(run: RunFiles) -> str:
    """Everything that was decided, by the user or for them."""
    groups = {key: dict(values) for key, values in run.settings.items()}
    augment = groups["train"].pop("augment", None)
    if isinstance(augment, Mapping):
        groups["augment"] = dict(augment)
    blocks = []
    for key, title in GROUPS.items():
        told = {name: value for name, value in groups.get(key, {}).items() if name not in UNTOLD}
        rows = "".join(f"<dt>{shown(name)}</dt><dd>{shown(plain(value))}</dd>" for name, value in told.items())
        if rows:
            blocks.append(f"<div{' class=long' if len(told) > 16 else ''}><h3>{title}</h3><dl>{rows}</dl></div>")
    return section("Settings", "", f'<div class="columns">{"".join(blocks)}</div>') if blocks else ""


def _headline(run: RunFiles) -> str:
    report = run.evaluation
    if report is None:
        known = [epoch.best_accuracy for epoch in run.epochs if math.isfinite(epoch.best_accuracy)]
        best = run.summary.best_accuracy if run.summary else max(known, default=None)
        return f'<div><p class="big">{percent(best)}</p><p class="name">best validation accuracy</p></div>'
    top1 = report.top1
    base = report.majority_accuracy
    track = (
        f'<i class="base" style="left:{100 * base:.2f}%"></i>'
        f'<i class="span" style="left:{100 * top1.low:.2f}%;width:{100 * (top1.high - top1.low):.2f}%"></i>'
        f'<i class="mark" style="left:{100 * top1.value:.2f}%"></i>'
    )
    interval = f"95\u202f% interval {percent(top1.low)} to {percent(top1.high)}, from {top1.n:,} pictures."
    guess = f"Always answering <bdi>{shown(report.commonest.label, 40)}</bdi> would get {percent(base)}, the grey mark."
    return (
        f'<div><p class="big">{percent(top1.value)}</p><p class="name">validation accuracy of the best epoch</p>'
        f'<div class="track">{track}</div><p class="ends"><span>0\u202f%</span><span>100\u202f%</span></p>'
        f'<p class="note">{interval} {guess}</p></div>'
    )


def _scores(report: EvalReport) -> list[str]:
    top5 = [tile("Top-5 accuracy", percent(report.top5.value), "class among the best five")] if report.top5 else []
    auroc = "–" if report.auroc is None else f"{report.auroc:.3f}"
    return [
        tile("Balanced accuracy", percent(report.balanced_accuracy), "each class counts the same"),
        tile("Macro F1", decimal(report.macro_f1), "mean F1 of the classes"),
        *top5,
        tile("AUROC", auroc, "1 ranks perfectly, 0.5 is a coin"),
        tile("Calibration error", percent(report.calibration_error), "distance from confidence to accuracy"),
        tile("Loss", decimal(report.loss), "mean, in nats"),
    ]


def _costs(run: RunFiles) -> list[str]:
    speeds = sorted(epoch.images_per_second for epoch in run.epochs if math.isfinite(epoch.images_per_second))
    speed = [tile("Training speed", f"{speeds[len(speeds) // 2]:,.0f}/s", "pictures, median epoch")] if speeds else []
    if run.summary is None:
        return speed
    done = f"best epoch {run.summary.best_epoch:,} of {run.summary.epochs:,}"
    stopped = "" if run.summary.stopped_by == "finished" else f"; ended by {shown(run.summary.stopped_by, 40)}"
    return [
        tile("Training time", duration(run.summary.seconds), done + stopped),
        *speed,
        tile("Peak memory", f"{run.summary.peak_rss_mb:,.0f} MB", "of the training process"),
    ]


def _sentences(*parts: str) -> str:
    return " ".join(shown(part, 400) for part in parts if part)
