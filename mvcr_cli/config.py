"""What goes in: one frozen dataclass a command. Every default of the program lives here, and nothing here imports torch.

A config checks itself when it is made, so code that receives one can trust it.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args

from mvcr_cli.errors import UsageError

Balance = Literal["auto", "none", "loss"]
Block = Literal["basic", "bottleneck"]
Device = Literal["auto", "cpu", "cuda", "mps"]
ExportFormat = Literal["onnx", "torch", "safetensors"]
Fit = Literal["pad", "stretch"]
PredictFormat = Literal["auto", "json", "jsonl", "csv", "table"]
Layer = Literal["blur", "gem", "heads", "sacs", "detail", "sift"]
Look = Literal["1", "all", "auto"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Stem = Literal["imagenet", "small", "fine"]
ZoomMode = Literal["auto", "on", "off"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MEBIBYTE = 1 << 20
SACS_STAGES = (2, 3)  # stages with scale-aware convolutions when they are asked for
MOST_SHRUNK = 16  # least and largest factors of an accuracy curve over scale: 1/16 and 16
LARGEST_CANVAS = 8192  # pixels a side
READ_SECONDS = 120.0  # the longest that one picture may take to be read; more means that its disk is gone


PRESET_NAMES = (
    *(f"{kind}{size}" for kind in ("mvcr", "resnet") for size in ("10n", "14n", "10", "18", "34", "50")),
    "cnn",
)


def check_preset(name: str | None) -> None:
    if name is not None and name not in PRESET_NAMES:
        near = difflib.get_close_matches(name, PRESET_NAMES, 1)
        guess = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"there is no model {name!r}", f"{guess}models: {', '.join(PRESET_NAMES)}")


def check_imgsz(side: int | None) -> None:
    _check(side is None or 16 <= side <= 8192, "--imgsz", side, "auto, or between 16 and 8192 pixels")


def check_batch(batch: int) -> None:
    _check(1 <= batch <= 65_536, "--batch", batch, "between 1 and 65,536")


def check_workers(workers: int | None) -> None:
    _check(workers is None or 0 <= workers <= 256, "--workers", workers, "between 0 and 256")


def check_seed(seed: int) -> None:
    _check(0 <= seed < 2**63, "--seed", seed, "between 0 and 2^63-1")


def parse_seconds(text: str) -> float:
    """`"90"`, `"90s"`, `"3m"`, `"1h30m"` as seconds."""
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?", text.strip())
    if not match or not any(match.groups()):
        raise UsageError(f"--time {text!r} is no duration", "write 90s, 3m or 1h30m")
    hours, minutes, seconds = (float(group or 0) for group in match.groups())
    return hours * 3600 + minutes * 60 + seconds


def parse_scales(text: str) -> tuple[float, ...]:
    """The scale set of a network: `"1,1/2"` as `(1.0, 0.5)`, `"2..1/2"` as half octaves; largest first."""
    scales = parse_factors(text)
    _check(1.0 in scales and all(1 / 16 <= scale <= 4 for scale in scales), "--scales", text,
           "a list with 1 in it, each between 1/16 and 4")  # fmt: skip
    return tuple(reversed(scales))


def parse_scale_set(text: str) -> tuple[float, ...] | None:
    """As `parse_scales`, or None for "auto"."""
    return None if text.strip() == "auto" else parse_scales(text)


def parse_factors(text: str) -> tuple[float, ...]:
    """`"1/4..4"` in half octaves, or `"1/4,1,4"`, as factors of the size, smallest first."""
    factors: set[float] = set()
    for part in text.split(","):
        ends = [_factor(end, text) for end in part.split("..")]
        octaves = [math.log2(end) for end in ends]
        if len(ends) == 1:
            factors.add(ends[0])
        elif len(ends) == 2 and all(octave.is_integer() for octave in octaves) and octaves[0] != octaves[1]:
            factors |= set(half_octaves(*ends))
        else:
            raise UsageError(f"--scales {text!r}: {part.strip()!r} is no range of octaves",
                             "a range goes from one power of two to another: --scales 1/4..4")  # fmt: skip
    return tuple(sorted(factors))


def half_octaves(first: float, last: float) -> tuple[float, ...]:
    """Scales from one power of two to another in steps of half an octave, largest first."""
    low, high = sorted(round(2 * math.log2(end)) for end in (first, last))
    return tuple(2.0 ** (half / 2) for half in range(high, low - 1, -1))


def _factor(part: str, text: str) -> float:
    match = re.fullmatch(r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)(?:/([0-9]{1,9}))?\s*", part)
    value = float(match[1]) / float(match[2] or 1) if match and float(match[2] or 1) else 0.0
    if not value:
        raise UsageError(f"--scales {text!r} is no list of scales above 0", "write --scales 1/4..4 or 1/4,1/2,1,2,4")
    return value


def factor_text(factor: float) -> str:
    """A factor of the size for people: 0.25 as 1/4, 2.828 as 2.83."""
    share = Fraction(factor).limit_denominator(MOST_SHRUNK)
    return str(share) if factor < 1 and float(share) == factor else f"{factor:.2f}".rstrip("0").rstrip(".")


def parse_layers(text: str) -> tuple[Layer, ...]:
    """`"sift,blur"` as layers, each once, in the order in which they are listed here; `"none"` is no layer."""
    known = get_args(Layer)
    if text.strip() == "none":
        return ()
    asked = {part.strip() for part in text.split(",")}
    if unknown := sorted(asked - set(known)):
        raise UsageError(f"--layers: there is no layer {unknown[0]!r}", f"layers: {', '.join(known)}; or none")
    return tuple(layer for layer in known if layer in asked)


def parse_memory(text: str | int) -> int:
    """`"4G"`, `"4096M"` or `"4096"` as MiB."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d+)?)([MG]?)(?:i?B)?", str(text).strip(), re.IGNORECASE)
    if not match:
        raise UsageError(f"--memory {text!r} is no amount of memory", "write 4G or 800M")
    return round(float(match[1]) * (1024 if match[2].upper() == "G" else 1))


