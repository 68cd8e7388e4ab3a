"""What `main` hands to every command: where output goes, and when the program started."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

import typer

from mvcr_cli.cli.output import Output

Config = TypeVar("Config")


@dataclass(frozen=True)
class Session:
    output: Output
    started: float


def session_of(ctx: typer.Context) -> Session:
    """The session of a running command; from here on stdout carries data only."""
    session = ctx.obj
    assert isinstance(session, Session)
    session.output.open()
    return session


def config_of(kind: type[Config], ctx: typer.Context, **more: Any) -> Config:
    """The command's options as its config: an option's parameter is named like the field that it fills.

    Args:
        more: fields that no single option fills.
    """
    assert dataclasses.is_dataclass(kind)
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in ctx.params.items() if name in names} | more)


def was_given(ctx: typer.Context, name: str) -> bool:
    """Whether an option stands on the command line, whatever its value."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
