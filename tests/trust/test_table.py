"""The table of promises in docs/trust.md names tests that exist, each in the tier where it runs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "trust.md"
PROMISES = 38
NODE = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)(?:\[\w+\])?`")


def rows() -> dict[int, str]:
    """The promises by their numbers."""
    table = DOCUMENT.read_text("utf-8").partition("\n## Cases of our own")[0]
    found = (re.match(r"\| (\d+) \|", line) for line in table.splitlines())
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
    tests = nodes_in(row)
    assert tests
    for file, name, long in tests:
        source = definition(file, name)
        assert not long or "pytest.mark.slow" in source
        assert long or "@pytest.mark.slow" not in source
    assert ("| test, trust |" in row) == any(long for *_, long in tests)


def test_every_test_that_the_document_names_exists() -> None:
    found = nodes_in(DOCUMENT.read_text("utf-8"))
    assert len(found) > 2 * PROMISES
    for file, name, _ in found:
        assert definition(file, name)


def nodes_in(row: str) -> list[tuple[str, str, bool]]:
    """File, name, and whether it is one of the long ones."""
    return [(match[1], match[2], row[: match.start()].endswith("long: ")) for match in NODE.finditer(row)]