def parse_auto(option: str, text: str) -> int | None:
    """A whole number, or None for "auto"."""
    if text == "auto":
        return None
    if not re.fullmatch(r"[+-]?\d{1,18}", text):
        raise UsageError(f"{option} {text!r} is neither a whole number nor auto", f"write {option} 64 or {option} auto")
    return int(text)


def parse_list(option: str, text: str) -> tuple[int, ...]:
    """`"128,224"` as whole numbers."""
    numbers = [parse_auto(option, part.strip()) for part in text.split(",")]
    if None in numbers:
        raise UsageError(f"{option} {text!r} must be whole numbers with commas between", f"write {option} 128,224")
    return tuple(number for number in numbers if number is not None)


def _check(good: bool, name: str, value: object, range_: str) -> None:
    if not good:
        shown = ", ".join(map(str, value)) if isinstance(value, Iterable) and not isinstance(value, str) else value
        raise UsageError(f"{name} is {shown}: out of range", f"it must be {range_}")


@dataclass(frozen=True, kw_only=True)
class ZoomConfig:
    """How a network looks at large pictures: a glance at the whole, and tiles at native resolution.

    Args:
        tiles: tiles of a picture that the trunk looks at.
        candidates: tiles of a picture that are proposed, from which the scorer takes the best.
        tile_px: side of a tile at the trunk's input.
        octaves: tile scales; a tile of octave o shows `tile_px << o` pixels of the picture.
        grid: share of the candidates that lie on a uniform grid, whatever is there.
        learned: share of the candidates that the learned scorer finds, once it has learned.
    """

    tiles: int = 16
    candidates: int = 128
    tile_px: int = 32
    octaves: int = 2
    grid: float = 0.25
    learned: float = 0.5

    def __post_init__(self) -> None:
        numbers = (self.tiles, self.candidates, self.tile_px, self.octaves)
        _check(all(type(number) is int for number in numbers), "tiles, tile_px, octaves", numbers, "whole numbers")
        _check(1 <= self.tiles <= 4096, "--tiles", self.tiles, "between 1 and 4096")
        _check(self.tiles <= self.candidates <= 65_536, "candidates", self.candidates, "between --tiles and 65,536")
        _check(32 <= self.tile_px <= 1024, "--tile-px", self.tile_px, "auto, or between 32 and 1024 pixels")
        _check(1 <= self.octaves <= 6, "octaves", self.octaves, "between 1 and 6")
        _check(0 <= self.grid <= 1 and 0 <= self.learned <= 1 - self.grid, "grid, learned",
               (self.grid, self.learned), "shares that add up to at most 1")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One network, completely described; JSON-able, so that it travels in the checkpoint.

    Args:
        name: the preset it was made from.
        classes: K, the number of outputs.
        block: residual block, or None for the three-layer `cnn`.
        depths: blocks in each of the four stages.
        width: channels of the first stage; later stages double it.
        scales: the scale set; sides of the views relative to the trunk size, largest first. (1,) is a plain ResNet.
        taught: the scales of the set whose views learn labels, with 1 among them; None is all of them.
        surest: the surest view decides alone; otherwise every view votes with how sure it is.
        sure: how sure a view must be for "auto" to stop looking, from 0 to 1 (certain).
        stem: "imagenet" is 7x7 stride 2 with max-pool; "small" is 3x3 stride 2 alone, for small pictures; "fine" is 3x3
            stride 1, for icons.
        blur: SoftBlur before every strided stage.
        gem: generalised-mean pooling; otherwise average pooling.
        heads: multi-level heads on stages 2 and 3.
        sacs: stages, 1 to 4, whose blocks have a scale-aware convolution.
        detail: a thin branch sees the whole picture; the trunk's view at scale 1 is half as large.
        sift: dense RootSIFT beside stage 2.
        drop: dropout before the last layer.
        zoom: looks at tiles of large pictures as well; None looks at the whole picture only.
    """

    name: str
    classes: int
    block: Block | None
    depths: tuple[int, ...]
    width: int
    scales: tuple[float, ...] = (1.0,)
    taught: tuple[float, ...] | None = None
    surest: bool = False
    sure: float = 0.8
    stem: Stem = "imagenet"
    blur: bool = False
    gem: bool = False
    heads: bool = False
    sacs: tuple[int, ...] = ()
    detail: bool = False
    sift: bool = False
    drop: float = 0.0
    zoom: ZoomConfig | None = None

    def __post_init__(self) -> None:
        # A file may say anything, of any type.
        numbers = (self.classes, self.width, *self.depths)
        _check(all(type(number) is int for number in numbers), "classes, width, depths", numbers, "whole numbers")
        _check(self.block in (None, *get_args(Block)), "block", self.block, f"one of {get_args(Block)} or None")
        _check(self.stem in get_args(Stem), "stem", self.stem, f"one of {get_args(Stem)}")
        _check(isinstance(self.name, str) and 0 <= self.drop < 1, "drop", self.drop, "between 0 and 1")
        _check(1 <= self.classes <= 100_000, "classes", self.classes, "between 1 and 100,000")
        _check(all(1 <= depth <= 100 for depth in self.depths), "depths", self.depths, "between 1 and 100")
        _check(len(self.scales) <= 16, "scales", len(self.scales), "at most 16")
        _check(1.0 in self.scales, "scales", self.scales, "a set that contains 1")
        _check(all(1 / 16 <= scale <= 4 for scale in self.scales), "scales", self.scales, "between 1/16 and 4")
        taught = self.scales if self.taught is None else self.taught
        _check(
            1.0 in taught and set(taught) <= set(self.scales), "taught", taught, "scales of the set with 1 among them"
        )
        _check(0 < self.sure <= 1, "sure", self.sure, "above 0 and at most 1")
        _check(len(self.depths) == (0 if self.block is None else 4), "depths", self.depths, "four numbers")
        _check(1 <= self.width <= 1024, "width", self.width, "between 1 and 1024")
        stages = 0 if self.block is None else 4
        fits = all(type(stage) is int and 1 <= stage <= stages for stage in self.sacs)
        _check(fits and len(set(self.sacs)) == len(self.sacs), "sacs", self.sacs, "stages of the trunk, each once")
        switches = (self.detail, self.sift)
        _check(all(type(on) is bool for on in switches), "detail, sift", switches, "true or false")
        _check(self.block is not None or not any(switches), "detail, sift", switches, "off in a network without stages")
        _check(self.zoom is None or self.block is not None, "zoom", self.name, "a network with a residual trunk")

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "zoom" or value is not None}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Raises: TypeError, ValueError or UsageError when `values` do not describe a network."""
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"unknown model fields {sorted(unknown)}")
        lists = [key for key in ("depths", "scales", "taught", "sacs") if values.get(key) is not None]
        tuples: dict[str, Any] = {key: tuple(values[key]) for key in lists}
        zoom = {"zoom": ZoomConfig(**values["zoom"])} if values.get("zoom") is not None else {}
        return cls(**(values | tuples | zoom))


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What may happen to a training picture. Each part is off at its neutral value; `photo` is the default set.

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
        resolution: probability of a picture with up to four times coarser pixels at the same size (resolution jitter).
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
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        _check(0 < self.crop <= 1, "--crop", self.crop, "above 0 and at most 1")
        _check(0 <= self.zoom <= 3, "--zoom-range", self.zoom, "between 0 and 3")
        _check(0 <= self.shear <= 1, "--shear", self.shear, "between 0 and 1")
        _check(0 <= self.shift <= 0.5, "--shift", self.shift, "between 0 and 0.5")
        _check(0 <= self.rotate <= 180, "--rotate", self.rotate, "between 0 and 180 degrees")
        for name in ("trivial", "erase", "resolution"):
            _check(0 <= getattr(self, name) <= 1, f"--{name}", getattr(self, name), "between 0 and 1")
        for name in ("mixup", "cutmix"):
            _check(0 <= getattr(self, name) <= 10, f"--{name}", getattr(self, name), "between 0 and 10")


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
        imgsz: side of the largest view in pixels.
        epochs: passes over the training pictures; with `seconds` set, the clock decides.
        seconds: wall time from the start of the program to the finished run.
        batch: pictures a step; None is fitted.
        accumulate: steps whose gradients are summed before the optimiser steps.
        lr: peak learning rate; None depends on the weights and the batch size.
        scales: the scale set; None is fitted: the preset's own, and more where the pictures' sizes differ much.
        layers: the optional layers; None is the preset's own.
        unsure: weight of the uniform target for views at foreign scales. Above 0, the view at scale 1 alone learns
            labels, the others are looked through, and the surest decides.
        progressive: start at half size and grow.
        patience: epochs without a better validation accuracy before the run stops; 0 is never.
        cache_mb: cap of the decoded-pixel cache in MiB; 0 turns it off.
        zoom_mode: look at tiles of large pictures; "auto" does so when the pictures are large.
        tiles: tiles of a picture that the network looks at in a step.
        tile_px: side of a tile in pixels; None is fitted to `imgsz`.
        memory_mb: memory in MiB that batches and the cache of tiles are fitted to.
        save_every: optimiser steps between two resumable states; 0 is once an epoch.
        resume: go on with `run` where its last state stands; a finished run is left as it is.
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
        _check(0 < self.split < 1, "--split", self.split, "between 0 and 1")
        check_imgsz(self.imgsz)
        _check(self.epochs is None or 1 <= self.epochs <= 100_000, "--epochs", self.epochs, "between 1 and 100,000")
        _check(self.seconds is None or 5 <= self.seconds <= 10**8, "--time", self.seconds, "at least 5s")
        _check(self.batch is None or 2 <= self.batch <= 65_536, "--batch", self.batch, "auto, or between 2 and 65,536")
        _check(1 <= self.accumulate <= 4096, "--accumulate", self.accumulate, "between 1 and 4096")
        _check(
            self.lr is None or (math.isfinite(self.lr) and 0 < self.lr <= 100), "--lr", self.lr, "above 0 and finite"
        )
        _check(0 <= self.weight_decay < 10, "--weight-decay", self.weight_decay, "between 0 and 10")
        _check(0 <= self.warmup < 1, "--warmup", self.warmup, "between 0 and 1")
        _check(self.clip >= 0 and math.isfinite(self.clip), "--clip", self.clip, "0 (off) or above")
        _check(0 <= self.label_smoothing < 1, "--label-smoothing", self.label_smoothing, "between 0 and 1")
        _check(0 <= self.distill <= 100, "--distill", self.distill, "between 0 and 100")
        _check(0 <= self.unsure <= 10, "--unsure", self.unsure, "between 0 (off) and 10")
        if self.unsure and self.model == "cnn":
            raise UsageError("--unsure: the model cnn has no views to doubt", "choose another --model")
        _check(0 <= self.ema < 1, "--ema", self.ema, "between 0 (off) and 1")
        _check(self.patience >= 0, "--patience", self.patience, "0 (never) or more")
        _check(0 <= self.cache_mb <= 1 << 20, "--cache", self.cache_mb, "between 0 and 1,048,576 MiB")
        check_workers(self.workers)
        _check(self.tiles is None or 2 <= self.tiles <= 4096, "--tiles", self.tiles, "auto, or between 2 and 4096")
        _check(self.tile_px is None or (32 <= self.tile_px <= 1024 and self.tile_px % 2 == 0), "--tile-px", self.tile_px,
               "auto, or an even number between 32 and 1024 pixels")  # fmt: skip
        _check(512 <= self.memory_mb <= 1 << 24, "--memory", f"{self.memory_mb} MiB", "between 512M and 16T")
        if self.zoom_mode == "off" and (self.tiles or self.tile_px):
            raise UsageError("--tiles and --tile-px are settings of --zoom, which is off", "leave one of them out")
        _check(self.threads is None or 1 <= self.threads <= 1024, "--threads", self.threads, "between 1 and 1024")
        check_seed(self.seed)
        _check(self.save_every >= 0, "--save-every", self.save_every, "0 (each epoch) or more")
        check_preset(self.model)
        if self.layers and self.model == "cnn":
            raise UsageError("--layers: the model cnn has no stages to add them to", "choose another --model")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for `config.json`."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """`mvcr eval`. `data=None` is the run's own validation split.

    Args:
        scales: factors of the size at which the pictures are shown, increasing, for accuracy against object scale.
        against: another run whose curve over scale is laid beside this one's.
    """

    data: Path | None = None
    run: Path | None = None
    scales: tuple[float, ...] | None = None
    against: Path | None = None
    out: Path | None = None
    views: Look = "all"
    batch: int = 32
    workers: int | None = None
    device: Device = "auto"
    precision: Precision = "fp32"
    ignore_extra_classes: bool = False
    keep_going: bool = False
    follow_links: bool = False

    def __post_init__(self) -> None:
        check_batch(self.batch)
        check_workers(self.workers)
        if self.scales is None:
            if self.against is not None:
                raise UsageError("--against compares accuracy over scale", "give the scales as well: --scales 1/4..4")
            return
        inside = all(1 / MOST_SHRUNK <= factor <= MOST_SHRUNK for factor in self.scales)
        _check(inside and 1 in self.scales and len(self.scales) > 1, "--scales", map(factor_text, self.scales),
               f"a range or list of two or more with 1 in it, each between 1/{MOST_SHRUNK} and {MOST_SHRUNK}")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """`mvcr predict`. `inputs` are files, folders, glob patterns, or "-" for names on stdin, one a line.

    `explain` is a folder for one overlay picture an input.
    """

    inputs: tuple[str, ...]
    run: Path | None = None
    explain: Path | None = None
    topk: int = 5
    views: Look = "all"
    batch: int = 16
    workers: int | None = None
    device: Device = "auto"
    offline: bool = False

    def __post_init__(self) -> None:
        _check(len(self.inputs) > 0, "INPUTS", "nothing", "at least one file, folder, pattern or -")
        _check(self.topk >= 1, "--topk", self.topk, "1 or more")
        check_batch(self.batch)
        check_workers(self.workers)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """`mvcr export`. `out=None` writes beside the run's weights; `images` cap the parity check."""

    run: Path | None = None
    format: ExportFormat = "onnx"
    views: Look = "all"
    out: Path | None = None
    images: int = 64
    tolerance: float = 1e-4
    overwrite: bool = False

    def __post_init__(self) -> None:
        _check(self.views != "auto", "--views", self.views, "1 or all: a graph cannot stop early")
        _check(1 <= self.images <= 100_000, "--images", self.images, "between 1 and 100,000")
        _check(0 < self.tolerance < 1, "--tolerance", self.tolerance, "between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """`mvcr benchmark`. `models` empty and `run=None` benchmarks the default models."""

    models: tuple[str, ...] = ()
    run: Path | None = None
    data: Path | None = None
    sizes: tuple[int, ...] = (128, 224)
    batches: tuple[int, ...] = (1, 8)
    classes: int = 10
    rounds: int = 10
    device: Device = "auto"
    precision: Precision = "fp32"
    threads: int | None = None
    workers: int | None = None
    onnx: bool = True
    train: bool = True

    def __post_init__(self) -> None:
        for name in self.models:
            check_preset(name)
        for size in self.sizes:
            check_imgsz(size)
        _check(all(1 <= batch <= 65_536 for batch in self.batches), "--batch", self.batches, "between 1 and 65,536")
        _check(1 <= self.rounds <= 10_000, "--rounds", self.rounds, "between 1 and 10,000")
        _check(1 <= self.classes <= 100_000, "--classes", self.classes, "between 1 and 100,000")
        _check(self.threads is None or 1 <= self.threads <= 1024, "--threads", self.threads, "between 1 and 1024")
        check_workers(self.workers)
