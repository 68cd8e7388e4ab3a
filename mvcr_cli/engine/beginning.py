"""The beginning of a run: its folder, its settings made final, its network; a resumed run must agree with what it was."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mvcr_cli import __version__
from mvcr_cli.config import Layer, ModelConfig, TrainConfig, ZoomConfig, factor_text
from mvcr_cli.data.places import covering_scale
from mvcr_cli.data.preprocess import Preprocess
from mvcr_cli.engine import Say, pick_precision
from mvcr_cli.engine.agreement import agree, check_machine, no_record
from mvcr_cli.engine.evaluate import split_record
from mvcr_cli.engine.loss import class_weights, taught_sureness
from mvcr_cli.engine.optim import WeightAverage, make_optimiser
from mvcr_cli.engine.prepare import Prepared, default_model, fit_settings, is_large, stem_for
from mvcr_cli.engine.rundir import FORMAT_VERSION, RunDirectory
from mvcr_cli.engine.session import Session
from mvcr_cli.engine.starting import Start, for_classes, restarted, starting_weights
from mvcr_cli.errors import CannotCreate, CheckpointError, UsageError
from mvcr_cli.models import Network, build, config_for, load_trunk, useful_scales
from mvcr_cli.models.mvcr import trunk_side
from mvcr_cli.paths import display_name, write_json

CANDIDATES, CANDIDATES_PER_TILE = 128, 8
COVERED_UP_TO = 2.5  # pixels of a picture to one of its tiles; 1 and 2 where tiles are searched for


@contextlib.contextmanager
def torch_settings_kept() -> Iterator[None]:
    """Training sets what torch keeps for the whole process; whoever called it gets back what was there."""
    threads, random_state = torch.get_num_threads(), torch.get_rng_state()
    exact = torch.get_deterministic_debug_mode()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(random_state)
        torch.set_deterministic_debug_mode(exact)
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]


def claim_run(config: TrainConfig, held: contextlib.ExitStack) -> RunDirectory | None:
    """The run that is named and there already, with its lock in `held`; None when it is to be made.

    This comes before the data are read, and makes nothing where it refuses.

    Raises:
        CannotCreate: the folder is something else than a run, or holds one that is not to be resumed.
        RunBusy: another process writes it.
    """
    if config.run is None:
        return None
    run = RunDirectory(config.run)
    if run.is_foreign():
        raise CannotCreate(
            f"{display_name(run.path)} exists and is no run", "choose another folder with --name or --run"
        )
    if config.dry_run:  # which writes nothing, and needs no lock
        _refuse_begun(run, config)
        return None
    there = run.lock.exists() or (config.resume and run.config.exists())
    if there:
        held.enter_context(run.locked())
    _refuse_begun(run, config)
    if there:
        run.create()
    return run if there else None


def make_run(config: TrainConfig, held: contextlib.ExitStack, say: Say) -> tuple[RunDirectory, Start | None]:
    """A run that was not there, with its lock in `held`; and the first weights when the name of the run needed them.

    Weights are fetched under the lock of the run where that is possible, so that a busy run downloads nothing.

    Raises: CannotCreate, RunBusy when another process was faster.
    """
    start = None
    if config.run is None:
        start = starting_weights(config, say)
        run = RunDirectory.numbered(default_model(config, start.pretrained))
    else:
        run = RunDirectory(config.run)
    run.create()
    held.enter_context(run.locked())
    _refuse_begun(run, config)
    return run, start


def _refuse_begun(run: RunDirectory, config: TrainConfig) -> None:
    if run.config.exists() and not config.resume:
        raise CannotCreate(
            f"{display_name(run.path)} holds a run already",
            "choose another folder with --name or --run, or go on with it: --resume",
        )


def begin(config: TrainConfig, prepared: Prepared, run: RunDirectory, start: Start | None, device: torch.device,
          say: Say) -> Session:  # fmt: skip
    """Settings, network and optimiser of a new run, or of a resumed one (`config.json` is there).

    A new run's settings and split are written before its first step.
    """
    stored = run.read_config() if run.config.exists() else None
    if stored is not None:
        start = _start_again(config, stored, run, say)
        settings = agree(config, stored, prepared, run)
        check_machine(config, settings, stored, run, device, say)
    else:
        start = start or starting_weights(config, say)
        settings = fit_settings(config, prepared, device, start.pretrained, say)
    assert settings.imgsz is not None and settings.model is not None and settings.threads is not None
    torch.set_num_threads(settings.threads)
    # What `use_deterministic_algorithms` does, without the compiler that it loads only to tell it.
    torch.set_deterministic_debug_mode("error" if device.type == "cpu" else "warn")
    # Every operation here writes what it allocates, so filling the memory first is time for nothing.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.manual_seed(settings.seed)
    side = trunk_side(settings.imgsz, "detail" in (settings.layers or ()))
    stem = start.stem or stem_for(side)
    zoom = zoom_of(config, settings, prepared.sides) if stored is None else _stored_zoom(stored, run)
    model = config_for(settings.model, len(prepared.classes), scales=settings.scales, stem=stem, layers=settings.layers)
    model = replace(model, scales=useful_scales(model.scales, side, stem), zoom=zoom)
    model = replace(model, sure=max(1e-3, model.sure * taught_sureness(model.classes, settings.label_smoothing)))
    if settings.unsure:
        model = replace(model, taught=(1.0,), surest=True)
    session, start = _session(settings, prepared, start, model, device, say)
    precision = str(session.dtype).removeprefix("torch.")
    if stored is None:
        _record(run, settings, prepared, start, session, precision)
    epochs = "1 epoch" if settings.epochs == 1 else f"{settings.epochs} epochs"
    length = f"{settings.seconds:.0f} s" if settings.seconds else epochs
    for text in _given_up(config, settings, model.scales):
        say(text)
    say(
        f"run {display_name(run.path)}: {settings.model} from {start.source}, {settings.imgsz} px, "
        f"views {_views_text(model)}{_layers_text(settings.layers)}, batch {settings.batch}, "
        f"learning rate {settings.lr:.2g}, {length}, {precision} on {device.type}"
    )
    if text := _zoom_text(config, settings.imgsz, prepared, model.zoom):
        say(text)
    return session


def _given_up(config: TrainConfig, settings: TrainConfig, scales: tuple[float, ...]) -> Iterator[str]:
    """What was asked for and cannot be had with these pictures."""
    if config.batch is not None and settings.batch != config.batch:
        yield f"warning: --batch {config.batch} is more than the training pictures: {settings.batch}"
    lost = [scale for scale in config.scales or () if scale not in scales]
    if lost:
        yield (
            f"warning: --scales {','.join(map(factor_text, lost))}: too small to see anything at {settings.imgsz} px, "
            "left out; a larger --imgsz would keep it"
        )
    if settings.unsure and len(scales) == 1:
        yield "warning: --unsure teaches when to doubt, but with one view there is no surer one; see --scales"


def _start_again(config: TrainConfig, stored: dict[str, Any], run: RunDirectory, say: Say) -> Start:
    """Where a resumed run began; with its first weights when it has nothing else to go on from."""
    try:
        start = Start.restored(stored["start"])
    except (KeyError, TypeError) as error:
        raise no_record(run) from error
    return start if run.has_state() else restarted(config, start, say)


def _zoom_text(config: TrainConfig, imgsz: int, prepared: Prepared, zoom: ZoomConfig | None) -> str:
    """That the run zooms and why, or why it does not although its pictures are large."""
    if zoom is not None:
        width, height = prepared.sides
        scale = covering_scale(prepared.sides, zoom)
        why = f"median {width}x{height} px" if config.zoom_mode == "auto" else "as asked"
        tiles = (
            f"{zoom.tiles} tiles of {zoom.tile_px} px side by side, which cover {width}x{height} px at "
            f"{'full' if scale < 1.005 else f'1/{scale:.3g} of their'} size, so none is searched for"
            if zoom.covers
            else f"the best {zoom.tiles} of {zoom.candidates} tiles of {zoom.tile_px} px"
        )
        return f"zoom: on ({why}): a glance of {imgsz} px, and {tiles}; --zoom off looks at the whole only"
    if config.zoom_mode == "auto" and config.zoom_hindrance and is_large(prepared.longer, imgsz):
        return f"zoom: off although the pictures are large: it does not go with {config.zoom_hindrance}"
    return ""


def _stored_zoom(stored: dict[str, Any], run: RunDirectory) -> ZoomConfig | None:
    """How a resumed run zooms: as it began, whatever this version would choose."""
    try:
        return ModelConfig.from_dict(stored["model"]).zoom
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, UsageError) as error:
        raise no_record(run) from error


def zoom_of(config: TrainConfig, settings: TrainConfig, sides: tuple[int, int]) -> ZoomConfig | None:
    """How a new run zooms.

    Where so many tiles are asked for that they cover the pictures, hardly coarser than tiles are anyway, there is
    nothing to search for.

    Args:
        config: what is asked for; `settings` are it with all that was left open.
        sides: median width and height of the pictures in pixels.
    """
    if settings.zoom_mode != "on":
        return None
    assert settings.tiles is not None and settings.tile_px is not None
    covering = ZoomConfig(tiles=settings.tiles, candidates=settings.tiles, tile_px=settings.tile_px, covers=True)
    if config.tiles is not None and covering_scale(sides, covering) <= COVERED_UP_TO:
        return covering
    return replace(covering, candidates=max(CANDIDATES, CANDIDATES_PER_TILE * settings.tiles), covers=False)


def _views_text(model: ModelConfig) -> str:
    """The scale set, and which of it learns labels where not all of it does."""
    taught = () if model.taught in (None, model.scales) else model.taught
    learn = f" (taught: {', '.join(map(factor_text, taught))})" if taught else ""
    return f"{', '.join(map(factor_text, model.scales))}{learn}"


def _layers_text(layers: tuple[Layer, ...] | None) -> str:
    """What was asked for instead of the preset's own layers."""
    return "" if layers is None else f", layers {', '.join(layers) or 'none'}"


