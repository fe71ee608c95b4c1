"""Traces: `--trace` sends one span a request and model to an OpenTelemetry collector; other arguments pass through."""

import uuid

import pytest
from fluxserve_client import AsyncClient
from fluxserve_gateway import Fleet, Server
from fluxserve_gateway.spans import tracer_to

from tests.gateway.serving import Gateway
from tests.support.collector import Collector, Span, collector
from tests.triton.conftest import wait_for
from tests.triton.supervised import SMALL, serve

pytestmark = pytest.mark.xdist_group("lifecycle")


def test_a_collector_gets_the_spans_of_a_request() -> None:
    with (
        collector() as kept,
        serve("--trace", kept.url, "--trace-rate", "1", "--triton-arg=--log-verbose=1") as s,
    ):
        s.client.draw(**SMALL)
        wait_for(lambda: kept.named("generate"), 60)
        assert {path for path, _ in kept.received} == {"/v1/traces"}
        assert all(kept.named(name) for name in ("InferRequest", "flux", "prepare", "generate"))
        assert s.said("TRITONBACKEND_ModelInstanceExecute"), "--log-verbose=1 came through"
        for protocol, port in (("grpc", s.ports.grpc), ("http", s.ports.http)):
            through_a_gateway(kept, f"{protocol}://127.0.0.1:{port}")


def through_a_gateway(kept: Collector, url: str) -> None:
    """The caller's trace has the gateway's span, below it the call's, and below that Triton's."""
    trace, caller = uuid.uuid4().hex, uuid.uuid4().hex[:16]
    with Gateway(Fleet({"tiny": [Server(url, AsyncClient(url))]}, tracer_to(kept.url))) as gateway:
        body = {"prompt": "a", "size": "64x64", "num_inference_steps": 1}
        answer = gateway.post(json=body, headers={"traceparent": f"00-{trace}-{caller}-01"})
        assert answer.status_code == 200, answer.text

    def ours(name: str) -> list[Span]:
        return [span for span in kept.named(name) if span.trace == trace]

    (own,), (call,) = ours("POST /v1/images/generations"), ours("generate tiny")
    assert (own.parent, call.parent) == (caller, own.id)
    wait_for(lambda: ours("InferRequest") and ours("generate"), 60)
    (triton,), (flux,) = ours("InferRequest"), ours("flux")
    assert triton.parent == call.id
    assert flux.parent == triton.id
