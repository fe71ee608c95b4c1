"""A short soak of the shared server; `python -m benchmarks.soak` is the long one."""

from collections import Counter

import pytest

from benchmarks.soak.callers import Callers
from benchmarks.soak.cases import Shape, references
from benchmarks.soak.run import Plan, soak
from fluxserve.supervisor import TritonServer

pytestmark = pytest.mark.xdist_group("triton")

SHAPE = Shape(sides=(64, 96, 128), steps=2, long_steps=30)


def urls(server: TritonServer) -> dict[str, str]:
    return {"http": server.http_url, "grpc": server.grpc_url}


async def test_a_short_soak(server: TritonServer) -> None:
    soaked = await soak(urls(server), Plan(SHAPE, seconds=8, at_once=6, seed=3, warm_up=3), server)
    assert {p.text: p.broken for p in soaked.promises if p.verdict != "held"} == {}
    kinds = Counter(outcome.case.kind for outcome in soaked.outcomes)
    assert kinds["good"] > kinds["abandoned"] > 0
    assert kinds["bad"] > 0


async def test_other_bytes_are_noticed(server: TritonServer) -> None:
    first, second, *_ = references(SHAPE)
    callers = Callers(urls(server), {first.what: (b"another picture",)})
    try:
        assert await callers.draw_references([first, second]) == [f"reference {first.what} over {first.protocol}"]
    finally:
        await callers.close()
