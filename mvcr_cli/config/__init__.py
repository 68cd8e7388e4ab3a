"""What goes in: one frozen dataclass a command. Every default of the program lives here, and nothing here imports torch.

A config checks itself when it is made, so code that receives one can trust it.
"""

from __future__ import annotations

from mvcr_cli.config.checks import check_batch, check_imgsz, check_preset, check_seed, check_workers
from mvcr_cli.config.commands import BenchmarkConfig, EvalConfig, ExportConfig, PredictConfig
from mvcr_cli.config.constants import (
    FORMAT_SUFFIXES,
    IMAGENET_MEAN,
    IMAGENET_STD,
    LARGEST_CANVAS,
    MEBIBYTE,
    MOST_READ_SECONDS,
    MOST_SHRUNK,
    PRESET_NAMES,
    READ_SECONDS,
    SACS_STAGES,
    Balance,
    Block,
    Device,
    ExportFormat,
    Fit,
    Layer,
    Look,
    Precision,
    PredictFormat,
    Stem,
    ZoomMode,
)
from mvcr_cli.config.model import ModelConfig, ZoomConfig
from mvcr_cli.config.parsing import (
    factor_text,
    half_octaves,
    parse_auto,
    parse_factors,
    parse_layers,
    parse_list,
    parse_memory,
    parse_scale_set,
    parse_scales,
    parse_seconds,
    parse_views,
    parse_zoom_mode,
)
from mvcr_cli.config.training import ZOOM_SETTINGS, AugmentConfig, TrainConfig

__all__ = [
    "FORMAT_SUFFIXES", "IMAGENET_MEAN", "IMAGENET_STD", "LARGEST_CANVAS", "MEBIBYTE", "MOST_READ_SECONDS",
    "MOST_SHRUNK", "PRESET_NAMES", "READ_SECONDS", "SACS_STAGES", "ZOOM_SETTINGS", "AugmentConfig", "Balance",
    "BenchmarkConfig", "Block", "Device", "EvalConfig", "ExportConfig", "ExportFormat", "Fit", "Layer", "Look",
    "ModelConfig", "Precision", "PredictConfig", "PredictFormat", "Stem", "TrainConfig", "ZoomConfig", "ZoomMode",
    "check_batch", "check_imgsz", "check_preset", "check_seed", "check_workers", "factor_text", "half_octaves",
    "parse_auto", "parse_factors", "parse_layers", "parse_list", "parse_memory", "parse_scale_set", "parse_scales",
    "parse_seconds", "parse_views", "parse_zoom_mode",
]  # fmt: skip
