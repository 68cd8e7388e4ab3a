"""Before training: look at the folder, say what is wrong with it, fit every open setting to data and machine."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from mvcr_cli.config import MEBIBYTE, ZOOM_SETTINGS, Layer, Stem, TrainConfig, ZoomMode
from mvcr_cli.data.folder import (
    WARNINGS,
    Sample,
    check_trainable,
    find_layout,
    relabel,
    scan,
    split,
)
from mvcr_cli.data.images import read_size
from mvcr_cli.engine import PRECISION_NAMES, RUNS, Say, Track, default_threads, default_workers, pick_precision, silent
from mvcr_cli.engine.findings import HARMLESS, NOT_LOOKED, Look, describe, look_at
from mvcr_cli.engine.measure import available_memory
from mvcr_cli.errors import BadImage, DataError, UsageError
from mvcr_cli.models import config_for, useful_scales
from mvcr_cli.models.mvcr import trunk_side
from mvcr_cli.paths import check_creatable, refuse_inside
from mvcr_cli.records import CheckReport, PicturePair, Problem

PROBED_PICTURES = 500
SMALL_STEM_BELOW = 96
FINE_STEM_BELOW = 48
ALIKE, WIDE = 2.0, 4.0  # spread of picture sizes: below an octave, and from two octaves on
UNSURE_LAYERS: tuple[Layer, ...] = ("blur", "max")  # the surest view must not be sure because its object is large
# Pixels of the median longer side from which "auto" zooms, if that is also four times the trunk's size.
ZOOM_FROM = 1024
TILES = 16
FALLBACK_MEMORY = 4 << 30  # bytes, where the system does not tell what is available
BYTES_PER_PIXEL = 900  # activations and gradients of an 18-layer trunk in float32, per input pixel


@dataclass(frozen=True)
class Prepared:
    """A data set that can be trained on.

    Args:
        sides: median width and height in pixels of the probed training pictures.
        longer: median longer side in pixels of these.
        spread: longer side of large pictures (95th percentile) over that of small ones (5th).
        findings: what a person should know about the data, as `{"code", "count", "detail"}`.
        look: what the pictures themselves show.
    """

    classes: tuple[str, ...]
    train: tuple[Sample, ...]
    val: tuple[Sample, ...]
    skipped: tuple[Problem, ...]
    sides: tuple[int, int]
    longer: int
    spread: float
    findings: tuple[dict[str, Any], ...]
    look: Look

    @property
    def left_out(self) -> int:
        """How many of `skipped` are files and folders that are not used; the others are warnings."""
        return sum(problem.code not in WARNINGS for problem in self.skipped)


def prepare(config: TrainConfig, track: Track = silent) -> Prepared:
    """Index, split and check the data of a run; nothing is written and no network is built.

    Raises: MvcrError for everything that makes the folder untrainable.
    """
    layout = find_layout(config.data)
    if not config.dry_run:
        _check_place(config)
    index = scan(layout.train, follow_links=config.follow_links)
    check_trainable(index)
    validation = config.val or layout.val
    missing: tuple[str, ...] = ()
    if validation is None:
        train, val = split(index, config.split, config.seed)
        missing = tuple(name for label, name in enumerate(index.classes) if label not in {one.label for one in val})
        skipped = index.skipped
    else:
        other = scan(validation, follow_links=config.follow_links)
        train = index.samples
        val, missing = relabel(other, index.classes)
        skipped = index.skipped + other.skipped
    if not val:
        different = len({sample.digest for sample in index.samples})
        raise DataError(
            f"no picture is left to validate on: {len(index.classes)} classes with {different} different pictures in all",
            "give each class two different pictures or more, or a validation folder with --val",
        )
    look = NOT_LOOKED if _has_begun(config) else look_at(train, val, config, track)
    findings = tuple(describe(train, val, skipped, missing, look))
    serious = [finding for finding in findings if finding["code"] not in HARMLESS]
    if config.strict and serious:
        raise DataError(
            f"--strict: {len(serious)} findings about the data, first: {serious[0]['detail']}",
            "see them all with --dry-run, or train without --strict",
        )
    sides, longer, spread = _sizes(train)
    return Prepared(index.classes, train, val, skipped, sides, longer, spread, findings, look)


def _check_place(config: TrainConfig) -> None:
    """Refuse a folder for the run that lies in the data, or cannot be made."""
    place = config.run or RUNS
    for data in filter(None, (config.data, config.val)):
        refuse_inside(data, place, "the run", "a --run")
    check_creatable(place)


def _has_begun(config: TrainConfig) -> bool:
    """A run goes on whose beginning looked at the pictures already."""
    resumes = config.resume and config.run is not None and (config.run / "config.json").is_file()
    return resumes and not (config.dry_run or config.strict)


def _sizes(samples: tuple[Sample, ...]) -> tuple[tuple[int, int], int, float]:
    """Median width and height and median longer side in pixels, and the spread of the longer sides, of some pictures."""
    widths, heights = [], []
    for sample in samples[:: max(1, len(samples) // PROBED_PICTURES)]:
        try:
            width, height = read_size(sample.path)
        except BadImage:
            continue
        widths.append(width)
        heights.append(height)
    if not widths:
        raise DataError("none of the training pictures can be read", "look at them with an image viewer")
    longer = sorted(map(max, widths, heights))
    spread = longer[math.ceil(0.95 * len(longer)) - 1] / longer[math.floor(0.05 * len(longer))]
    return (int(statistics.median(widths)), int(statistics.median(heights))), int(statistics.median(longer)), spread


def fit_settings(config: TrainConfig, prepared: Prepared, device: torch.device, pretrained: bool,
                 say: Say) -> TrainConfig:  # fmt: skip
    """Every setting that was left open, fitted; the result is what `config.json` records."""
    count = len(prepared.train)
    model = default_model(config, pretrained)
    imgsz = config.imgsz or _fit_imgsz(max(prepared.sides), device, pretrained)
    side = trunk_side(imgsz, "detail" in (config.layers or ()))
    zoom = zoom_mode(config, prepared.longer, imgsz)
    tiles, tile_px = (config.tiles or TILES, config.tile_px or fit_tile(imgsz)) if zoom == "on" else (None, None)
    scales = config.scales or _fit_scales(model, prepared.spread, side)
    views = 1.5 if config.unsure else sum(scale**2 for scale in scales)  # half of the pictures again at foreign scales
    pixels = round(imgsz * imgsz * views) + (tiles or 0) * (tile_px or 0) ** 2
    batch = config.batch or _fit_batch(count, pixels, device, config.memory_mb if zoom == "on" else None, say)
    epochs = None if config.seconds is not None else config.epochs or _fit_epochs(count, pretrained)
    return replace(
        config,
        model=model,
        imgsz=imgsz,
        layers=UNSURE_LAYERS if config.unsure and config.layers is None else config.layers,
        scales=scales,
        zoom_mode=zoom,
        tiles=tiles,
        tile_px=tile_px,
        batch=min(batch, count),
        epochs=epochs,
        lr=config.lr or (3e-4 if pretrained else 3e-3) * math.sqrt(min(batch, count) * config.accumulate / 64),
        workers=default_workers(config.workers),
        threads=default_threads(config.threads),
        precision=PRECISION_NAMES[pick_precision(config.precision, device)],
    )


def default_model(config: TrainConfig, pretrained: bool) -> str:
    return config.model or ("mvcr18" if pretrained else "mvcr14n")


def zoom_mode(config: TrainConfig, longer: int, imgsz: int) -> ZoomMode:
    """Whether a run zooms; "auto" decides by the median longer side of the pictures, in pixels.

    Raises: UsageError when "auto" decides against what was set for it.
    """
    if config.zoom_mode != "auto":
        return config.zoom_mode
    hindrance = config.zoom_hindrance
    if is_large(longer, imgsz) and hindrance is None:
        return "on"
    if config.has_zoom_settings:
        raise UsageError(
            f"{ZOOM_SETTINGS} are settings of --zoom, which does not go with {hindrance}" if hindrance else
            f"{ZOOM_SETTINGS} are settings of --zoom, which is off for pictures of {longer} px at --imgsz {imgsz}",
            "leave them out" if hindrance else "leave them out, or zoom nevertheless: --zoom on",
        )  # fmt: skip
    return "off"


def is_large(longer: int, imgsz: int) -> bool:
    """Whether a glance of `imgsz` pixels misses much of a picture with such a longer side."""
    return longer >= max(ZOOM_FROM, 4 * imgsz)


def fit_tile(imgsz: int) -> int:
    """Half of the glance, as a multiple of 16, and no more than a tile may have."""
    return min(1024, max(32, imgsz // 32 * 16))


def _fit_scales(model: str, spread: float, side: int) -> tuple[float, ...]:
    """One view where all pictures have about one size, the preset's set from an octave on, a quarter view from two.

    Pictures of different sizes show objects of different sizes once they are all brought to one. Where they do not,
    further views cost time in training and bring nothing (docs/results.md). Views that are too small to see anything are
    left out.
    """
    scales = config_for(model, 2).scales
    if len(scales) > 1:
        scales = scales[:1] if spread < ALIKE else (*scales, 0.25) if spread >= WIDE else scales
    return useful_scales(scales, side, stem_for(side))


def stem_for(side: int) -> Stem:
    """Small pictures keep their detail: below 96 px the stem strides once instead of twice, below 48 px not at all."""
    return "fine" if side < FINE_STEM_BELOW else "small" if side < SMALL_STEM_BELOW else "imagenet"


def _fit_imgsz(longest: int, device: torch.device, pretrained: bool) -> int:
    """224 px for pretrained weights and accelerators, 128 on a CPU, less for smaller pictures; a multiple of 16."""
    largest = 224 if pretrained or device.type != "cpu" else 128
    return max(32, min(largest, 16 * math.ceil(longest / 16)))


def _fit_batch(count: int, pixels: int, device: torch.device, memory_mb: int | None, say: Say) -> int:
    """Enough steps an epoch for few pictures, full cores for many, and a quarter of the available memory at most.

    Args:
        pixels: that the trunk sees of one picture.
        memory_mb: MiB, of which half may be used; None for no limit beside what is available.
    """
    wanted = min(count, 16 if count < 500 else 32 if count < 4000 else 64 if device.type == "cpu" else 128)
    needed = BYTES_PER_PIXEL * pixels  # bytes a picture
    if memory_mb is not None:
        wanted = min(wanted, int(memory_mb * MEBIBYTE / 2 / needed))
    batch = max(2, min(wanted, int(_available_memory(device) / 4 / needed)))
    if batch < wanted:
        say(
            f"warning: a batch of {batch} and not of {wanted}, for more memory is not available; where it is, the same "
            f"command gives another result, unless it says --batch {batch}"
        )
    return batch


def _available_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    room = available_memory()
    return FALLBACK_MEMORY if room is None else room


def _fit_epochs(count: int, pretrained: bool) -> int:
    """About 2,000 steps' worth for small sets, never under 10 epochs nor above 100; a third for pretrained weights."""
    epochs = max(10, min(100, round(60_000 / count)))
    return max(5, epochs // 3) if pretrained else epochs


def check(config: TrainConfig, prepared: Prepared) -> Iterator[Problem | PicturePair | CheckReport]:
    """The result of a dry run: every file that is left out, every pair of copies, and the sum of it."""
    look = prepared.look
    yield from prepared.skipped
    yield from look.broken
    yield from look.pairs
    yield CheckReport(
        data=str(config.data),
        classes=prepared.classes,
        train_images=len(prepared.train),
        val_images=len(prepared.val),
        decoded=look.decoded,
        compared=look.compared,
        broken=len(look.broken),
        skipped=prepared.left_out,
        findings=prepared.findings,
    )


def announce(prepared: Prepared, say: Say) -> None:
    for finding in prepared.findings:
        say(f"finding: {finding['detail']}")
    width, height = prepared.sides
    say(
        f"data: {len(prepared.classes)} classes, {len(prepared.train):,} training and {len(prepared.val):,} validation "
        f"pictures, median {width}x{height} px"
    )
