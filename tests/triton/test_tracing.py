"""Traces: `--trace` sends one span a request and model to an OpenTelemetry collector; other arguments pass through."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.triton.conftest import wait_for
from tests.triton.supervised import SMALL, serve

pytestmark = pytest.mark.xdist_group("lifecycle")


class Collector(BaseHTTPRequestHandler):
    """OTLP over HTTP as far as it says that it has understood; keeps what it was sent."""

    received: list[tuple[str, bytes]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.received.append((self.path, body))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def collector() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """Its address, and what was posted to it."""
    received: list[tuple[str, bytes]] = []
    handler = type("Handler", (Collector,), {"received": received})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}/v1/traces", received
        http.shutdown()


def test_a_collector_gets_the_spans_of_a_request() -> None:
    with (
        collector() as (url, received),
        serve("--trace", url, "--trace-rate", "1", "--triton-arg=--log-verbose=1") as s,
    ):
        s.client.draw(**SMALL)
        wait_for(lambda: any(b"generate" in body for _, body in received), 60)
        assert {path for path, _ in received} == {"/v1/traces"}
        spans = b"".join(body for _, body in received)
        assert all(name in spans for name in (b"InferRequest", b"flux", b"prepare", b"generate"))
        assert s.said("TRITONBACKEND_ModelInstanceExecute"), "--log-verbose=1 came through"
