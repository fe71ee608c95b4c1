"""Wrap every request: give it an id, headers, answers to its errors, a log line and metrics."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fluxserve_gateway.errors import CallerGone, GatewayError
from fluxserve_gateway.spans import Span, Tracer

log = logging.getLogger("fluxserve_gateway")
access = logging.getLogger("fluxserve_gateway.access")

_CALLER_GONE = 499  # what proxies log where nobody was left to answer

_PART = 1 << 18  # bytes that a caller must read within `send_timeout`

_SECURITY = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


@dataclass
class Record:
    """Collects what is known of one request, for its log line.

    Attributes:
        request_id: ours; the servers know the request by it, too.
        fields: for the log, beside those that every line has.
        model, operation: of a request for pictures, "" until they are known.
        outcome: "ok", or an error's code.
        span: of its trace; None if it has none.
        ends: closed once the answer is sent, or nobody is left to send it to.
    """

    request_id: str = field(default_factory=lambda: f"req_{uuid.uuid4().hex}")
    fields: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    operation: str = ""
    outcome: str = "ok"
    span: Span = None
    ends: ExitStack = field(default_factory=ExitStack)

    def at_end(self, do: Callable[[], None]) -> None:
        """Call `do` when the request ends, however it ends."""
        self.ends.callback(do)


def record_of(request: Request) -> Record:
    """Return the record of the request that is being answered."""
    record = request.scope["fluxserve.record"]
    assert isinstance(record, Record)
    return record


def error_of(error: Exception, request_id: str) -> GatewayError:
    """Return the error to answer. One that nobody foresaw is logged, and the caller learns none of its words."""
    if isinstance(error, GatewayError):
        return error
    log.error("request %s: %s", request_id, error, exc_info=error)
    return GatewayError(
        "the gateway failed; its log says why, under this request's x-request-id", code="internal_error"
    )


class Border:
    """Wraps everything else, as ASGI middleware."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        ended: Callable[[Record, float], None],
        tracer: Tracer,
        send_timeout: float,
        https: bool,
    ) -> None:
        """Wrap `app`.

        Args:
            app: the application.
            ended: called with each record and the seconds it took.
            tracer: makes the requests' spans.
            send_timeout: seconds for which a caller may leave a part of the answer unread.
            https: whether answers require TLS of browsers from now on (HSTS).
        """
        self._app = app
        self._send_timeout = send_timeout
        self._ended = ended
        self._tracer = tracer
        self._headers = dict(_SECURITY)
        if https:
            self._headers["strict-transport-security"] = "max-age=31536000"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = scope["fluxserve.record"] = Record(span=self._tracer.begin(scope))
        begun = time.monotonic()
        status = 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = record.request_id
                headers["openai-processing-ms"] = str(round(1000 * (time.monotonic() - begun)))
                for name, value in self._headers.items():
                    headers.setdefault(name, value)
            for part in _parts(message):
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._send_timeout):
                        await send(part)
                    continue
                raise CallerGone  # not from the TimeoutError: its frames refer to this task, and would hold the answer

        try:
            with record.ends:
                await self._app(scope, receive, send_on)
        except CallerGone:
            status, record.outcome = _CALLER_GONE, "abandoned"
        except Exception as error:  # noqa: BLE001 (the last place that can answer)
            answer = error_of(error, record.request_id)
            record.outcome = answer.code or "error"
            if not status:
                await _answer(answer, send_on)
        finally:
            seconds = time.monotonic() - begun
            self._ended(record, seconds)
            self._tracer.end(record.span, scope, record, status)
            caller, _ = scope.get("client") or ("", 0)
            log_request(record, scope["method"], scope["path"], status, seconds, caller)


def log_request(record: Record, method: str, path: str, status: int, seconds: float, caller: str) -> None:
    """Write a request's line; the page's drawings, which are no requests of their own, have status 0."""
    line = {
        "request_id": record.request_id,
        "method": method,
        "path": path,
        "status": status,
        "outcome": record.outcome,
        "seconds": round(seconds, 4),
        "caller": caller,
        **({"model": record.model} if record.model else {}),
        **record.fields,
    }
    access.info("%(method)s %(path)s %(status)d", line, extra={"fields": line})


def _parts(message: Message) -> Iterator[Message]:
    """Split a large body, because a server waits for its reader only before it takes the next message."""
    body = message.get("body", b"")
    last = max(0, len(body) - 1) // _PART * _PART
    for start in range(0, last, _PART):
        yield {**message, "body": body[start : start + _PART], "more_body": True}
    yield {**message, "body": body[last:]} if last else message


async def _answer(error: GatewayError, send: Send) -> None:
    body = json.dumps(error.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers()}
    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
