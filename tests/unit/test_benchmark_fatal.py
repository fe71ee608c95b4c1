"""benchmarks.fatal: the table of docs/security.md is the result that was kept."""

import json
from pathlib import Path

from benchmarks.fatal import requests

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "benchmarks" / "results" / "fatal-cpu-2026-11-30.json"


def test_the_kept_result_is_of_these_requests() -> None:
    rows = json.loads(KEPT.read_text(encoding="utf-8"))["requests"]
    assert [(row["request"], row["bytes"]) for row in rows] == [(r.what, len(r.body)) for r in requests()]


def test_the_table_says_what_was_seen() -> None:
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    table = [line for line in page.splitlines() if line.startswith("|")]
    for row in json.loads(KEPT.read_text(encoding="utf-8"))["requests"]:
        if row["triton"] == "lives":
            assert any(" refused | ended 26.06" in line for line in table) and row["answer"] == "400"
        elif row["request"] != "shape [2 * 10^9]":  # docs/recovery.md has it
            assert any(f"| {row['bytes']:,} | {row['triton']}" in line for line in table), row