def _record(run: RunDirectory, settings: TrainConfig, prepared: Prepared, start: Start, session: Session,
            precision: str) -> None:  # fmt: skip
    """`split.json` and `config.json`: everything that the run needs to be repeated."""
    write_json(run.split, split_record(prepared.train, prepared.val, prepared.classes, settings.data))
    environment = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": session.device.type,
        "precision": precision,
    }
    write_json(
        run.config,
        {
            "format_version": FORMAT_VERSION,
            "mvcr": __version__,
            "train": settings.to_dict(),
            "model": session.network.config.to_dict(),
            "start": start.to_dict(),
            "preprocess": session.preprocess.to_dict(),
            "classes": list(prepared.classes),
            "findings": list(prepared.findings),
            "environment": environment,
        },
    )


def _session(config: TrainConfig, prepared: Prepared, start: Start, model: ModelConfig, device: torch.device,
             say: Say) -> tuple[Session, Start]:  # fmt: skip
    """A run's session, and its start with what the first weights left new."""
    assert config.lr is not None
    assert config.imgsz is not None
    network = build(model, exact=start.pretrained)
    first = for_classes(start, model, prepared.classes, say)
    if first is not None:
        start = replace(start, new_parts=tuple(sorted(_load(network, first, start))))
    network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    dtype = pick_precision(config.precision, device)
    counts = [0] * len(prepared.classes)
    for sample in prepared.train:
        counts[sample.label] += 1
    weights = class_weights(counts, config.balance)
    session = Session(
        config=config,
        network=network.train(),
        average=WeightAverage(network, config.ema),
        optimiser=make_optimiser(network, config.lr, config.weight_decay, set(start.new_parts)),
        preprocess=Preprocess(size=config.imgsz, fit=config.fit),
        device=device,
        dtype=dtype,
        weights=None if weights is None else weights.to(device),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
    )
    return session, start


def _load(network: Network, first: dict[str, Tensor], start: Start) -> list[str]:
    """The parts that the first weights left new. Raises: CheckpointError; for a file of mvcr, with the options that fit."""
    try:
        return load_trunk(network, first, start.model)
    except CheckpointError as error:
        if not start.options:
            raise
        raise CheckpointError(error.message, f"they are weights for {start.options}") from error
