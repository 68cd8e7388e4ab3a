"""`mvcr eval --scales`."""

from __future__ import annotations

from pathlib import Path

import typer

from mvcr_cli.cli.output import is_bad
from mvcr_cli.cli.session import session_of
from mvcr_cli.config import EvalConfig
from mvcr_cli.errors import ExitCode
from mvcr_cli.paths import display_name, make_folder, write_json, write_whole
from mvcr_cli.records import ScaleCurveReport, record


def show_scale_curve(ctx: typer.Context, config: EvalConfig, json: bool) -> None:
    """Measure accuracy against object scale, show it, and write it to a folder."""
    output = session_of(ctx).output
    from mvcr_cli.cli import tables
    from mvcr_cli.engine.scale_curve import scale_curve

    report, problems = scale_curve(config, track=output.track, say=output.say)
    if json:
        output.emit(report)
    else:
        output.show(tables.scale_curve(report))
    if config.out is not None:
        _write(config.out, report)
        output.say(f"written: {display_name(config.out)}")
    output.problems(problems)
    if not config.keep_going and any(map(is_bad, problems)):
        raise typer.Exit(ExitCode.BAD_DATA)


def _write(folder: Path, report: ScaleCurveReport) -> None:
    from mvcr_cli.report.scale_plot import scale_png

    make_folder(folder)
    write_json(folder / "scales.json", record(report))
    write_whole(folder / "scales.png", scale_png(report))
