"""Say what a tracer of the gateway does. The one that is used by default does nothing, and needs no SDK."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from starlette.types import Scope

if TYPE_CHECKING:
    from fluxserve_gateway.border import Record

Span = Any
"""A tracer's own object; None for what is not traced."""

Call = AbstractContextManager[Mapping[str, str]]
"""Yields the headers of a call, around it."""


class Tracer(Protocol):
    """Makes the spans of requests, and of their calls to servers."""

    def begin(self, scope: Scope, /) -> Span:
        """Begin the span of a request."""

    def end(self, span: Span, scope: Scope, record: Record, status: int) -> None:
        """End the span of a request that was answered with `status`; 0 is no answer."""

    def call(self, parent: Span, server: str, model: str, request_id: str, /) -> Call:
        """Make the span of a call to a server around the block; yield the headers that tell the server of it."""

    def close(self) -> None:
        """Send what is left, within a few seconds."""


class NoTracer:
    """See `Tracer`."""

    def begin(self, _: Scope) -> Span:
        return None

    def end(self, span: Span, scope: Scope, record: Record, status: int) -> None:
        pass

    def call(self, *_: object) -> Call:
        return nullcontext({})

    def close(self) -> None:
        pass


def tracer_to(url: str) -> Tracer:
    """Return the tracer that sends spans to `url`, an OpenTelemetry collector, over OTLP/HTTP.

    Raises:
        ValueError: OpenTelemetry is not installed, or no http:// or https:// address.
    """
    if not _is_http(url):
        raise ValueError(f"trace: got {url!r}; expected an OTLP/HTTP address like http://localhost:4318/v1/traces")
    try:
        from fluxserve_gateway.tracing import OpenTelemetry  # what it imports is an extra of the distribution
    except ImportError as error:
        raise ValueError(f"trace: {error}; install it with: pip install 'fluxserve-gateway[tracing]'") from error
    return OpenTelemetry(url)


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
        _ = parts.port  # checked when it is read
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)
