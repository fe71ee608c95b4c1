"""Trace requests with OpenTelemetry: a server span for each, and a client span for each call to a server.

The parent of a request's span is the caller's, by `traceparent`. The server gets the client span as `traceparent`.
No span holds a prompt: a server's message may quote one, so that errors have their type alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import Scope

from fluxserve_gateway.border import Record
from fluxserve_gateway.version import __version__

_PREFIX = "/v1/"  # of what is traced: probes, scrapes and the page's files would drown the requests
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"))
_REFUSED, _FAILED = 400, 500

_DELAY_MS = 1000  # for which spans are collected before they are sent
_CLOSE_S = 5.0

_contexts = TraceContextTextMapPropagator()


class OpenTelemetry:
    """See `Tracer`.

    A thread sends the spans. While the collector does not take them, the newest 2,048 are kept. OpenTelemetry's own
    environment variables set the service's name, the sampler, and the headers and certificates for the collector.
    """

    def __init__(self, url: str) -> None:
        """Send spans to `url`, over OTLP/HTTP."""
        own = Resource({"service.name": "fluxserve-gateway", "service.version": __version__})
        self._provider = TracerProvider(resource=own.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=url)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=_DELAY_MS))
        self._tracer = self._provider.get_tracer("fluxserve_gateway", __version__)

    def begin(self, scope: Scope) -> Span | None:
        if not scope["path"].startswith(_PREFIX):
            return None
        method = _method(scope)
        return self._tracer.start_span(
            method, _parent(scope), SpanKind.SERVER, {"http.request.method": method, "url.scheme": scope["scheme"]}
        )

    def end(self, span: Span | None, scope: Scope, record: Record, status: int) -> None:
        if span is None:
            return
        if route := getattr(scope.get("route"), "path", ""):
            span.update_name(f"{_method(scope)} {route}")
            span.set_attribute("http.route", route)
        span.set_attribute("fluxserve.request_id", record.request_id)
        if record.model:
            span.set_attribute("gen_ai.request.model", record.model)
        if status:
            span.set_attribute("http.response.status_code", status)
        if record.outcome != "ok":
            span.set_attribute("error.type", record.outcome)
        if _failed(status, record.outcome):
            span.set_status(StatusCode.ERROR)
        span.end()

    @contextmanager
    def call(self, parent: Span | None, server: str, model: str, request_id: str) -> Iterator[Mapping[str, str]]:
        about = {"fluxserve.server": server, "gen_ai.request.model": model, "fluxserve.request_id": request_id}
        span = self._tracer.start_span(f"generate {model}", _within(parent), SpanKind.CLIENT, about)
        try:
            yield _headers(span)
        except BaseException as error:
            span.set_attribute("error.type", type(error).__name__)
            span.set_status(StatusCode.ERROR)
            raise
        finally:
            span.end()

    def close(self) -> None:
        """Send what is left, within five seconds; a collector that hangs loses it."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)  # it would wait for half a minute
        closing.start()
        closing.join(_CLOSE_S)


def _method(scope: Scope) -> str:
    """Return the method where it is one of HTTP's: callers cannot make new names of spans."""
    method: str = scope["method"]
    return method if method in _METHODS else "_OTHER"


def _parent(scope: Scope) -> Context:
    given = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    return _contexts.extract(given, Context())


def _within(parent: Span | None) -> Context:
    return Context() if parent is None else set_span_in_context(parent, Context())


def _headers(span: Span) -> dict[str, str]:
    """Return the headers that name `span` as parent; none if it is not sampled, because Triton ignores that flag."""
    headers: dict[str, str] = {}
    if span.get_span_context().trace_flags.sampled:
        _contexts.inject(headers, set_span_in_context(span, Context()))
    return headers


def _failed(status: int, outcome: str) -> bool:
    """Tell whether the gateway failed: by its status, or in a stream's last event. A refusal is the caller's error."""
    in_stream = status < _REFUSED and outcome != "ok"
    return status >= _FAILED or in_stream
