"""What a resumed run must agree with: its settings, its classes and its pictures, as they were recorded."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, cast, get_args

import torch

from mvcr_cli.config import Precision, TrainConfig
from mvcr_cli.engine import PRECISIONS, Say, default_workers, emulates_bf16
from mvcr_cli.engine.prepare import Prepared
from mvcr_cli.engine.rundir import RunDirectory
from mvcr_cli.errors import ConfigMismatch, UsageError
from mvcr_cli.paths import display_name, to_json

# Settings that do not change the result, but for the last bits of it in the case of `threads`; they may differ when a
# run is resumed, and stay out of the weights file.
FREE_SETTINGS = frozenset({
    "data", "val", "run", "resume", "started", "workers", "threads", "cache_mb", "memory_mb", "dry_run", "offline",
    "strict", "save_every", "device", "follow_links",
})  # fmt: skip


def agree(config: TrainConfig, stored: dict[str, Any], prepared: Prepared, run: RunDirectory) -> TrainConfig:
    """The stored settings, when neither what is asked now nor the data contradict what was recorded.

    Raises: ConfigMismatch that names the first contradiction.
    """
    config = agree_on_settings(config, stored, len(prepared.train), run)
    if tuple(stored["classes"]) != prepared.classes:
        raise ConfigMismatch(f"{display_name(run.path)} has other classes than the data", "start a new run")
    recorded = run.read_json(run.split)
    for side, samples in (("train", prepared.train), ("val", prepared.val)):
        if _digests(recorded.get(side)) != [sample.digest for sample in samples]:
            raise ConfigMismatch(
                f"the {side} pictures are not those that {display_name(run.path)} was started with", "start a new run"
            )
    return config


def agree_on_settings(config: TrainConfig, stored: dict[str, Any], pictures: int, run: RunDirectory) -> TrainConfig:
    """The stored settings, when what is asked now does not contradict them.

    Args:
        pictures: to train on; a batch is no larger.

    Raises: ConfigMismatch that names the first contradiction.
    """
    # What an older run does not tell was as it is by default today; but then there was no zoom.
    was = json.loads(to_json(TrainConfig(data=config.data).to_dict())) | {"zoom_mode": "off"} | stored["train"]
    was["precision"] = _precision(stored, run)
    # The number of threads decides in which order sums are made, and with that the last bits of a result.
    keys = ("model", "imgsz", "scales", "layers", "tiles", "tile_px", "batch", "epochs", "lr", "threads")
    fitted = {key: was.get(key) for key in keys if getattr(config, key) is None}
    if config.seconds is not None:
        del fitted["epochs"]
    if config.batch is not None:
        fitted["batch"] = min(config.batch, pictures)  # as `fit_settings` does
    if config.zoom_mode == "auto":
        fitted["zoom_mode"] = was["zoom_mode"]
    if config.precision == "auto":
        fitted["precision"] = was["precision"]
    try:
        fitted |= {key: tuple(fitted[key]) for key in ("scales", "layers") if fitted.get(key) is not None}
        config = replace(config, **fitted, workers=default_workers(config.workers))
        if None in (config.model, config.imgsz, config.scales, config.batch, config.lr, config.threads):
            raise TypeError("a setting is missing")
    except UsageError as error:
        text = f"{display_name(run.path)} cannot go on with these settings: {display_name(error.message)}"
        raise ConfigMismatch(text, "resume with the same settings, or start a new run") from error
    except TypeError as error:
        raise no_record(run) from error
    for key, now in json.loads(to_json(config.to_dict())).items():
        if key not in FREE_SETTINGS and now != was.get(key):
            raise ConfigMismatch(
                f"{display_name(run.path)} was started with {key} = {display_name(str(was.get(key)))}, "
                f"not {display_name(str(now))}",
                "resume with the same settings, or start a new run",
            )
    return config


def check_machine(config: TrainConfig, settings: TrainConfig, stored: dict[str, Any], run: RunDirectory,
                  device: torch.device, say: Say) -> None:  # fmt: skip
    """Tell what will differ here from where the run began.

    Raises: ConfigMismatch when the device does not compute in the run's precision.
    """
    if settings.threads != stored["train"].get("threads"):
        say(f"warning: --threads was {stored['train'].get('threads')}: the result will differ in its last bits")
    if config.precision != "auto":  # as asked
        return
    if settings.precision == "fp16" and device.type == "cpu":
        raise ConfigMismatch(
            f"{display_name(run.path)} computes in fp16, which a CPU does not",
            "go on with it on CUDA or MPS, or start a new run",
        )
    if settings.precision == "bf16" and emulates_bf16(device):
        say(f"warning: {display_name(run.path)} computes in bf16, which is many times slower on this {device.type}")


def no_record(run: RunDirectory) -> ConfigMismatch:
    return ConfigMismatch(f"{display_name(run.config)} is no record of a run", "start a new run without --resume")


def _digests(rows: Any) -> list[Any]:
    """Of the rows of one side of `split.json`; of anything else, nothing that any data set has."""
    try:
        return [row[2] for row in rows]
    except (TypeError, KeyError, IndexError):
        return [None]


def _precision(stored: dict[str, Any], run: RunDirectory) -> Precision:
    """What a run computes in; "auto" if nothing tells.

    Runs from before the setting was resolved tell it beside the versions of the software.
    """
    name = stored["train"].get("precision")
    environment = stored.get("environment")
    if name == "auto" and isinstance(environment, dict):
        known = {str(dtype).removeprefix("torch."): name for name, dtype in PRECISIONS.items()}
        name = known.get(str(environment.get("precision")), "auto")
    if name not in get_args(Precision):
        raise no_record(run)
    return cast(Precision, name)
