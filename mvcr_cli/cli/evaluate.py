"""`mvcr eval`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import typer

from mvcr_cli.cli import options as o
from mvcr_cli.cli.output import is_bad
from mvcr_cli.cli.scale_curve import show_scale_curve
from mvcr_cli.cli.session import config_of, session_of
from mvcr_cli.config import EvalConfig
from mvcr_cli.errors import CannotCreate, ExitCode, NotPermitted, UsageError
from mvcr_cli.paths import (
    csv_text,
    display_name,
    json_path,
    make_folder,
    refuse_inside,
    to_json,
    write_json,
    write_whole,
)
from mvcr_cli.records import EvalReport, ImageResult, Problem, record

FILE_SUFFIXES = (".csv", ".jsonl")
# A folder may well be called results.v2; with one of these it would be taken for the file that was asked for.
OTHER_SUFFIXES = frozenset({
    ".txt", ".log", ".md", ".json", ".ndjson", ".xml", ".yaml", ".yml", ".toml", ".html", ".htm", ".pdf", ".png",
    ".jpg", ".jpeg", ".svg", ".tsv", ".xls", ".xlsx", ".ods", ".parquet", ".feather", ".arrow", ".npy", ".npz", ".h5",
    ".hdf5", ".pkl", ".pickle", ".db", ".sqlite", ".zip", ".gz", ".onnx", ".pt", ".pt2", ".pth", ".safetensors",
})  # fmt: skip
RUN_FILES = ("findings.jsonl", "metrics.jsonl", "results.csv")


def evaluate(
    ctx: typer.Context,
    data: o.EvalData = EvalConfig.data,
    run: o.Run = EvalConfig.run,
    scales: o.EvalScales = EvalConfig.scales,
    against: o.Against = EvalConfig.against,
    ignore_extra_classes: o.IgnoreExtraClasses = EvalConfig.ignore_extra_classes,
    follow_links: o.FollowLinks = EvalConfig.follow_links,
    views: o.Views = EvalConfig.views,
    batch: o.Batch = EvalConfig.batch,
    workers: o.Workers = EvalConfig.workers,
    device: o.Device = EvalConfig.device,
    precision: o.Precision = EvalConfig.precision,
    out: o.EvalOut = EvalConfig.out,
    keep_going: o.KeepGoing = EvalConfig.keep_going,
    json: o.Json = False,
) -> None:
    """Measure how far a run can be trusted; with --scales, how well it holds when objects change size."""
    config = config_of(EvalConfig, ctx)
    if config.out is not None:
        check_name(config.out, config.scales is not None)
        check_out(config.out)
        if config.data is not None:
            refuse_inside(config.data, config.out, "the results", "an --out")
    if config.scales is not None:
        show_scale_curve(ctx, config, json)
        return
    output = session_of(ctx).output
    from mvcr_cli.cli import tables
    from mvcr_cli.engine.evaluate import evaluate as run_evaluation

    report, results, problems = run_evaluation(config, track=output.track, say=output.say)
    if json:
        output.emit(report)
    else:
        output.show(tables.evaluation(report))
    if config.out is not None:
        _write(config.out, report, results, problems)
        output.say(f"written: {display_name(config.out)}")
    output.problems(problems)
    if not keep_going and any(map(is_bad, problems)):
        raise typer.Exit(ExitCode.BAD_DATA)


def check_name(out: Path, over_scales: bool) -> None:
    """Refuse a name that promises a file which is not written. A folder that is there may have any name.

    Raises: UsageError.
    """
    if over_scales and _is_file(out):
        raise UsageError(
            f"--out {display_name(out)}: a curve over --scales has no predictions to list",
            "name a folder, for scales.json and scales.png",
        )
    if out.suffix.lower() in OTHER_SUFFIXES and not out.exists():
        folder = display_name(out.with_suffix(""))
        raise UsageError(
            f"--out {display_name(out)}: eval writes no {display_name(out.suffix)} file",
            f"name a folder, as in --out {folder}" + ("" if over_scales else f", or a file, {folder}.csv or .jsonl"),
        )


def check_out(out: Path) -> None:
    """Refuse before the work what could not be written after it.

    Raises: CannotCreate, NotPermitted.
    """
    is_file = _is_file(out)
    if is_file and out.is_dir():
        raise CannotCreate(f"--out {display_name(out)} is a folder", "choose another name, or a folder without suffix")
    if not is_file and out.exists() and not out.is_dir():
        raise CannotCreate(
            f"--out {display_name(out)} exists and is no folder", "write FILE.csv, FILE.jsonl or a folder"
        )
    if _is_of_run(out):
        raise CannotCreate(
            f"--out {display_name(out)} would replace what a run keeps of itself",
            f"choose a folder of its own, as in --out {display_name(_place(out) / 'eval')}",
        )
    place = _place(out)
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise CannotCreate(f"{display_name(place)} is no folder", "choose another --out")
    if not os.access(place, os.W_OK | os.X_OK):
        raise NotPermitted(f"cannot write to {display_name(place)}", "choose a folder that you may write, with --out")


def _is_of_run(out: Path) -> bool:
    """Whether it is the folder of a run, or one of the files that a run has in it."""
    place = _place(out)
    is_run = (place / "config.json").is_file() and (place / "weights").is_dir()
    return is_run and (place == out or out.name in RUN_FILES)


def _place(out: Path) -> Path:
    """The folder that results go to."""
    return out.parent if _is_file(out) else out


def _is_file(out: Path) -> bool:
    return out.suffix.lower() in FILE_SUFFIXES


def _write(out: Path, report: EvalReport, results: Sequence[ImageResult], problems: Sequence[Problem]) -> None:
    make_folder(_place(out))
    if _is_file(out):
        write_whole(out, _csv(results) if out.suffix.lower() == ".csv" else _json_lines(results, problems))
    else:
        from mvcr_cli.report.plots import confusion_png

        write_whole(out / "predictions.csv", _csv(results))
        write_whole(out / "predictions.jsonl", _json_lines(results, problems))
        write_json(out / "eval.json", record(report))
        write_whole(out / "confusion.png", confusion_png(report.confusion, [row.label for row in report.classes]))


def _csv(results: Sequence[ImageResult]) -> str:
    return csv_text(
        ("path", "label", "predicted", "correct", "probability"),
        ((json_path(r.path)["path"], r.label, r.predicted, int(r.correct), f"{r.probability:.6f}") for r in results),
    )


def _json_lines(results: Sequence[ImageResult], problems: Sequence[Problem]) -> str:
    return "".join(to_json(record(result)) + "\n" for result in (*results, *problems))
