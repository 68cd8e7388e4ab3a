"""What a person should know about a data set before anything is trained on it.

A dry run and `--strict` decode every picture. The start of a training decodes a bounded part of them, so that large sets
begin as fast as small ones, and says so.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mvcr_cli.config import MEBIBYTE, TrainConfig
from mvcr_cli.data.duplicates import Fingerprint, find_alike, read_fingerprints
from mvcr_cli.data.folder import Sample, conflicts, leaks
from mvcr_cli.data.images import read_size
from mvcr_cli.engine import Track, available_cores
from mvcr_cli.errors import BadImage
from mvcr_cli.paths import display_name, to_json, write_whole
from mvcr_cli.records import NO_LOSS, PicturePair, Problem, record

START_PICTURES = 5_000  # looked at before a training ...
START_BYTES = 64 * MEBIBYTE  # ... and at most this much of files ...
START_PIXELS = 500_000_000  # ... and this many pixels, which a small file of a large picture costs
COMPARED = 50_000  # pictures among which copies are looked for; the work grows with the square
NAMES_SHOWN = 20
# Findings that --strict lets pass.
HARMLESS = NO_LOSS | {"imbalance", "not_looked_at"}


@dataclass(frozen=True)
class Look:
    """What the pictures themselves show.

    Args:
        decoded: how many were decoded, the broken ones included; `compared` of them with each other.
        broken: those that cannot be decoded.
        pairs: copies that should not both be where they are.
    """

    decoded: int
    compared: int
    broken: tuple[Problem, ...]
    pairs: tuple[PicturePair, ...]


NOT_LOOKED = Look(0, 0, (), ())


def look_at(train: Sequence[Sample], val: Sequence[Sample], config: TrainConfig, track: Track) -> Look:
    """Decode pictures and look for copies among them: all of them in a dry run or a strict one, else a bounded part."""
    samples = _most_telling(train, val)
    if not (config.dry_run or config.strict):
        samples = samples[: _affordable(samples)]
    read = read_fingerprints([sample.path for sample in samples], min(8, available_cores()))
    seen: list[tuple[Sample, Fingerprint]] = []
    broken: list[Problem] = []
    for sample, found in zip(samples, track(read, total=len(samples), label="looking at the pictures"), strict=True):
        if isinstance(found, Problem):
            broken.append(found)
        elif len(seen) < COMPARED:
            seen.append((sample, found))
    broken.sort(key=lambda problem: os.fsencode(problem.path))
    return Look(len(samples), len(seen), tuple(broken), tuple(_pairs(train, val, seen)))


def _most_telling(train: Sequence[Sample], val: Sequence[Sample]) -> list[Sample]:
    """All pictures in an order of which any beginning shows most: both sides by turns, each in the order of content."""
    sides = [sorted(side, key=lambda sample: sample.digest) for side in (val, train)]
    even = min(map(len, sides))
    by_turns = [sample for pair in zip(*(side[:even] for side in sides), strict=True) for sample in pair]
    return by_turns + sides[0][even:] + sides[1][even:]


def _affordable(samples: Sequence[Sample]) -> int:
    """How many of the first pictures a training may look at before it starts."""
    size, pixels = 0, 0
    for count, sample in enumerate(samples[:START_PICTURES]):
        try:
            size += os.stat(sample.path).st_size
            width, height = read_size(sample.path)
        except (OSError, BadImage):  # decoding says so
            continue
        pixels += width * height
        if size > START_BYTES or pixels > START_PIXELS:
            return count
    return min(len(samples), START_PICTURES)


def _pairs(train: Sequence[Sample], val: Sequence[Sample],
           seen: Sequence[tuple[Sample, Fingerprint]]) -> Iterator[PicturePair]:  # fmt: skip
    """Copies across the splits and across labels: equal files, equal pixels, and pictures that are alike."""
    pixels = {sample.path: found.pixels for sample, found in seen}
    both = [*train, *val]

    def decoded(samples: Iterable[Sample]) -> list[Sample]:
        return [replace(sample, digest=pixels[sample.path]) for sample in samples if sample.path in pixels]

    validates = {sample.path for sample in val}
    found = (
        ("leak", leaks(train, val)),
        ("leak", leaks(decoded(train), decoded(val))),
        ("alike", _alike(seen, lambda sample: sample.path in validates)),
        ("conflict", conflicts(both)),
        ("conflict", conflicts(decoded(both))),
        ("alike_conflict", _alike(seen, lambda sample: sample.label)),
    )
    known: set[tuple[bool, str]] = set()
    for code, pairs in found:
        for one, other in pairs:
            key = "conflict" in code, other
            if key not in known:  # the surer finding comes first
                known.add(key)
                yield PicturePair(path=one, other=other, code=code)


def _alike(seen: Sequence[tuple[Sample, Fingerprint]], group: Callable[[Sample], int]) -> list[tuple[str, str]]:
    pairs = find_alike([found for _, found in seen], [int(group(sample)) for sample, _ in seen])
    return [(seen[one][0].path, seen[other][0].path) for one, other in pairs]


def describe(train: Sequence[Sample], val: Sequence[Sample], skipped: Sequence[Problem], missing: Sequence[str],
             look: Look) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One `{"code", "count", "detail"}` for everything that a person should know."""

    def finding(code: str, count: int, detail: str) -> Iterator[dict[str, Any]]:
        if count:
            yield {"code": code, "count": count, "detail": detail}

    for code, group in sorted(_by_code(skipped).items()):
        text = f"skipped ({code}): {len(group)}: {_names(group)}"
        if code == "unknown_format":
            text += f" ({group[0].detail})"
        if code == "twin_classes":  # they are told apart all the same
            text = f"class names that {'; '.join(problem.detail for problem in group[:NAMES_SHOWN])}"
        yield from finding(code, len(group), text)
    for code, group in sorted(_by_code(look.broken).items()):
        text = f"cannot be decoded ({code}): {len(group)} of {look.decoded:,} pictures looked at"
        yield from finding(code, len(group), f"{text}: {_names(group)}")
    by_code: defaultdict[str, list[PicturePair]] = defaultdict(list)
    for pair in look.pairs:
        by_code[pair.code].append(pair)
    for code, text in _PAIRS.items():
        pairs = by_code[code]
        yield from finding(code, len(pairs), f"{text}: {len(pairs)}{_pair_example(pairs)}")
    names = ", ".join(map(display_name, missing[:5]))
    text = f"classes without a validation picture: {len(missing)}: {names}"
    yield from finding("missing_classes", len(missing), text)
    counts = Counter(sample.label for sample in train)
    if max(counts.values()) > 20 * min(counts.values()):
        text = f"class sizes run from {min(counts.values())} to {max(counts.values())} pictures"
        yield from finding("imbalance", 1, text)
    total = len(train) + len(val)
    if look is not NOT_LOOKED and look.compared + len(look.broken) < total:
        text = (
            f"looked at {look.decoded:,} of {total:,} pictures, and for copies among {look.compared:,}; "
            "a dry run looks at all"
        )
        yield from finding("not_looked_at", total - look.decoded or total - look.compared, text)


