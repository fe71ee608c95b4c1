"""A status and a message of Triton become one error of the client's tree."""

from __future__ import annotations

import pytest
from fluxserve_client import errors
from fluxserve_client.errors import FluxserveError, from_status

from fluxserve import errors as server

# as fluxserve.serving.errors writes them: over HTTP nothing but the code in front tells these two from a bad input
ID_IN_USE = f"[ALREADY_EXISTS] {server.RequestIdInUse('a', 'queued')}"
WAS_CANCELLED = f"[CANCELLED] {server.Cancelled('a', 3, 20)}"


@pytest.mark.parametrize(
    ("status", "message", "kind", "name"),
    [
        ("StatusCode.INVALID_ARGUMENT", "height: got 17", errors.InvalidRequest, "INVALID_ARGUMENT"),
        ("400", "height: got 17", errors.InvalidRequest, "INVALID_ARGUMENT"),
        ("StatusCode.ALREADY_EXISTS", ID_IN_USE, errors.RequestIdInUse, "ALREADY_EXISTS"),
        ("409", "whatever", errors.RequestIdInUse, "ALREADY_EXISTS"),
        ("400", ID_IN_USE, errors.RequestIdInUse, "ALREADY_EXISTS"),
        ("StatusCode.CANCELLED", WAS_CANCELLED, errors.Cancelled, "CANCELLED"),
        ("499", "whatever", errors.Cancelled, "CANCELLED"),
        ("400", WAS_CANCELLED, errors.Cancelled, "CANCELLED"),
        # words that a caller may have put there do not decide
        ("400", "output_format: got '[CANCELLED] request'", errors.InvalidRequest, "INVALID_ARGUMENT"),
        ("500", WAS_CANCELLED, errors.ServerError, "INTERNAL"),
        ("StatusCode.UNAVAILABLE", "Exceeds maximum queue size", errors.QueueFull, "UNAVAILABLE"),
        ("503", "Exceeds maximum queue size", errors.QueueFull, "UNAVAILABLE"),
        ("503", "Request timeout expired", errors.Unavailable, "UNAVAILABLE"),
        ("StatusCode.UNAVAILABLE", "Socket closed", errors.ConnectionFailed, "UNAVAILABLE"),
        ("StatusCode.UNAVAILABLE", "Server is stopping", errors.Unavailable, "UNAVAILABLE"),
        ("StatusCode.UNAVAILABLE", "in ensemble 'flux', socket closed", errors.Unavailable, "UNAVAILABLE"),
        ("StatusCode.DEADLINE_EXCEEDED", "late", errors.DeadlineExceeded, "DEADLINE_EXCEEDED"),
        ("504", "late", errors.DeadlineExceeded, "DEADLINE_EXCEEDED"),
        ("StatusCode.UNAUTHENTICATED", "who?", errors.AccessDenied, "UNAUTHENTICATED"),
        ("403", "no", errors.AccessDenied, "PERMISSION_DENIED"),
        ("StatusCode.INTERNAL", "CUDA error", errors.ServerError, "INTERNAL"),
        ("502", "bad gateway", errors.ServerError, "HTTP 502"),
        (None, "no status", errors.ServerError, None),
    ],
)
def test_kind(status: str | None, message: str, kind: type[FluxserveError], name: str | None) -> None:
    error = from_status(status, message, "a")
    assert type(error) is kind
    assert (error.status, error.request_id) == (name, "a")


@pytest.mark.parametrize(
    ("message", "ensemble"),
    [
        ("height: got 17", None),
        ("in ensemble 'flux', height: got 17", "flux"),
        ("in ensemble 'flux', [request id: a] height: got 17", "flux"),
        ("[request id: a] height: got 17", None),
    ],
)
def test_tritons_prefixes_come_off(message: str, ensemble: str | None) -> None:
    error = from_status("400", message)
    assert str(error) == error.message == "height: got 17"
    assert error.ensemble == ensemble


def test_the_usual_python_names_catch_them_too() -> None:
    assert issubclass(errors.DeadlineExceeded, TimeoutError)
    assert issubclass(errors.ConnectionFailed, ConnectionError)
    assert issubclass(errors.QueueFull, errors.Unavailable)
