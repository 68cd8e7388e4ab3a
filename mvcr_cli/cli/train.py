"""`mvcr train`."""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path

import typer

from mvcr_cli.cli import options as o
from mvcr_cli.cli.output import Output
from mvcr_cli.cli.session import config_of, session_of, was_given
from mvcr_cli.cli.signals import CODES, StopRequest
from mvcr_cli.config import AugmentConfig, TrainConfig
from mvcr_cli.paths import display_name, write_whole
from mvcr_cli.records import CheckReport, EpochReport, PicturePair, Problem, TrainReport

NO_AUGMENT = AugmentConfig(
    crop=1.0, zoom=0.0, shear=0.0, shift=0.0, rotate=0.0, hflip=False, vflip=False, turn=False,
    trivial=0.0, erase=0.0, resolution=0.0, mixup=0.0, cutmix=0.0,
)  # fmt: skip


def train(
    ctx: typer.Context,
    data: o.TrainData,
    val: o.Val = TrainConfig.val,
    split: o.Split = TrainConfig.split,
    name: o.Name = None,
    run: o.NewRun = TrainConfig.run,
    strict: o.Strict = TrainConfig.strict,
    resume: o.Resume = TrainConfig.resume,
    dry_run: o.DryRun = TrainConfig.dry_run,
    follow_links: o.FollowLinks = TrainConfig.follow_links,
    model: o.Model = TrainConfig.model,
    weights: o.Weights = TrainConfig.weights,
    imgsz: o.ImgSize = TrainConfig.imgsz,
    fit: o.Fit = TrainConfig.fit,
    scales: o.Scales = TrainConfig.scales,
    layers: o.Layers = TrainConfig.layers,
    zoom_mode: o.ZoomMode = TrainConfig.zoom_mode,
    tiles: o.Tiles = TrainConfig.tiles,
    tile_px: o.TilePx = TrainConfig.tile_px,
    epochs: o.Epochs = TrainConfig.epochs,
    seconds: o.Seconds = TrainConfig.seconds,
    batch: o.TrainBatch = TrainConfig.batch,
    accumulate: o.Accumulate = TrainConfig.accumulate,
    lr: o.Lr = TrainConfig.lr,
    weight_decay: o.WeightDecay = TrainConfig.weight_decay,
    warmup: o.Warmup = TrainConfig.warmup,
    clip: o.Clip = TrainConfig.clip,
    label_smoothing: o.LabelSmoothing = TrainConfig.label_smoothing,
    unsure: o.Unsure = TrainConfig.unsure,
    distill: o.Distill = TrainConfig.distill,
    ema: o.Ema = TrainConfig.ema,
    precise_bn: o.PreciseBn = TrainConfig.precise_bn,
    balance: o.Balance = TrainConfig.balance,
    no_progressive: o.NoProgressive = not TrainConfig.progressive,
    patience: o.Patience = TrainConfig.patience,
    no_augment: o.NoAugment = False,
    crop: o.Crop = AugmentConfig.crop,
    zoom: o.Zoom = AugmentConfig.zoom,
    shear: o.Shear = AugmentConfig.shear,
    shift: o.Shift = AugmentConfig.shift,
    rotate: o.Rotate = AugmentConfig.rotate,
    hflip: o.HFlip = AugmentConfig.hflip,
    vflip: o.VFlip = AugmentConfig.vflip,
    turn: o.Turn = AugmentConfig.turn,
    trivial: o.Trivial = AugmentConfig.trivial,
    erase: o.Erase = AugmentConfig.erase,
    resolution: o.Resolution = AugmentConfig.resolution,
    coarsest: o.Coarsest = AugmentConfig.coarsest,
    mixup: o.MixUp = AugmentConfig.mixup,
    cutmix: o.CutMix = AugmentConfig.cutmix,
    cache_mb: o.CacheMb = TrainConfig.cache_mb,
    memory_mb: o.Memory = TrainConfig.memory_mb,
    workers: o.Workers = TrainConfig.workers,
    threads: o.Threads = TrainConfig.threads,
    device: o.Device = TrainConfig.device,
    precision: o.Precision = TrainConfig.precision,
    seed: o.Seed = TrainConfig.seed,
    save_every: o.SaveEvery = TrainConfig.save_every,
    offline: o.Offline = TrainConfig.offline,
    json: o.Json = False,
) -> None:
    """Train a classifier on a folder of pictures, one folder a class.

    What is not given is fitted to the data and the machine, shown, and recorded in the run.
    """
    config = config_of(
        TrainConfig,
        ctx,
        run=o.run_folder(name, run),
        progressive=not no_progressive,
        augment=_augment(ctx),
        started=ctx.obj.started,
    )
    _train(ctx, config, json)


def _augment(ctx: typer.Context) -> AugmentConfig:
    """The augmentation options; beside `--no-augment` only those that were given."""
    if not ctx.params["no_augment"]:
        return config_of(AugmentConfig, ctx)
    off = {field.name: getattr(NO_AUGMENT, field.name) for field in fields(AugmentConfig)}
    given = {name for name in off if was_given(ctx, name)}
    return config_of(AugmentConfig, ctx, **{name: value for name, value in off.items() if name not in given})


def _train(ctx: typer.Context, config: TrainConfig, json: bool) -> None:
    output = session_of(ctx).output
    from mvcr_cli.cli import tables
    from mvcr_cli.engine.train import train as run_training

    left_out: list[Problem] = []
    with StopRequest() as stop:
        for report in run_training(config, track=output.track, say=output.say, stop=stop):
            if isinstance(report, EpochReport):
                output.epoch(report)
                continue
            if isinstance(report, Problem | PicturePair | CheckReport):
                _show_check(output, report, left_out, json)
                continue
            stopped = report.stopped_by in CODES
            if not stopped:
                _write_report(Path(report.run))
            if json:
                output.emit(report)
            else:
                output.write(tables.training(report))
                for line in () if stopped else tables.next_commands(report.run):
                    output.say(line)
            if stopped:
                output.say(f"stopped by {report.stopped_by}; go on with {_resuming(config, report)}")
                raise typer.Exit(CODES[report.stopped_by])


def _show_check(
    output: Output, found: Problem | PicturePair | CheckReport, left_out: list[Problem], json: bool
) -> None:
    """The result of a dry run: every record as JSON, or the names of the files and the sum for a person."""
    from mvcr_cli.cli import tables

    if json:
        output.emit(found)
    elif isinstance(found, CheckReport):
        output.problems(left_out)
        output.write(tables.check(found))
    elif isinstance(found, Problem):
        left_out.append(found)


def _write_report(run: Path) -> None:
    """`report.html` and `plots/confusion.png` of a finished run, as far as they are missing."""
    from mvcr_cli.report.html import write_report
    from mvcr_cli.report.plots import confusion_png
    from mvcr_cli.report.run_files import read_run

    page, plot = run / "report.html", run / "plots" / "confusion.png"
    if not page.exists():
        write_report(run)
    if not plot.exists() and (found := read_run(run).evaluation) is not None:
        plot.parent.mkdir(exist_ok=True)
        write_whole(plot, confusion_png(found.confusion, [row.label for row in found.classes]))


def _resuming(config: TrainConfig, report: TrainReport) -> str:
    """The other options must stay as they were, so the command is not written out."""
    where = "" if config.run is not None else f"--run {shlex.quote(display_name(report.run))} "
    return f"the same command and {where}--resume"
