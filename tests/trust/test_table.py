"""The table of promises in docs/trust.md names tests that exist, each in the tier where it runs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "trust.md"
PROMISES = 38
NODE = re.compile(r"`(?:python -m pytest )?(tests/[\w/]+\.py)::(test_\w+)(?:\[([^`]*)\])?`")


def rows() -> dict[int, str]:
    """The rows that begin with a number, by that number."""
    found = (re.match(r"\| (\d+) \|", line) for line in DOCUMENT.read_text("utf-8").splitlines())
    numbered = [(int(match[1]), match.string) for match in found if match]
    assert len(dict(numbered)) == len(numbered), "a number stands twice"
    return dict(numbered)


def definition(file: str, name: str) -> str:
    """The source of a test with its decorators."""
    text = (ROOT / file).read_text("utf-8")
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            return "\n".join(text.splitlines()[first - 1 : node.end_lineno])
    raise AssertionError(f"{DOCUMENT.name} names {file}::{name}, which is not there")


def test_every_promise_has_its_row() -> None:
    assert sorted(rows()) == list(range(1, PROMISES + 1))


@pytest.mark.parametrize("number", range(1, PROMISES + 1))
def test_the_tests_of_a_row_exist_and_are_where_it_says(number: int) -> None:
    row = rows()[number]
    tests = [(definition(file, name), tier) for file, name, tier in tests_of(row)]
    assert tests or "no test" in row
    for source, slow in tests:
        assert not slow or "pytest.mark.slow" in source
        assert slow or "@pytest.mark.slow" not in source


def tests_of(row: str) -> list[tuple[str, str, bool]]:
    """File, name, and whether `-m slow` stands before it."""
    return [(match[1], match[2], row[: match.start() + 1].endswith("-m slow `")) for match in NODE.finditer(row)]
