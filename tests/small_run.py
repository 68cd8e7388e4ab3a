"""Training runs that take a second: two classes of coloured shapes that any network tells apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import draw_shape

from mvcr_cli.checkpoint import Checkpoint
from mvcr_cli.config import TrainConfig
from mvcr_cli.engine.train import train
from mvcr_cli.paths import write_json
from mvcr_cli.records import EpochReport, TrainReport

NOWHERE = Path("/proc/mvcr")  # a folder that nobody can make
needs_proc = pytest.mark.skipif(not Path("/proc/self").exists(), reason="every folder of this system can be written")


def shapes(root: Path, *, classes: tuple[str, ...] = ("circle", "square"), images: int = 16, first: int = 0) -> Path:
    """`root/<class>/<number>.png`, 48x48 pixels."""
    for shape in classes:
        (root / shape).mkdir(parents=True)
        for number in range(first, first + images):
            draw_shape(shape, number, (48, 48)).save(root / shape / f"{number:03d}.png")
    return root


def settings(data: Path, run: Path | None, **changes: Any) -> TrainConfig:
    """24 training and 8 validation pictures, three steps an epoch; the same bits on every machine of one kind."""
    fast: dict[str, Any] = {
        "model": "mvcr10n", "weights": "none", "imgsz": 48, "epochs": 2, "batch": 8, "workers": 0, "threads": 1,
        "precision": "fp32", "device": "cpu", "offline": True,
    }  # fmt: skip
    if "val" not in changes:
        fast["split"] = 0.25
    return TrainConfig(data=data, run=run, **(fast | changes))


def trained(data: Path, run: Path | None, *, stop: Callable[[], str | None] | None = None,
            say: Callable[[str], None] = lambda text: None,
            **changes: Any) -> tuple[list[EpochReport], TrainReport]:  # fmt: skip
    """All epoch reports and the end of one run."""
    items: Iterator[EpochReport | TrainReport] = train(
        settings(data, run, **changes), stop=stop or (lambda: None), say=say
    )
    *epochs, end = items
    assert isinstance(end, TrainReport)
    return [epoch for epoch in epochs if isinstance(epoch, EpochReport)], end


def run_of(weights: Checkpoint, folder: Path, *, data: str, root: Path, val: str | None = None) -> Path:
    """A run folder as far as other commands read it, of a training that nobody did.

    Args:
        data: as given to the training, and `val`.
        root: where the data are.
    """
    (folder / "weights").mkdir(parents=True)
    weights.save(folder / "weights" / "best.safetensors")
    write_json(folder / "config.json", {"train": {"data": data, "val": val}})
    write_json(folder / "split.json", {"classes": list(weights.classes), "root": str(root), "train": [], "val": []})
    return folder


def stop_at(count: int, signal: str = "SIGINT") -> Callable[[], str | None]:
    """A `stop` that asks to end from its `count`-th question on."""
    asked = iter(range(1, 10**9))
    return lambda: signal if next(asked) >= count else None
