"""`mvcr predict`."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING

import typer

from mvcr_cli.cli import options as o
from mvcr_cli.cli.output import Output, is_bad
from mvcr_cli.cli.session import config_of, session_of
from mvcr_cli.config import PredictConfig, PredictFormat
from mvcr_cli.errors import ExitCode, UsageError
from mvcr_cli.paths import csv_text, display_name, json_path, to_json
from mvcr_cli.records import Prediction, PredictSummary, Problem, record

if TYPE_CHECKING:
    from mvcr_cli.cli.prediction_table import PredictionTable

CSV_HEADER = ("path", "label", "probability", "width", "height", "error", "detail", "topk", "explanation")


def predict(
    ctx: typer.Context,
    inputs: o.Inputs,
    run: o.PredictRun = PredictConfig.run,
    topk: o.TopK = PredictConfig.topk,
    views: o.Views = PredictConfig.views,
    explain: o.Explain = PredictConfig.explain,
    batch: o.Batch = PredictConfig.batch,
    workers: o.Workers = PredictConfig.workers,
    device: o.Device = PredictConfig.device,
    offline: o.Offline = PredictConfig.offline,
    format: o.PredictFormat = "auto",  # noqa: A002
    json: o.JsonLines = False,
    keep_going: o.KeepGoing = False,
) -> None:
    """Classify pictures of any size.

    One record a picture, in the order given, as soon as it is known. With --json or --format jsonl a last record, the
    summary, says that every input has been answered; without it, the output was cut short.
    """
    config = config_of(PredictConfig, ctx, inputs=tuple(inputs))
    if json and format not in ("auto", "jsonl"):
        raise UsageError(f"--json contradicts --format {format}", "give one of them")
    output = session_of(ctx).output
    asked = "jsonl" if json else format
    writer = _writer(asked, output, config.topk)
    from mvcr_cli.engine.predict import predict as run_prediction

    names: Iterable[bytes] = sys.stdin.buffer if sys.stdin is not None else ()
    images, problems = 0, list[Problem]()
    for result in run_prediction(config, stdin=names, track=output.track, say=output.say):
        if isinstance(result, Problem):
            problems.append(result)
        else:
            images += 1
        writer.add(result)
    writer.finish()
    if asked == "jsonl":
        bad = sum(map(is_bad, problems))
        output.emit(PredictSummary(images=images, bad=bad, passed_over=len(problems) - bad))
    if config.explain is not None and images:
        output.say(f"written: {display_name(config.explain)}")
    output.problems(problems)
    if not keep_going and any(map(is_bad, problems)):
        raise typer.Exit(ExitCode.BAD_DATA)


class Writer(ABC):
    """Writes records one by one; the document begins with the first, so that an early error leaves stdout empty."""

    def __init__(self, output: Output) -> None:
        self.output = output
        self.count = 0

    @abstractmethod
    def add(self, result: Prediction | Problem) -> None: ...

    def finish(self) -> None:
        return None


class JsonLinesWriter(Writer):
    def add(self, result: Prediction | Problem) -> None:
        self.output.emit(result)


class JsonArrayWriter(Writer):
    def add(self, result: Prediction | Problem) -> None:
        self.output.write((",\n" if self.count else "[\n") + to_json(record(result)))
        self.count += 1

    def finish(self) -> None:
        self.output.write("\n]\n" if self.count else "[]\n")


class CsvWriter(Writer):
    def add(self, result: Prediction | Problem) -> None:
        head = "" if self.count else csv_text(CSV_HEADER, ())
        self.count += 1
        self.output.write(head + csv_text(_cells(result), ()))

    def finish(self) -> None:
        if not self.count:
            self.output.write(csv_text(CSV_HEADER, ()))


class TableWriter(Writer):
    def __init__(self, output: Output, topk: int) -> None:
        super().__init__(output)
        self.topk = topk
        self.table: PredictionTable | None = None

    def add(self, result: Prediction | Problem) -> None:
        if self.table is None:
            from mvcr_cli.cli.prediction_table import PredictionTable

            self.table = PredictionTable.fitted(self.output.data_width, result, self.topk)
            self.output.show(self.table.header())
        self.output.show(self.table.row(result))


def _writer(format: PredictFormat, output: Output, topk: int) -> Writer:  # noqa: A002
    if format == "auto":
        format = "table" if output.data_is_terminal else "jsonl"  # noqa: A001
    kinds: dict[str, Callable[[Output], Writer]] = {
        "json": JsonArrayWriter,
        "jsonl": JsonLinesWriter,
        "csv": CsvWriter,
        "table": partial(TableWriter, topk=topk),
    }
    return kinds[format](output)


def _cells(result: Prediction | Problem) -> tuple[str, ...]:
    path = json_path(result.path)["path"]
    if isinstance(result, Problem):
        return (path, "", "", "", "", result.code, result.detail, "", "")
    topk = to_json([[best.label, round(best.probability, 6)] for best in result.topk])
    explanation = "" if result.explanation is None else json_path(result.explanation)["path"]
    size = (str(result.width), str(result.height))
    return (path, result.label, f"{result.probability:.6f}", *size, "", "", topk, explanation)
