"""Words and numbers that several commands share."""

from __future__ import annotations

from typing import Literal

Balance = Literal["auto", "none", "loss"]
Block = Literal["basic", "bottleneck"]
Device = Literal["auto", "cpu", "cuda", "mps"]
ExportFormat = Literal["onnx", "torch", "safetensors"]
Fit = Literal["pad", "stretch"]
PredictFormat = Literal["auto", "json", "jsonl", "csv", "table"]
Layer = Literal["blur", "gem", "max", "heads", "sacs", "detail", "sift"]
Look = Literal["1", "all", "auto"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Stem = Literal["imagenet", "small", "fine"]
ZoomMode = Literal["auto", "on", "off"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FORMAT_SUFFIXES: dict[ExportFormat, str] = {"onnx": ".onnx", "torch": ".pt2", "safetensors": ".safetensors"}
MEBIBYTE = 1 << 20
SACS_STAGES = (2, 3)  # stages with scale-aware convolutions when they are asked for
MOST_SHRUNK = 16  # least and largest factors of an accuracy curve over scale: 1/16 and 16
LARGEST_CANVAS = 8192  # pixels a side
READ_SECONDS = 120.0  # the longest wait for a picture while nothing is computed; more means that its disk is gone
MOST_READ_SECONDS = 1800.0  # the longest that one picture of a gigapixel may take to be decoded

PRESET_NAMES = (
    *(f"{kind}{size}" for kind in ("mvcr", "resnet") for size in ("10n", "14n", "10", "18", "34", "50")),
    "cnn",
)
