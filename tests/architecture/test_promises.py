"""docs/promises.md: every promise names a test, and every test that is named exists."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINES = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8").splitlines()
ROWS = [line for line in LINES if re.match(r"\| [^*-]", line) and not line.startswith("| promise")]
NAMED = sorted({name for row in ROWS for name in re.findall(r"`(tests/[^`]+)`", row)})


@cache
def defined_in(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_there_are_promises() -> None:
    assert len(ROWS) > 25


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip()[:60])
def test_a_promise_names_its_tests(row: str) -> None:
    _, promise, held_by, _ = row.split("|")
    assert promise.strip()
    assert re.search(r"`tests/[\w/]+\.py::test_\w+`", held_by)


@pytest.mark.parametrize("name", NAMED)
def test_the_test_exists(name: str) -> None:
    file, _, test = name.partition("::")
    assert test.startswith("test_")
    assert test in defined_in(ROOT / file)
