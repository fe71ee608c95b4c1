"""The table that compares: every number in it comes from a part's result."""

from benchmarks.flux1 import markdown

FLOOR = {"gpu": "G", "torch": "T", "commit": "C", "steps": 4, "total_ms": 100.0, "step_ms": 25.0}
PEERS = {"steps": 4, "modes": {"eager": {"total_ms": {"median": 300.0}, "step_ms": 60.0}}}
SUMMARY = {"median": 120.0, "p90": 121.0, "p99": 122.0, "n": 20}
SERVED = {
    "gpu": "G",
    "ready_s": 9.0,
    "first_ms": 200.0,
    "unseen_size_ms": {"size": [896, 1152], "first": 150.0, "next": 120.0},
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
    assert "| diffusers BF16, eager | 300 | 240 | 60.00 | 3.000 |" in table
    assert "| fluxserve, gRPC to PNG | 120 | 108 | 27.00 | 1.200 |" in table
    assert "client, ms: median 120.0, p90 121.0, p99 122.0, n 20; ready after 9.0 s" in table


def test_memory_is_told_in_its_parts() -> None:
    parts = {"opened": 17.2, "of which arena": 0.31, "peak": 18.9}
    table = markdown({"floor": FLOOR, "engines": {"engines": [{"engine": "fused fp8", "gib": parts}]}})
    assert '- memory of fused fp8, GiB: {"opened": 17.2, "of which arena": 0.31, "peak": 18.9}' in table


def test_without_a_floor_there_is_no_ratio() -> None:
    assert "| fluxserve, gRPC to PNG | 120 | 108 | 27.00 |  |" in markdown({"served": SERVED})
