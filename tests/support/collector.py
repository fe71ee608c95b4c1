"""An OpenTelemetry collector: takes spans over OTLP/HTTP, as protobuf or JSON, and keeps them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from google.protobuf.json_format import MessageToDict
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class Span:
    """One span; ids in hexadecimal, `parent` "" for a root."""

    name: str
    trace: str
    id: str
    parent: str
    kind: int
    failed: bool
    attributes: dict[str, Any]
    service: str


@dataclass
class Collector:
    """Where spans are sent, and what came: `received` has the path and body of each message."""

    url: str = ""
    received: list[tuple[str, bytes]] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)

    def named(self, name: str) -> list[Span]:
        return [span for span in list(self.spans) if span.name == name]

    def take(self, path: str, kind: str, body: bytes) -> None:
        self.received.append((path, body))
        self.spans.extend(_of_json(body) if "json" in kind else _of_protobuf(body))


@contextmanager
def collector() -> Iterator[Collector]:
    kept = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            kept.take(self.path, self.headers["Content-Type"], self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True).start()
        kept.url = f"http://127.0.0.1:{http.server_port}/v1/traces"
        try:
            yield kept
        finally:
            http.shutdown()


def _of_protobuf(body: bytes) -> Iterator[Span]:
    message = ExportTraceServiceRequest.FromString(body)
    for resource in message.resource_spans:
        service = _attributes(MessageToDict(resource.resource)).get("service.name", "")
        for span in (span for scope in resource.scope_spans for span in scope.spans):
            ids = span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex()
            attributes = _attributes(MessageToDict(span))
            yield Span(span.name, *ids, span.kind, span.status.code == 2, attributes, service)


def _of_json(body: bytes) -> Iterator[Span]:
    for resource in json.loads(body)["resourceSpans"]:
        service = _attributes(resource["resource"]).get("service.name", "")
        for span in (span for scope in resource["scopeSpans"] for span in scope["spans"]):
            ids = span["traceId"], span["spanId"], span.get("parentSpanId", "")
            failed = span.get("status", {}).get("code") == 2
            yield Span(span["name"], *ids, span["kind"], failed, _attributes(span), service)


def _attributes(holder: dict[str, Any]) -> dict[str, Any]:
    return {pair["key"]: next(iter(pair["value"].values()), None) for pair in holder.get("attributes", ())}
