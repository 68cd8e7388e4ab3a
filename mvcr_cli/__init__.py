"""`mvcr`: multi-scale ResNet image classification for folders of pictures of any size."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Checkpoint": "mvcr_cli.checkpoint",
    "build": "mvcr_cli.models",
    "load_rgb": "mvcr_cli.data.images",
    "train": "mvcr_cli.engine.train",
    "evaluate": "mvcr_cli.engine.evaluate",
    "predict": "mvcr_cli.engine.predict",
    "export": "mvcr_cli.engine.export",
    "benchmark": "mvcr_cli.engine.benchmark",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    """Resolve public names on first use (PEP 562), so that importing the package costs nothing."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
