"""Traces: a request's span and its call's, with the caller's as parent, at a real receiver of OTLP/HTTP."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import openai
import pytest
from fluxserve_client import AsyncClient
from fluxserve_client.errors import InvalidRequest, QueueFull
from fluxserve_gateway import Fleet, Server, tracing
from fluxserve_gateway.spans import tracer_to

from tests.client.fakes import FakeFlux, Wire
from tests.gateway.serving import MODEL, Gateway, server_of, wait_for
from tests.support.collector import Collector, Span, collector

TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{CALLER}-01"
GENERATIONS = "POST /v1/images/generations"
SERVER, CLIENT = 2, 3  # kinds of span
PROMPT = "a fox nobody may read about"


@pytest.fixture
def receiver() -> Iterator[Collector]:
    with collector() as opened:
        yield opened


@contextmanager
def traced(url: str, *servers: Server) -> Iterator[Gateway]:
    with Gateway(Fleet({MODEL: list(servers)}, tracer_to(url))) as opened:
        yield opened


def pair(receiver: Collector) -> tuple[Span, Span]:
    """The spans of the only request: its own, and its call's."""
    (own,), (call,) = receiver.named(GENERATIONS), receiver.named(f"generate {MODEL}")
    assert (own.kind, call.kind, own.service) == (SERVER, CLIENT, "fluxserve-gateway")
    assert (call.trace, call.parent) == (own.trace, own.id)
    return own, call


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_callers_trace_goes_on_to_the_server(receiver: Collector, fake: FakeFlux, protocol: str) -> None:
    with Wire(fake) as wire:
        url = wire.url(protocol)
        with traced(receiver.url, Server(url, AsyncClient(url, poll_interval=0.01))) as gateway:
            headers = {"traceparent": TRACEPARENT, "tracestate": "a=b"}
            answer = gateway.post(json={"prompt": PROMPT, "stream": True}, headers=headers)
            gateway.get("/health/live", headers=headers)
    own, call = pair(receiver)
    assert (own.trace, own.parent) == (TRACE, CALLER)
    assert own.attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/images/generations",
        "http.response.status_code": "200",
        "url.scheme": "http",
        "gen_ai.request.model": MODEL,
        "fluxserve.request_id": answer.headers["x-request-id"],
    }
    assert call.attributes["fluxserve.server"] == url
    parents = [(sent["traceparent"], sent["tracestate"]) for sent in fake.headers if "traceparent" in sent]
    assert parents == [(f"00-{TRACE}-{call.id}-01", "a=b")], "the request alone: no look at its progress has a span"
    assert not (own.failed or call.failed)
    assert len(receiver.spans) == 2, "probes are not traced"
    assert not any(PROMPT.encode() in body for _, body in receiver.received)


@pytest.mark.parametrize("given", [{}, {"traceparent": "00-junk-01"}])
def test_a_trace_of_its_own(receiver: Collector, fake: FakeFlux, given: dict[str, str]) -> None:
    with traced(receiver.url, server_of(fake)) as gateway:
        gateway.post(json={"prompt": "a"}, headers=given)
    own, _ = pair(receiver)
    assert own.parent == ""
    assert len(bytes.fromhex(own.trace)) == 16


def test_a_caller_who_samples_nothing(receiver: Collector, fake: FakeFlux) -> None:
    """Triton would trace any request with a `traceparent`, whatever its flag says: it gets none."""
    server = server_of(fake)
    with traced(receiver.url, server) as gateway:
        answer = gateway.post(json={"prompt": "a"}, headers={"traceparent": f"00-{TRACE}-{CALLER}-00"})
    assert (answer.status_code, receiver.spans) == (200, [])
    assert server.client._transport.headers == {}  # type: ignore[attr-defined]


def test_errors(receiver: Collector, fake: FakeFlux) -> None:
    with traced(receiver.url, server_of(fake)) as gateway:
        fake.error = QueueFull("queue: 64 requests are waiting")
        gateway.post(json={"prompt": "a"})
        fake.error = InvalidRequest(f"prompt: got {PROMPT!r}")
        gateway.post(json={"prompt": PROMPT})
        gateway.post(json={"prompt": "a", "model": "a caller's own words"})
        gateway.get("/v1/no/such/route")
    spans = receiver.named(GENERATIONS)
    seen = {(s.attributes["error.type"], s.attributes["http.response.status_code"], s.failed) for s in spans}
    refused = {("invalid_value", "400", False), ("model_not_found", "404", False)}  # the caller's errors
    assert seen == {("queue_full", "503", True), *refused}
    calls = receiver.named(f"generate {MODEL}")
    assert [(call.failed, call.attributes["error.type"]) for call in calls] == [
        (True, "QueueFull"),
        (True, "InvalidRequest"),
    ]
    (lost,) = receiver.named("GET")
    assert lost.attributes["http.response.status_code"] == "404"
    sent = b"".join(body for _, body in receiver.received)
    assert PROMPT.encode() not in sent
    assert b"own words" not in sent


def test_a_stream_that_fails(receiver: Collector, fake: FakeFlux) -> None:
    fake.steps, fake.step_s = 50, 0.02
    with traced(receiver.url, server_of(fake)) as gateway:
        sdk = gateway.sdk().images.generate(prompt="a", stream=True)
        wait_for(lambda: fake.table)
        next(iter(fake.table.values())).cancelling = True
        with pytest.raises(openai.APIError, match="cancelled"):
            list(sdk)
    own, call = pair(receiver)
    assert (own.attributes["http.response.status_code"], own.attributes["error.type"]) == ("200", "cancelled")
    assert own.failed
    assert call.failed


@pytest.mark.parametrize("kind", ["refuses", "hangs"])
def test_a_collector_that_is_gone_costs_nothing(fake: FakeFlux, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_CLOSE_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        if kind == "refuses":
            silent.close()
            url = "http://127.0.0.1:9/v1/traces"
        else:
            url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1/traces"
        with traced(url, server_of(fake)) as gateway:
            began = time.monotonic()
            statuses = [gateway.post(json={"prompt": "a"}).status_code for _ in range(5)]
            assert statuses == [200] * 5
            assert time.monotonic() - began < 5, "less than any timeout of the exporter's"
            began = time.monotonic()
    assert time.monotonic() - began < 5, "the end is bounded"


@pytest.mark.parametrize("url", ["ftp://a/v1/traces", "localhost:4318", "http://", "http://a:x/", ""])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ValueError, match=r"^trace: got .*; expected an OTLP/HTTP address like http://localhost:4318"):
        tracer_to(url)


def test_no_sdk_is_imported_without() -> None:
    """The bare API is there anyway: FastAPI imports it."""
    code = "import sys, fluxserve_gateway.cli; sys.exit('opentelemetry.sdk' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_the_extra() -> None:
    """The error names what to install."""
    code = (
        "import sys; sys.modules['opentelemetry.sdk'] = None\n"
        "from fluxserve_gateway.cli import main\n"
        "sys.exit(main(['serve', '--no-auth', '--server', 'm=localhost', '--trace', 'http://a/v1/traces']))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "pip install 'fluxserve-gateway[tracing]'" in ended.stderr
