"""tests/support/programs.py: a missing program skips a test, and fails it in CI."""

import sys
from pathlib import Path

import pytest

from tests.support import programs

MISSING = "a-program-that-nobody-has"


def test_a_missing_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match=MISSING):
        programs.needed(MISSING)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match=MISSING):
        programs.needed(MISSING)


def test_a_program_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    python = Path(sys.executable)
    monkeypatch.setenv("PATH", str(python.parent))
    assert programs.needed(python.name) == str(python)