_PAIRS = {
    "leak": "pictures in training and in validation",
    "conflict": "pictures with two labels",
    "alike": "validation pictures that look the same as a training picture",
    "alike_conflict": "pictures with two labels that look the same",
}


def _by_code(problems: Iterable[Problem]) -> dict[str, list[Problem]]:
    groups: defaultdict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        groups[problem.code].append(problem)
    return groups


def _names(problems: Sequence[Problem]) -> str:
    shown = ", ".join(display_name(problem.path) for problem in problems[:NAMES_SHOWN])
    return shown if len(problems) <= NAMES_SHOWN else f"{shown} and {len(problems) - NAMES_SHOWN:,} more"


def _pair_example(pairs: Sequence[PicturePair]) -> str:
    return f", for example {display_name(pairs[0].path)} = {display_name(pairs[0].other)}" if pairs else ""


def record_findings(run: Path, found: Iterable[Problem | PicturePair]) -> None:
    """Add to a run's `findings.jsonl` a record for every file left out and every pair of copies that it lacks."""
    path = run / "findings.jsonl"
    lines = dict.fromkeys(path.read_text("utf-8", "replace").split("\n")[:-1] if path.is_file() else ())
    known = len(lines)
    lines |= dict.fromkeys(to_json(record(item)) for item in found)
    if len(lines) > known or not path.is_file():
        write_whole(path, "".join(f"{line}\n" for line in lines))
