"""The files of a run, read into typed values once, so that the report can trust them.

A run folder may come from a stranger: what is missing is None or empty, what is wrong is a CheckpointError.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from mvcr_cli.errors import CheckpointError, InputMissing
from mvcr_cli.paths import display_name
from mvcr_cli.records import ClassReport, EpochReport, EvalReport, Interval, TrainReport

R = TypeVar("R")
T = TypeVar("T", EpochReport, EvalReport, TrainReport, Interval, ClassReport)

PARTS = ("train", "val", "test")
WRONG = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)  # of JSON that is not ours


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about the data that a reader should know; `detail` names no folder outside the data."""

    code: str
    count: int
    detail: str


@dataclass(frozen=True, slots=True)
class RunFiles:
    """The records of one run.

    Args:
        name: last component of the run folder.
        option: the run as one types it after `--run`; where it does not stand in `runs`, one has to fill in the path.
        version: of the mvcr that trained it.
        settings: the groups of config.json: train, model, preprocess, environment.
        pictures: how many pictures each part of the split has.
        epochs: one report an epoch, the last one where a resumed run wrote it twice.
    """

    name: str
    option: str
    version: str
    settings: Mapping[str, Mapping[str, Any]]
    findings: tuple[Finding, ...]
    pictures: Mapping[str, int]
    epochs: tuple[EpochReport, ...]
    evaluation: EvalReport | None
    summary: TrainReport | None


def read_run(run: Path) -> RunFiles:
    """Raises: InputMissing without a readable config.json; CheckpointError where a file is not what mvcr writes."""
    config = _load(run / "config.json", _config)
    if config is None:
        raise InputMissing(
            f"{display_name(run)} has no config.json, so it is no run of mvcr",
            "name a folder that `mvcr train` made, for example runs/mvcr14n-1",
        )
    version, settings, findings = config
    path = run.resolve()
    return RunFiles(
        name=path.name,
        option=shlex.quote(f"{'runs' if path.parent.name == 'runs' else 'PATH/TO'}/{path.name}"),
        version=version,
        settings=settings,
        findings=findings,
        pictures=_load(run / "split.json", _counts) or {},
        epochs=_epochs(run / "metrics.jsonl"),
        evaluation=_load(run / "eval.json", _evaluation),
        summary=_load(run / "summary.json", lambda values: _rebuilt(TrainReport, values)),
    )


def _load(path: Path, read: Callable[[Any], R]) -> R | None:
    """`read` on the JSON of a file; None when the file does not exist."""
    content = _content(path)
    try:
        return None if content is None else read(json.loads(content))
    except WRONG as error:
        raise _foreign(path) from error


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputMissing(f"cannot read {display_name(path)}: {error.strerror}") from error


def _epochs(path: Path) -> tuple[EpochReport, ...]:
    """The epochs in order; half a last line, left by a kill, is not one."""
    lines = (_content(path) or b"").splitlines()
    epochs: dict[int, EpochReport] = {}
    for number, line in enumerate(lines, 1):
        try:
            report = _rebuilt(EpochReport, json.loads(line))
        except WRONG as error:
            if number == len(lines):
                break
            raise _foreign(path) from error
        epochs[report.epoch] = report
    return tuple(epochs[epoch] for epoch in sorted(epochs))


def _foreign(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{display_name(path)} is not what mvcr writes", "restore it from a copy, or train the run again"
    )


def _mapping(values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise TypeError("not an object")
    return values


def _config(values: Any) -> tuple[str, dict[str, dict[str, Any]], tuple[Finding, ...]]:
    """Version, settings and findings of config.json."""
    settings = {key: _mapping(values.get(key) or {}) for key in ("train", "model", "preprocess", "environment")}
    paths = ((key, value) for key, value in settings["train"].items() if isinstance(value, str))
    roots = [value for key, value in paths if "/" in value or key in ("data", "val")]
    return str(values.get("mvcr", "")), settings, _findings(values.get("findings") or (), roots)


def _counts(split: Any) -> dict[str, int]:
    """Pictures of each part of split.json, which names its classes and its folder as well."""
    return {part: len(pictures) for part, pictures in _mapping(split).items() if part in PARTS}


def _findings(values: Any, roots: list[str]) -> tuple[Finding, ...]:
    return tuple(
        Finding(str(one["code"]), int(one.get("count", 1)), _relative(str(one.get("detail") or ""), roots))
        for one in values
    )


def _relative(text: str, roots: list[str]) -> str:
    """The text without folders of this machine: a report may be sent to people who should not see them."""
    names = "|".join(re.escape(root.rstrip("/")) for root in sorted(roots, key=len, reverse=True))
    text = re.sub(rf"(?<![\w./\\~-])(?:{names})/", "", text) if names else text
    return re.sub(r"(?<![\w.~])(?:~|[A-Za-z]:)?(?:[/\\][^\s/\\]+)+[/\\](?=[^\s/\\])", "", text)


def _evaluation(values: Any) -> EvalReport:
    report = _rebuilt(EvalReport, values)
    sides = {len(report.confusion), *map(len, report.confusion)}
    if not report.classes or sides != {len(report.classes)} or min(map(min, report.confusion)) < 0:
        raise ValueError("the confusion matrix does not fit the classes")
    return report


def _rebuilt(kind: type[T], values: Any) -> T:
    """A record from its JSON; a float that was not finite is null there, and becomes NaN.

    A field with a default may be missing, for it came later than the first such records.
    """
    stored = [field for field in fields(kind) if field.name in values or field.default is MISSING]
    return kind(**{field.name: _READERS[str(field.type)](values[field.name]) for field in stored})


def _float(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _optional(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else read(value)


def _interval(values: Any) -> Interval:
    return _rebuilt(Interval, values)


_READERS: dict[str, Callable[[Any], Any]] = {
    "int": int,
    "int | None": _optional(int),
    "float": _float,
    "float | None": _optional(float),
    "str": str,
    "tuple[str, ...]": lambda values: tuple(map(str, values)),
    "Interval": _interval,
    "Interval | None": _optional(_interval),
    "tuple[ClassReport, ...]": lambda values: tuple(_rebuilt(ClassReport, one) for one in values),
    "tuple[tuple[int, ...], ...]": lambda rows: tuple(tuple(map(int, row)) for row in rows),
}
