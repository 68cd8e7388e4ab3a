"""Refusals of values out of range, by the name of the option that was given."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from mvcr_cli.config.constants import PRESET_NAMES
from mvcr_cli.errors import UsageError
from mvcr_cli.paths import display_name


def check(good: bool, name: str, value: object, range_: str) -> None:
    if not good:
        shown = ", ".join(map(str, value)) if isinstance(value, Iterable) and not isinstance(value, str) else value
        raise UsageError(f"{name} is {display_name(str(shown))}: out of range", f"it must be {range_}")


def check_preset(name: str | None) -> None:
    if name is not None and name not in PRESET_NAMES:
        near = difflib.get_close_matches(name, PRESET_NAMES, 1)
        guess = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"there is no model {name!r}", f"{guess}models: {', '.join(PRESET_NAMES)}")


def check_imgsz(side: int | None) -> None:
    check(side is None or 16 <= side <= 8192, "--imgsz", side, "auto, or between 16 and 8192 pixels")


def check_batch(batch: int) -> None:
    check(1 <= batch <= 65_536, "--batch", batch, "between 1 and 65,536")


def check_workers(workers: int | None) -> None:
    check(workers is None or 0 <= workers <= 256, "--workers", workers, "between 0 and 256")


def check_seed(seed: int) -> None:
    check(0 <= seed < 2**63, "--seed", seed, "between 0 and 2^63-1")
