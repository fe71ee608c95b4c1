"""The table that compares: every number in it comes from a part's result."""

import argparse
import json
from pathlib import Path

import pytest

from benchmarks import floor, peers, served
from benchmarks.proof import PARTS, commands, markdown
from fluxserve.families.flux.models import FLUX1_SCHNELL, FLUX2_KLEIN_4B

RESULTS = Path(served.__file__).parent / "results"
FLOOR = {"gpu": "G", "torch": "T", "commit": "C", "steps": 4, "total_ms": 100.0, "step_ms": 25.0}
PEERS = {"steps": 4, "modes": {"eager": {"picture_ms": {"median": 300.0}, "file_ms": {"median": 9.0}, "step_ms": 60.0}}}
SUMMARY = {"median": 120.0, "p90": 121.0, "p99": 122.0, "n": 20}
SERVED = {
    "gpu": "G",
    "ready_s": 9.0,
    "first_ms": 200.0,
    "unseen_sizes_ms": [{"size": [896, 1152], "first": 150.0, "next": 120.0, "more": 30.0}],
    "same_bytes": {"after other sizes": True, "beside another": True},
    "client_ms": SUMMARY,
    "overhead_ms": {"median": 3.0},
    "around_the_loop_ms": {"median": 12.0},
    "stages_ms": {"denoise": 108.0, "decode": 5.0},
    "images_per_s": {"1": 8.3, "2": 8.4},
    "image_bytes": 1400000,
    "gpu_memory_mib": "20000",
    "num_inference_steps": 4,
}


def test_ratios_are_to_the_floor_of_the_same_run() -> None:
    table = markdown({"floor": FLOOR, "peers": PEERS, "served": SERVED})
    assert "gpu G, torch T, commit C" in table
    assert "| diffusers BF16, eager, without its PNG | 300 | 240 | 60.00 | 3.000 |" in table
    assert "| fluxserve, gRPC to PNG | 120 | 108 | 27.00 | 1.200 |" in table
    assert "client, ms: median 120.0, p90 121.0, p99 122.0, n 20; ready after 9.0 s" in table
    assert '- the same bytes from the same seed: {"after other sizes": true, "beside another": true}' in table
    assert "- a size never seen, ms more than its next times: 896 × 1152 30.0" in table


def test_memory_is_told_in_its_parts() -> None:
    parts = {"opened": 17.2, "of which arena": 0.31, "peak": 18.9}
    table = markdown({"floor": FLOOR, "engines": {"engines": [{"engine": "fused fp8", "gib": parts}]}})
    assert '- memory of fused fp8, GiB: {"opened": 17.2, "of which arena": 0.31, "peak": 18.9}' in table


def test_without_a_floor_there_is_no_ratio() -> None:
    assert "| fluxserve, gRPC to PNG | 120 | 108 | 27.00 |  |" in markdown({"served": SERVED})


def test_a_part_of_another_commit_says_so_and_has_no_ratio() -> None:
    """And one from when Pillow's PNG was not timed apart says that."""
    old = {"commit": "B", "steps": 4, "modes": {"eager": {"total_ms": {"median": 500.0}, "step_ms": 60.0}}}
    table = markdown({"floor": FLOOR, "peers": old, "served": {**SERVED, "commit": "C"}})
    assert "| diffusers BF16, eager, with Pillow's PNG; another run, commit B | 500 | 240 | 60.00 |  |" in table
    assert "| fluxserve, gRPC to PNG | 120 | 108 | 27.00 | 1.200 |" in table


def test_an_edit_has_a_floor_and_peers_of_its_own() -> None:
    edit = {"floor-edit": {**FLOOR, "total_ms": 200.0}, "peers-edit": PEERS, "served-edit": SERVED}
    table = markdown({"floor": FLOOR, "served": SERVED, **edit})
    assert "| fluxserve, gRPC to PNG | 120 | 108 | 27.00 | 1.200 |" in table
    assert "| diffusers BF16, eager, without its PNG, with a reference | 300 | 240 | 60.00 | 1.500 |" in table
    assert "| fluxserve, gRPC to PNG, with a reference | 120 | 108 | 27.00 | 0.600 |" in table
    assert "- with a reference: stages, ms: denoise 108.0, decode 5.0" in table


ASKED = argparse.Namespace(checkpoint="C", artifact="A", size="512x768", steps=None, reference="1024x1024")


def test_what_is_run_of_a_model() -> None:
    """Its own steps; an edit only of one that takes references."""
    found = commands(ASKED, FLUX1_SCHNELL)
    assert list(found) == ["floor", "peers", "engines", "served"]
    assert found["floor"] == ["--model", "flux.1-schnell", "--size", "512x768", "--steps", "4"]
    found = commands(ASKED, FLUX2_KLEIN_4B)
    assert tuple(found) == PARTS
    assert found["served-edit"] == [*found["served"], "--reference", "1024x1024"]


def test_the_parts_understand_their_arguments() -> None:
    found = commands(ASKED, FLUX2_KLEIN_4B)
    for module, part in ((floor, "floor-edit"), (peers, "peers-edit"), (served, "served-edit")):
        args = module.parser().parse_args(found[part])
        assert args.reference == (1024, 1024) and args.steps == 4


@pytest.mark.parametrize("file", sorted(RESULTS.glob("flux*-h100-????-??-??.json")), ids=lambda file: file.stem)
def test_kept_results_still_make_a_table(file: Path) -> None:
    """A part may be measured again beside those that a file has from before; one named by its commit is done with."""
    found = json.loads(file.read_text())
    client = found["served"]["client_ms"]["median"]
    assert f"client, ms: median {client}, " in markdown(found)
