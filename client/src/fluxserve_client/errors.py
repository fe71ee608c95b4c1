"""The errors of the client: one tree, and the one place where a server's status becomes one of them.

    FluxserveError
    ├── InvalidRequest       INVALID_ARGUMENT    a value the server does not accept; the message names the field
    ├── RequestIdInUse       ALREADY_EXISTS      another request with this id is in flight
    ├── AccessDenied         UNAUTHENTICATED, PERMISSION_DENIED
    ├── Unavailable          UNAVAILABLE         the server cannot take the request now; trying later may work
    │   └── QueueFull                            … because its queue is full
    ├── Cancelled            CANCELLED           somebody cancelled the request on the server
    ├── DeadlineExceeded     DEADLINE_EXCEEDED   `timeout` passed (also a `TimeoutError`)
    ├── ConnectionFailed     -                   nothing answered, or the connection broke (also a `ConnectionError`)
    └── ServerError          anything else       a fault of the server, or an answer that breaks the contract

Wrong *types* in the caller's own arguments are plain `TypeError` and `ValueError`, raised before anything is sent.
"""

from __future__ import annotations

import re


class FluxserveError(Exception):
    """A request that did not end in a picture.

    Attributes:
        message: what the server (or the client) said, without Triton's prefixes.
        status: gRPC's name of the status, e.g. "INVALID_ARGUMENT", over either protocol; "HTTP 502" where
            the HTTP status has no such name; None where no server answered.
        request_id: the id of the request concerned, "" if there is none.
        ensemble: the ensemble that Triton named in its prefix, usually "flux"; None without the prefix.
    """

    def __init__(
        self, message: str, *, status: str | None = None, request_id: str = "", ensemble: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.request_id = request_id
        self.ensemble = ensemble


class InvalidRequest(FluxserveError):
    """The server does not accept a value; the message names the field, what came and what is allowed."""


class RequestIdInUse(FluxserveError):
    """Another request with this id is in flight."""


class AccessDenied(FluxserveError):
    """The server, or a proxy before it, wants other credentials (see `headers` and `Tls`)."""


class Unavailable(FluxserveError):
    """The server cannot take the request now: it is starting, stopping, or let the request wait too long."""


class QueueFull(Unavailable):
    """The server's bounded queue is full; try again later."""


class Cancelled(FluxserveError):
    """The request was cancelled on the server, by `cancel` or by an operator."""


class DeadlineExceeded(FluxserveError, TimeoutError):
    """The caller's `timeout`, or a deadline on the way, passed; the server was told to stop."""


class ConnectionFailed(FluxserveError, ConnectionError):
    """Nothing answered at the address, or the connection broke before the answer was complete."""


class ServerError(FluxserveError):
    """A fault of the server, or an answer that breaks the contract."""


_BY_STATUS: dict[str, type[FluxserveError]] = {
    "INVALID_ARGUMENT": InvalidRequest,
    "ALREADY_EXISTS": RequestIdInUse,
    "UNAUTHENTICATED": AccessDenied,
    "PERMISSION_DENIED": AccessDenied,
    "UNAVAILABLE": Unavailable,
    "CANCELLED": Cancelled,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
}

_HTTP_STATUS = {
    "400": "INVALID_ARGUMENT",
    "401": "UNAUTHENTICATED",
    "403": "PERMISSION_DENIED",
    "404": "NOT_FOUND",
    "408": "DEADLINE_EXCEEDED",
    "409": "ALREADY_EXISTS",
    "499": "CANCELLED",
    "500": "INTERNAL",
    "501": "UNIMPLEMENTED",
    "503": "UNAVAILABLE",
    "504": "DEADLINE_EXCEEDED",
}

# Triton's HTTP front end answers 400 for CANCELLED and ALREADY_EXISTS too, so the server puts these codes at the head
# of its message. Messages about an input start with the input's name.
_CODE = re.compile(r"\[(?P<code>CANCELLED|ALREADY_EXISTS)\] ")

# gRPC reports its own transport's failures as UNAVAILABLE too, and tritonclient keeps nothing but the text.
_TRANSPORT_WORDS = re.compile(
    r"failed to connect|errors resolving|resolution failed|socket closed|connection (?:reset|refused|timed out|aborted)"
    r"|broken pipe|goaway|transport closed|endpoint closing|stream removed|handshak|ping timeout|keepalive"
    r"|too many pings",
    re.IGNORECASE,
)
_QUEUE_FULL_WORDS = re.compile(r"^queue: |exceeds maximum queue size", re.IGNORECASE)

_PREFIX = re.compile(r"(?:in ensemble '(?P<ensemble>[^']*)', )?(?:\[request id: [^\]]*\] )?")


def from_status(status: str | None, message: str, request_id: str = "") -> FluxserveError:
    """The error for a status of Triton.

    Args:
        status: "StatusCode.X" as gRPC says it, or the HTTP status as digits; None if tritonclient had none.
        message: Triton's message; the prefixes "in ensemble 'flux', " and "[request id: …] " are taken off.
        request_id: the id the request was sent with.
    """
    prefix = _PREFIX.match(message)
    assert prefix is not None  # every part of it is optional
    text = message[prefix.end() :]
    if code := _CODE.match(text):
        text = text[code.end() :]
    name = _canonical(status, code and code["code"])
    kind = _BY_STATUS.get(name or "", ServerError)
    if kind is Unavailable and _QUEUE_FULL_WORDS.search(text):
        kind = QueueFull
    elif kind is Unavailable and prefix.end() == 0 and _TRANSPORT_WORDS.search(text):
        kind = ConnectionFailed
    return kind(text, status=name, request_id=request_id, ensemble=prefix["ensemble"])


def _canonical(status: str | None, code: str | None) -> str | None:
    if status is None or status.startswith("StatusCode."):
        return status and status.removeprefix("StatusCode.")
    if status == "400" and code:
        return code
    return _HTTP_STATUS.get(status, f"HTTP {status}")
