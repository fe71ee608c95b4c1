"""Define the errors that a caller sees, in OpenAI's shape; translate the client's errors into them, here alone.

    GatewayError
    ├── InvalidField        400   a field that is refused; `param` names it
    ├── Unauthorised        401   no key, or one that is not known
    ├── Forbidden           403   a request of another web page, to a gateway without keys
    ├── ModelNotFound       404   no server of this model was named on the command line
    ├── JobNotFound         404   no job with this id belongs to the caller
    ├── NoSuchRoute         404, 405   a path, or a method, that is not the API's
    ├── TooSlow             408   the body did not arrive in time
    ├── Conflict            409   an idempotency key came with another request before
    ├── TooLarge            413   a body beyond its bound
    ├── WrongMediaType      415   a body of another kind
    ├── RateLimited         429   a limit of the caller's key
    ├── Upstream            4xx, 5xx   the server's answer, by `from_client`
    └── Overloaded          503   the gateway, or every server of the model, cannot take the request now

OpenAI's SDK retries 408, 409, 429 and every status from 500 on by itself, unless `x-should-retry` says otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fluxserve_client import (
    AccessDenied,
    Cancelled,
    ConnectionFailed,
    DeadlineExceeded,
    FluxserveError,
    InvalidRequest,
    QueueFull,
    RequestIdInUse,
    Unavailable,
)

_SERVER = "server_error"
_INVALID = "invalid_request_error"


class GatewayError(Exception):
    """A request that does not end in a picture.

    Attributes:
        status: HTTP's.
        kind: `type` of OpenAI's error object.
        param, code: as in OpenAI's error object.
        retry_after: seconds after which another try makes sense; None says nothing.
        should_retry: whether OpenAI's SDK should try again; None leaves it to the SDK's own rules.
    """

    status = 500
    kind = _SERVER
    code: str | None = None
    retry_after: float | None = None
    should_retry: bool | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        should_retry: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.code
        self.retry_after = self.retry_after if retry_after is None else retry_after
        self.should_retry = self.should_retry if should_retry is None else should_retry

    def body(self) -> dict[str, Any]:
        """Write the error as OpenAI does."""
        fields = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": fields}

    def headers(self) -> dict[str, str]:
        """Return the headers that OpenAI's SDK reads beside the status."""
        headers = {}
        if self.retry_after is not None:
            headers["retry-after"] = str(max(1, round(self.retry_after)))
            headers["retry-after-ms"] = str(round(1000 * self.retry_after))
        if self.should_retry is not None:
            headers["x-should-retry"] = str(self.should_retry).lower()
        return headers


class InvalidField(GatewayError):
    status, kind, code = 400, _INVALID, "invalid_value"


class Unauthorised(GatewayError):
    status, kind, code = 401, _INVALID, "invalid_api_key"

    def headers(self) -> dict[str, str]:
        return {**super().headers(), "www-authenticate": "Bearer"}


class Forbidden(GatewayError):
    status, kind, code = 403, _INVALID, "forbidden"


class ModelNotFound(GatewayError):
    status, kind, code = 404, _INVALID, "model_not_found"


class JobNotFound(GatewayError):
    status, kind, code = 404, _INVALID, "job_not_found"


class NoSuchRoute(GatewayError):
    """A path, or a method, that is not the API's; `allow` lists the methods of the path."""

    kind = _INVALID

    def __init__(self, status: int, message: str, allow: str | None) -> None:
        super().__init__(message, code="not_found" if status == 404 else "method_not_allowed")
        self.status, self._allow = status, allow

    def headers(self) -> dict[str, str]:
        return {**super().headers(), **({"allow": self._allow} if self._allow else {})}


class TooSlow(GatewayError):
    status, kind, code, should_retry = 408, _INVALID, "body_timeout", False


class Conflict(GatewayError):
    status, kind, code, should_retry = 409, _INVALID, "conflict", False


