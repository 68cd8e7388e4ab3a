"""`mvcr benchmark`."""

from __future__ import annotations

import typer

from mvcr_cli.cli import options as o
from mvcr_cli.cli.session import config_of, session_of
from mvcr_cli.config import BenchmarkConfig
from mvcr_cli.records import BenchmarkRow, LoaderReport

SIZES = ",".join(map(str, BenchmarkConfig.sizes))
BATCHES = ",".join(map(str, BenchmarkConfig.batches))


def benchmark(
    ctx: typer.Context,
    models: o.Models = None,
    run: o.BenchmarkRun = BenchmarkConfig.run,
    data: o.BenchmarkData = BenchmarkConfig.data,
    sizes: o.Sizes = SIZES,
    batches: o.Batches = BATCHES,
    classes: o.Classes = BenchmarkConfig.classes,
    rounds: o.Rounds = BenchmarkConfig.rounds,
    no_onnx: o.NoOnnx = not BenchmarkConfig.onnx,
    no_train: o.NoTrain = not BenchmarkConfig.train,
    device: o.Device = BenchmarkConfig.device,
    precision: o.BenchmarkPrecision = BenchmarkConfig.precision,
    threads: o.Threads = BenchmarkConfig.threads,
    workers: o.Workers = BenchmarkConfig.workers,
    json: o.Json = False,
) -> None:
    """Time models against plain ResNets of the same depth."""
    chosen = tuple(models or BenchmarkConfig.models)
    config = config_of(BenchmarkConfig, ctx, models=chosen, onnx=not no_onnx, train=not no_train)
    output = session_of(ctx).output
    from mvcr_cli.cli import tables
    from mvcr_cli.engine.benchmark import benchmark as run_benchmark

    rows: list[BenchmarkRow] = []
    loader: LoaderReport | None = None
    for report in run_benchmark(config, track=output.track, say=output.say):
        if json:
            output.emit(report)
        elif isinstance(report, LoaderReport):
            loader = report
        else:
            rows.append(report)
    if rows:
        output.show(tables.benchmark(rows))
    if loader is not None:
        output.write(tables.loader(loader))
