"""`mvcr export`."""

from __future__ import annotations

import typer

from mvcr_cli.cli import options as o
from mvcr_cli.cli.session import config_of, session_of, was_given
from mvcr_cli.config import ExportConfig


def export(
    ctx: typer.Context,
    run: o.Run = ExportConfig.run,
    from_torch: o.FromTorch = ExportConfig.from_torch,
    format: o.ExportFormat = ExportConfig.format,  # noqa: A002
    views: o.ExportViews = ExportConfig.views,
    out: o.ExportOut = ExportConfig.out,
    images: o.Images = ExportConfig.images,
    tolerance: o.Tolerance = ExportConfig.tolerance,
    overwrite: o.Overwrite = ExportConfig.overwrite,
    json: o.Json = False,
) -> None:
    """Write a run as a file, or three where it zooms, checked against the run; or convert a torch file to weights."""
    # --format has a default for runs; a torch file has one format.
    only = {} if from_torch is None or was_given(ctx, "format") else {"format": "safetensors"}
    config = config_of(ExportConfig, ctx, **only)
    if config.from_torch is not None:
        _convert(ctx, config, json)
        return
    output = session_of(ctx).output
    from mvcr_cli.cli import tables
    from mvcr_cli.engine.export import export as run_export

    report = run_export(config, track=output.track, say=output.say)
    if json:
        output.emit(report)
    else:
        output.write(tables.export(report))


def _convert(ctx: typer.Context, config: ExportConfig, json: bool) -> None:
    output = session_of(ctx).output
    from mvcr_cli.cli import tables
    from mvcr_cli.engine.convert import convert

    report = convert(config)
    if json:
        output.emit(report)
    else:
        output.write(tables.conversion(report))
