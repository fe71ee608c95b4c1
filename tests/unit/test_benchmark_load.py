"""The load benchmark: what perf_analyzer is told, what it says, and what the server counted meanwhile."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks import load
from fluxserve import contract
from fluxserve.supervisor import Ports

TABLE = """Concurrency,Inferences/Second,Client Send,Network+Server Send/Recv,Server Queue,Server Compute Input,\
Server Compute Infer,Server Compute Output,Client Recv,p50 latency,p90 latency,p95 latency,p99 latency
1,5.98819,8,2359,2,84,92610,175,5,96505,98681,98681,98681
"""
METRICS = """# HELP fluxserve_stage_seconds Seconds by stage
fluxserve_stage_seconds_count{{stage="image"}} {count}
fluxserve_stage_seconds_sum{{stage="image"}} {image}
fluxserve_stage_seconds_bucket{{stage="image",le="0.005"}} 61
fluxserve_stage_seconds_count{{stage="total"}} {count}
fluxserve_stage_seconds_sum{{stage="total"}} {total}
fluxserve_images_total 61
"""


def test_what_perf_analyzer_says() -> None:
    """The mean is the sum of what it takes the latency apart into."""
    latencies = {"p50": 96.5, "p90": 98.68, "p95": 98.68, "p99": 98.68}
    assert load.read(TABLE) == pytest.approx({"pictures_per_s": 5.988, "mean": 95.24, **latencies}, abs=0.01)


def test_stages_of_what_came_in_between() -> None:
    before, after = (
        load.stages(METRICS.format(count=count, image=image, total=total))
        for count, image, total in ((2, 0.01, 4.0), (6, 0.03, 12.0))
    )
    assert load.between(before, after) == {"image": 5.0, "total": 2000.0}
    assert load.between({}, before) == {"image": 5.0, "total": 2000.0}
    assert load.between(after, after) == {}


def test_what_it_is_told() -> None:
    told = load.command("pa", Ports(1, 2, 3), "http", 4, 20, Path("d.json"), Path("t.csv"))
    assert told[:7] == ["pa", "-m", "flux", "-i", "http", "-u", "127.0.0.1:1"]
    assert told[told.index("--concurrency-range") + 1] == "4" and told[told.index("--request-count") + 1] == "20"


def test_the_requests_are_of_the_contract() -> None:
    inputs = {tensor.name: tensor for tensor in contract.FLUX.inputs}
    asked = load.requests({"height": 96, "width": 128, "num_inference_steps": 2})["data"]
    for request in asked:
        for name, given in request.items():
            assert len(given["content"]) == int(np.prod(given["shape"])) and name in inputs
    assert len({request["seed"]["content"][0] for request in asked}) == len(asked) > 1
    assert all(request["height"] == {"content": [96], "shape": [1]} for request in asked)


@pytest.mark.skipif(shutil.which("perf_analyzer") is None, reason="needs perf_analyzer on the PATH (glibc 2.38)")
def test_a_served_model_under_load() -> None:
    (one, two) = load.measure(
        "perf_analyzer", {}, {"height": 96, "width": 128, "num_inference_steps": 2}, "grpc", [1, 2], 3
    )
    assert one["p50"] > one["stages_ms"]["total"] > 0 and two["callers"] == 2
