"""The command line: the table of contents, and `main`, the only place where errors become messages and exit codes."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
import sys
import time
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from mvcr_cli import __version__
from mvcr_cli.cli import signals
from mvcr_cli.cli.benchmark import benchmark
from mvcr_cli.cli.evaluate import evaluate
from mvcr_cli.cli.export import export
from mvcr_cli.cli.output import Output, ReaderLeftError
from mvcr_cli.cli.predict import predict
from mvcr_cli.cli.session import Session
from mvcr_cli.cli.train import train
from mvcr_cli.errors import (
    ExitCode,
    InputMissing,
    MvcrError,
    NotPermitted,
    UsageError,
    WorkerFailed,
    WriteFailed,
    is_out_of_memory,
)
from mvcr_cli.paths import display_name

EXAMPLES = """Examples:
  mvcr train ./data                  # one folder a class
  mvcr train ./data --time 3m        # as good as three minutes allow
  mvcr eval                          # the newest run on its validation pictures
  mvcr predict img.jpg | jq .        # one JSON line a picture
  mvcr export --format onnx          # a file, checked against the run"""

# Kinds of values that the library behind Typer refuses: what is wrong, and what to write.
KINDS = {
    "float_parsing": ("no number", "write a number such as 0.1"),
    "int_parsing": ("no whole number", "write a whole number such as 8"),
    "bool_parsing": ("neither true nor false", "write 1 or 0"),
}

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich", epilog=EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
app.command()(train)
app.command("eval")(evaluate)
app.command()(predict)
app.command()(export)
app.command()(benchmark)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mvcr {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True, epilog=EXAMPLES)
def start(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Classify pictures where size matters: train on a folder, know how far to trust the result."""
    if ctx.invoked_subcommand is None:
        with contextlib.redirect_stdout(sys.stderr):
            ctx.get_help()
        raise typer.Exit(ExitCode.USAGE)


def main(argv: Sequence[str] | None = None, *, started: float | None = None) -> NoReturn:
    """Run one command line; leave through `SystemExit` with its exit code.

    Args:
        argv: arguments without the program's name; None takes those of the process.
        started: `time.monotonic()` when the program started, for `--time`.
    """
    with Output() as output, signals.signals_end_the_program() as ending:
        code = _run(argv, Session(output, time.monotonic() if started is None else started))
    sys.exit(code if ending.code is None else ending.code)


def _run(argv: Sequence[str] | None, session: Session) -> int:
    try:
        # Without standalone mode, Typer returns the code of `typer.Exit`, and 130 after Ctrl-C.
        return int(app(argv, prog_name="mvcr", standalone_mode=False, obj=session) or ExitCode.OK)
    except ReaderLeftError:
        return ExitCode.PIPE_CLOSED
    except SystemExit as error:
        # Typer answers a closed pipe under `--help`, or under a stray print, with 1.
        return ExitCode.PIPE_CLOSED if error.code == 1 else int(error.code or 0)
    except Exception as error:
        if signals.ending.code is not None:  # an import or a call that the signal cut short, in its own words
            return signals.ending.code
        known = explain(error)
        if known is None:
            session.output.bug(error)
            return ExitCode.INTERNAL
        session.output.error(known.message, known.hint)
        return known.exit_code


def explain(error: Exception) -> MvcrError | None:
    """The expected failure that `error` is, or None for a bug."""
    if isinstance(error, MvcrError):
        return error
    if isinstance(error, typer.TyperException):
        context = getattr(error, "ctx", None)
        message, near = _of_another_kind(error) or (error.format_message(), None)
        return UsageError(message, near or f"{context.command_path if context else 'mvcr'} --help")
    if is_out_of_memory(error):
        where = "".join(f" {note}" for note in getattr(error, "__notes__", ())[:1])
        return WorkerFailed(
            f"out of memory{where}", "a smaller --batch or --imgsz needs less; so do fewer --workers or --tiles"
        )
    return _explain_os(error) if isinstance(error, OSError) else None


def _of_another_kind(error: typer.TyperException) -> tuple[str, str | None] | None:
    """Message and hint for a value of a kind that its option does not take; None for what else is refused."""
    option = getattr(error, "param", None)
    problems = getattr(error.__cause__, "errors", None)
    if option is None or problems is None:
        return None
    kind, value = problems()[0]["type"], problems()[0]["input"]
    name = f"{option.opts[0]} {value!r}"
    if kind in KINDS:
        return f"{name} is {KINDS[kind][0]}", KINDS[kind][1]
    if found := re.search(".* is not one of (.*)[.]", error.message, re.DOTALL):
        choices = re.findall("'([^']*)'", found[1])
        near = difflib.get_close_matches(str(value), choices, 1)
        return f"{name} is none of {', '.join(choices)}", f"did you mean {near[0]}?" if near else None
    return None


def _explain_os(error: OSError) -> MvcrError | None:
    where = f": {display_name(os.fsdecode(error.filename))}" if isinstance(error.filename, str | bytes) else ""
    reason = f"{os.strerror(error.errno)}{where}" if error.errno else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
        return WriteFailed(reason, "free some space or choose another disk, and run the same command again")
    if error.errno in (errno.EACCES, errno.EPERM):
        return NotPermitted(reason, "ask for access, or choose another folder")
    if error.errno == errno.ENAMETOOLONG:
        return InputMissing(reason, "no file can have such a long name")
    if error.errno == errno.ENOENT and not _has_current_folder():
        return InputMissing("the current folder was deleted", "cd to a folder that exists")
    return None


def _has_current_folder() -> bool:
    try:
        return bool(os.getcwd())
    except FileNotFoundError:
        return False
