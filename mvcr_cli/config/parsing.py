"""From the text of an option to its value."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import cast, get_args

from mvcr_cli.config.checks import check
from mvcr_cli.config.constants import MOST_SHRUNK, Layer, Look, ZoomMode
from mvcr_cli.errors import UsageError


def parse_seconds(text: str) -> float:
    """`"90"`, `"90s"`, `"3m"`, `"1h30m"` as seconds."""
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s?)?", text.strip())
    if not match or not any(match.groups()):
        raise UsageError(f"--time {text!r} is no duration", "write 90s, 3m or 1h30m")
    if match[1] and match[3] and not match[2] and not text.strip().endswith("s"):  # 1h30 is minutes to most people
        raise UsageError(f"--time {text!r} may mean minutes or seconds", f"write {match[1]}h{match[3]}m")
    hours, minutes, seconds = (float(group or 0) for group in match.groups())
    return hours * 3600 + minutes * 60 + seconds


def parse_scales(text: str) -> tuple[float, ...]:
    """The scale set of a network: `"1,1/2"` as `(1.0, 0.5)`, `"2..1/2"` as half octaves; largest first."""
    scales = parse_factors(text)
    check(1.0 in scales and all(1 / 16 <= scale <= 4 for scale in scales), "--scales", text,
           "a list with 1 in it, each between 1/16 and 4")  # fmt: skip
    return tuple(reversed(scales))


def parse_scale_set(text: str) -> tuple[float, ...] | None:
    """As `parse_scales`, or None for "auto"."""
    return None if text.strip() == "auto" else parse_scales(text)


def parse_views(text: str) -> tuple[Look, tuple[float, ...] | None]:
    """How a trained network is looked through, and the scale set of the views, None for its own.

    "1", "all", "auto"; a set such as "2..1/4", of which all are looked at; or "auto:2..1/4", the cheapest first.
    """
    if text in get_args(Look):
        return cast(Look, text), None
    try:
        return "auto" if text.startswith("auto:") else "all", parse_scales(text.removeprefix("auto:"))
    except UsageError:
        raise UsageError(
            f"--views {text!r} is none of {', '.join(get_args(Look))}, and no scale set",
            "a scale set has 1 in it and nothing beyond 1/16 and 4: 2..1/2 (half octaves), or 2,1,1/2; auto:2..1/2 begins "
            "with the cheapest",
        ) from None


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
    if asked >= {"gem", "max"}:
        raise UsageError("--layers: gem and max are two ways to pool", "leave one of them out")
    return tuple(layer for layer in known if layer in asked)


def parse_zoom_mode(text: str) -> ZoomMode:
    for mode in get_args(ZoomMode):
        if text == mode:
            return cast(ZoomMode, mode)
    raise UsageError(f"--zoom {text!r} is none of auto, on and off", "smaller and larger objects: --zoom-range 0.25")


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
