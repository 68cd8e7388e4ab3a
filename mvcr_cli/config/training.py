"""`mvcr train`: the recipe and the augmentation."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mvcr_cli.config.checks import check, check_imgsz, check_preset, check_seed, check_workers
from mvcr_cli.config.constants import Balance, Device, Fit, Layer, Precision, ZoomMode
from mvcr_cli.errors import UsageError

ZOOM_SETTINGS = "--tiles, --tile-px and --memory"


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What may happen to a training picture. Each part is off at its neutral value; the defaults suit photographs.

    Args:
        crop: smallest share of the picture's area that a crop keeps; 1 keeps all of it.
        zoom: objects are shown up to `1 + zoom` times smaller or larger (log-uniform, two-sided).
        shear: largest horizontal or vertical shear, as a fraction of the side (Keras: `shear_range` in radians).
        shift: largest shift, as a fraction of the side; what leaves on one side is lost, the rest is padded.
        rotate: largest rotation in degrees.
        hflip, vflip: mirror with probability 1/2.
        turn: quarter turns with equal probability.
        trivial: probability of one random colour operation (the photometric half of TrivialAugment).
        erase: probability of erasing one rectangle.
        resolution: probability of a picture with coarser pixels at the same size (resolution jitter).
        coarsest: how many times coarser at most; what tells the classes apart must still be there.
        mixup, cutmix: Beta parameters of MixUp and CutMix; 0 is off. With both, each batch draws one.
    """

    crop: float = 0.5
    zoom: float = 0.25
    shear: float = 0.1
    shift: float = 0.0
    rotate: float = 0.0
    hflip: bool = True
    vflip: bool = False
    turn: bool = False
    trivial: float = 0.5
    erase: float = 0.0
    resolution: float = 0.0
    coarsest: float = 4.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        check(0 < self.crop <= 1, "--crop", self.crop, "above 0 and at most 1")
        check(0 <= self.zoom <= 3, "--zoom-range", self.zoom, "between 0 and 3")
        check(0 <= self.shear <= 1, "--shear", self.shear, "between 0 and 1")
        check(0 <= self.shift <= 0.5, "--shift", self.shift, "between 0 and 0.5")
        check(0 <= self.rotate <= 180, "--rotate", self.rotate, "between 0 and 180 degrees")
        for name in ("trivial", "erase", "resolution"):
            check(0 <= getattr(self, name) <= 1, f"--{name}", getattr(self, name), "between 0 and 1")
        check(1 <= self.coarsest <= 16, "--coarsest", self.coarsest, "between 1 and 16")
        for name in ("mixup", "cutmix"):
            check(0 <= getattr(self, name) <= 10, f"--{name}", getattr(self, name), "between 0 and 10")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """`mvcr train`. `None` means: fitted to the data and the machine when the run starts, and recorded.

    Args:
        data: folder of class folders, or of train/val folders with class folders.
        val: validation folder elsewhere; None uses the one in `data`, or splits in place.
        split: share of each class that validates when the split is made in place.
        run: run folder to make or resume; None is `runs/<model>-<number>`.
        model: preset name. None is mvcr18 with pretrained weights and mvcr14n without.
        weights: "auto", "imagenet", "none", or a safetensors file.
        imgsz: side of the view at scale 1 in pixels.
        epochs: passes over the training pictures; None is fitted, or is as many as `seconds` allow.
        seconds: wall time from the start of the program to the finished run, in the place of `epochs`.
        batch: pictures a step; None is fitted.
        accumulate: steps whose gradients are summed before the optimiser steps.
        lr: peak learning rate; None depends on the weights and the batch size.
        scales: the scale set; None is fitted: the preset's own, and more where the pictures' sizes differ much.
        layers: the optional layers; None is the preset's own.
        unsure: weight of the uniform target for views at foreign scales. Above 0, the view at scale 1 alone learns
            labels, the others are looked through, and the surest decides.
        precise_bn: batches of 32 training pictures on which the batch norms of the averaged weights are measured anew
            before every validation; 0 keeps their moving averages.
        progressive: start at half size and grow.
        patience: epochs without a better validation accuracy before the run stops; 0 is never.
        cache_mb: cap of the decoded-pixel cache in MiB; 0 turns it off.
        zoom_mode: look at tiles of large pictures; "auto" does so when the pictures are large.
        tiles: tiles of a picture that the network looks at in a step.
        tile_px: side of a tile in pixels; None is fitted to `imgsz`.
        memory_mb: memory in MiB that batches and the cache of tiles are fitted to.
        save_every: steps (batches) between two resumable states, beside that of every epoch; 0 is those alone.
        resume: go on with `run` where its last state stands; a finished run is left as it is, but for
            a report that it lacks.
        started: `time.monotonic()` at program start, so that `seconds` counts what the user waits for.
    """

    data: Path
    val: Path | None = None
    split: float = 0.2
    run: Path | None = None
    model: str | None = None
    weights: str = "auto"
    imgsz: int | None = None
    fit: Fit = "pad"
    scales: tuple[float, ...] | None = None
    layers: tuple[Layer, ...] | None = None
    unsure: float = 0.0
    zoom_mode: ZoomMode = "auto"
    tiles: int | None = None
    tile_px: int | None = None
    memory_mb: int = 4096
    epochs: int | None = None
    seconds: float | None = None
    batch: int | None = None
    accumulate: int = 1
    lr: float | None = None
    weight_decay: float = 0.05
    warmup: float = 0.1
    clip: float = 1.0
    label_smoothing: float = 0.1
    distill: float = 1.0
    ema: float = 0.998
    precise_bn: int = 0
    balance: Balance = "auto"
    progressive: bool = True
    patience: int = 0
    augment: AugmentConfig = AugmentConfig()
    cache_mb: int = 256
    workers: int | None = None
    threads: int | None = None
    device: Device = "auto"
    precision: Precision = "auto"
    seed: int = 0
    save_every: int = 0
    resume: bool = False
    dry_run: bool = False
    offline: bool = False
    follow_links: bool = False
    strict: bool = False
    started: float | None = None

    def __post_init__(self) -> None:
        check(0 < self.split < 1, "--split", self.split, "between 0 and 1")
        if self.val is not None and self.split != TrainConfig.split:
            raise UsageError(
                "--split is for data without a validation folder, and --val names one", "leave one of them out"
            )
        check_imgsz(self.imgsz)
        check(self.epochs is None or 1 <= self.epochs <= 100_000, "--epochs", self.epochs, "between 1 and 100,000")
        check(self.seconds is None or 5 <= self.seconds <= 10**8, "--time", f"{self.seconds or 0:g}s", "at least 5s")
        if self.epochs is not None and self.seconds is not None:
            raise UsageError("--time and --epochs both say when the run ends", "give one of them")
        check(self.batch is None or 2 <= self.batch <= 65_536, "--batch", self.batch, "auto, or between 2 and 65,536")
        check(1 <= self.accumulate <= 4096, "--accumulate", self.accumulate, "between 1 and 4096")
        check(
            self.lr is None or (math.isfinite(self.lr) and 0 < self.lr <= 100),
            "--lr",
            self.lr,
            "above 0 and at most 100",
        )
        check(0 <= self.weight_decay < 10, "--weight-decay", self.weight_decay, "between 0 and 10")
        check(0 <= self.warmup < 1, "--warmup", self.warmup, "between 0 and 1")
        check(self.clip >= 0 and math.isfinite(self.clip), "--clip", self.clip, "0 (off) or above")
        check(0 <= self.label_smoothing < 1, "--label-smoothing", self.label_smoothing, "between 0 and 1")
        check(0 <= self.distill <= 100, "--distill", self.distill, "between 0 and 100")
        check(0 <= self.unsure <= 10, "--unsure", self.unsure, "between 0 (off) and 10")
        if self.augment.coarsest != AugmentConfig.coarsest and not self.augment.resolution:
            raise UsageError(
                "--coarsest is a setting of --resolution, which is off", "leave it out, or --resolution 0.6"
            )
        check(0 <= self.ema < 1, "--ema", self.ema, "between 0 (off) and 1")
        check(0 <= self.precise_bn <= 10_000, "--precise-bn", self.precise_bn, "between 0 (off) and 10,000")
        check(self.patience >= 0, "--patience", self.patience, "0 (never) or more")
        check(0 <= self.cache_mb <= 1 << 20, "--cache", self.cache_mb, "between 0 and 1,048,576 MiB")
        check_workers(self.workers)
        check(self.tiles is None or 2 <= self.tiles <= 4096, "--tiles", self.tiles, "auto, or between 2 and 4096")
        check(self.tile_px is None or (32 <= self.tile_px <= 1024 and self.tile_px % 2 == 0), "--tile-px", self.tile_px,
               "auto, or an even number between 32 and 1024 pixels")  # fmt: skip
        check(512 <= self.memory_mb <= 1 << 24, "--memory", f"{self.memory_mb} MiB", "between 512M and 16T")
        if self.zoom_mode == "off" and self.has_zoom_settings:
            raise UsageError(f"{ZOOM_SETTINGS} are settings of --zoom, which is off", "leave one of them out")
        if self.zoom_mode == "on" and (hindrance := self.zoom_hindrance):
            raise UsageError(f"--zoom on does not go with {hindrance}", f"leave out {hindrance}")
        check(self.threads is None or 1 <= self.threads <= 1024, "--threads", self.threads, "between 1 and 1024")
        check_seed(self.seed)
        if self.resume and self.run is None and not self.dry_run:
            raise UsageError("--resume: which run?", "name it: --run RUN")
        check(self.save_every >= 0, "--save-every", self.save_every, "0 (each epoch) or more")
        check_preset(self.model)
        self._check_views()

    def _check_views(self) -> None:
        """Refuse what a network of one view, or without stages, does not have."""
        if self.unsure and self.model == "cnn":
            raise UsageError("--unsure: the model cnn has no views to doubt", "choose another --model")
        if self.scales not in (None, (1.0,)) and self.model == "cnn":
            raise UsageError("--scales: the model cnn has one view", "choose another --model, or leave --scales out")
        one_view = self.scales == (1.0,) or (self.model or "").startswith(("resnet", "cnn"))
        if self.distill != TrainConfig.distill and one_view:
            raise UsageError("--distill: one view has no other to agree with", "leave it out, or name several --scales")
        if self.layers and self.model == "cnn":
            raise UsageError("--layers: the model cnn has no stages to add them to", "choose another --model")

    @property
    def has_zoom_settings(self) -> bool:
        return bool(self.tiles or self.tile_px) or self.memory_mb != TrainConfig.memory_mb

    @property
    def zoom_hindrance(self) -> str | None:
        """What is asked for beside which no network can zoom."""
        mixes = self.augment.mixup > 0 or self.augment.cutmix > 0
        hindrances = {"--model cnn": self.model == "cnn", "--mixup and --cutmix": mixes, "--unsure": self.unsure > 0}
        return next((option for option, there in hindrances.items() if there), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `config.json`."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}
