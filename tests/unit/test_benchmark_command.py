"""What benchmarks have in common: the same arguments mean the same request, and the result is whole in both places."""

import argparse
import json
from pathlib import Path

import pytest

from benchmarks.command import Served, add_served, report, served


@pytest.mark.parametrize(
    ("given", "model", "fields"),
    [
        ([], {}, {}),
        (["--artifact", "a", "--steps", "4"], {"artifact": "a"}, {"num_inference_steps": 4}),
        (["--engine", "fused", "--size", "64x96"], {"engine": "fused"}, {"height": 64, "width": 96}),
    ],
)
def test_what_is_served_and_asked(given: list[str], model: dict[str, str], fields: dict[str, int]) -> None:
    parser = argparse.ArgumentParser()
    add_served(parser)
    found = served(parser.parse_args(given))
    assert found == Served({"artifact": "", "checkpoint": "", "engine": ""} | model, fields)
    assert found.options == model


def test_a_result_is_printed_last_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = {"benchmark": "x", "ms": [1.5]}
    report(result, tmp_path / "x.json")
    report(result, None)
    assert json.loads((tmp_path / "x.json").read_text()) == result
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [result, result]
