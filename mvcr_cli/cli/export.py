"""`mvcr export`."""

from __future__ import annotations

import typer

from mvcr_cli.cli import options as o
from mvcr_cli.cli.session import config_of, session_of
from mvcr_cli.config import ExportConfig


def export(
    ctx: typer.Context,
    run: o.Run = ExportConfig.run,
    format: o.ExportFormat = ExportConfig.format,  # noqa: A002
    views: o.Views = ExportConfig.views,
    out: o.ExportOut = ExportConfig.out,
    images: o.Images = ExportConfig.images,
    tolerance: o.Tolerance = ExportConfig.tolerance,
    overwrite: o.Overwrite = ExportConfig.overwrite,
    json: o.Json = False,
) -> None:
    """Write a run as one file, checked against the run."""
    config = config_of(ExportConfig, ctx)
    output = session_of(ctx).output
    from mvcr_cli.cli import tables
    from mvcr_cli.engine.export import export as run_export

    report = run_export(config, track=output.track, say=output.say)
    if json:
        output.emit(report)
    else:
        output.write(tables.export(report))
