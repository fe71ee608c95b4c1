"""CHANGELOG.md has the headings of Keep a Changelog, in their order, and nothing between them but its entries."""

import re
from pathlib import Path

import pytest

KINDS = ("Added", "Changed", "Deprecated", "Removed", "Fixed", "Security")
TEXT = (Path(__file__).parents[2] / "CHANGELOG.md").read_text(encoding="utf-8")
RELEASES = re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]


@pytest.mark.parametrize("release", RELEASES, ids=lambda release: release.splitlines()[0])
def test_headings_are_in_order(release: str) -> None:
    headings = re.findall(r"^### (.*)$", release, re.MULTILINE)
    assert headings == [kind for kind in KINDS if kind in headings], "each once, in this order"
    assert headings and "\n- " not in release.partition("\n### ")[0], "an entry stands below a heading"
    for line in release.partition("\n### ")[2].splitlines()[1:]:
        assert re.match(r"(- |  |### |$)", line), line