class TooLarge(GatewayError):
    status, kind, code = 413, _INVALID, "body_too_large"


class WrongMediaType(GatewayError):
    status, kind, code = 415, _INVALID, "unsupported_media_type"


class RateLimited(GatewayError):
    status, kind, code = 429, "requests", "rate_limit_exceeded"


class Overloaded(GatewayError):
    status, code, retry_after, should_retry = 503, "overloaded", 1.0, True


class Upstream(GatewayError):
    """What a server, or the way to it, answered."""

    def __init__(self, status: int, message: str, *, kind: str = _SERVER, **details: Any) -> None:
        super().__init__(message, **details)
        self.status, self.kind = status, kind


class CallerGone(Exception):
    """The caller hung up; nothing is left to answer."""


# The first class that fits. What was cancelled, or took too long, must not be drawn again by a library's retry.
_FROM_CLIENT: tuple[tuple[type[FluxserveError], int, Mapping[str, Any]], ...] = (
    (QueueFull, 503, {"code": "queue_full", "retry_after": 2.0}),
    (Unavailable, 503, {"code": "unavailable", "retry_after": 5.0}),
    (Cancelled, 409, {"code": "cancelled", "should_retry": False}),
    (RequestIdInUse, 409, {"code": "request_id_in_use", "should_retry": False}),
    (DeadlineExceeded, 504, {"code": "timeout", "should_retry": False}),
    (AccessDenied, 502, {"code": "upstream_denied", "should_retry": False}),
    (ConnectionFailed, 502, {"code": "upstream_connection_failed"}),
    (FluxserveError, 500, {"code": "upstream_error"}),
)

# A refusal before the first step, and a connection that was never established. Other messages may concern a picture
# that was drawn, as when shared memory has no room for the answer, or a connection that broke under a request.
_REFUSED = re.compile(
    r"server: it is shutting down|images: .*no more may"  # ours
    r"|server is stopping|has stopped accepting|unknown model|is not ready",  # Triton's
    re.IGNORECASE,
)
_NEVER_CONNECTED = re.compile(r"failed to connect|errors? resolving|resolution failed|cannot connect to host", re.I)

_FIELD = re.compile(r"(?P<name>[a-z_]+(?:, [a-z_]+)*): ")


def from_client(error: FluxserveError, renamed: Mapping[str, str]) -> GatewayError:
    """Translate an error of `fluxserve_client` into the one that the caller sees.

    Args:
        error: what the client raised. Of connections and credentials the caller learns no detail: the message would
            hold the addresses of servers.
        renamed: the server's name of a field to the caller's, e.g. {"num_images": "n"}.
    """
    if isinstance(error, InvalidRequest):
        return _invalid(error, renamed)
    status, details = next((status, details) for kind, status, details in _FROM_CLIENT if isinstance(error, kind))
    if surely_not_begun(error):
        details = {**details, "should_retry": True}
    private = isinstance(error, ConnectionFailed | AccessDenied)
    return Upstream(status, "the model's server could not be reached" if private else error.message, **details)


def _invalid(error: InvalidRequest, renamed: Mapping[str, str]) -> GatewayError:
    """Name the field as the caller wrote it; the server's own name stays in the message where the two differ."""
    field = _FIELD.match(error.message)
    if field is None:
        return InvalidField(error.message)
    own = field["name"]
    param = renamed.get(own, own)
    rest = error.message[field.end() :]
    return InvalidField(f"{param}: {rest}" if param == own else f"{param} ({own}): {rest}", param=param)


def surely_not_begun(error: FluxserveError) -> bool:
    """Tell whether the server cannot have begun: it refused the request, or no connection was established."""
    if isinstance(error, ConnectionFailed):
        return bool(_NEVER_CONNECTED.search(error.message))
    return isinstance(error, QueueFull) or (isinstance(error, Unavailable) and bool(_REFUSED.search(error.message)))
