"""The wire, behind one small protocol: gRPC, HTTP, and a fake for tests."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol

import numpy as np

from fluxserve_client.contract import Tensors
from fluxserve_client.transports.endpoint import Endpoint

_HEADER_NAME = re.compile(r"[A-Za-z0-9._-]+")  # what both HTTP and gRPC take
_HEADER_VALUE = re.compile(r"[ -~]*")

NO_HEADERS: Mapping[str, str] = MappingProxyType({})

_LARGE = 31 << 20
"""glibc's malloc learns from freed blocks of up to 32 MiB what sizes come and go."""


class Transport(Protocol):
    """Carries tensors to a model and back. All methods are called on one event loop.

    Every failure is raised as a `FluxserveError`: this is the border where foreign errors are translated. A
    cancelled task hangs up; telling the server to stop working is the client's business, not the transport's.
    """

    async def infer(
        self, model: str, inputs: Tensors, request_id: str, headers: Mapping[str, str] = NO_HEADERS
    ) -> Tensors:
        """Run `model` once; an empty `request_id` sends none. `headers` go before those of every call."""

    async def ready(self, model: str) -> bool:
        """Whether the server and `model` are ready; raises `ConnectionFailed` if nothing answers."""

    async def close(self) -> None:
        """Close the connections."""


def opener(endpoint: Endpoint, headers: Mapping[str, str], keepalive: float | None = None) -> Callable[[], Transport]:
    """Import what a transport to `endpoint` needs; return a function that makes one, which connects at its first call.

    `headers` travel with every call; `keepalive` is of gRPC, in seconds.

    Raises:
        ValueError, OSError: options that contradict each other, or headers or certificates that cannot be used.
    """
    if keepalive is not None and (endpoint.protocol != "grpc" or not 0 < keepalive < 86_400):
        raise ValueError(f"keepalive: got {keepalive} over {endpoint.protocol}, expected seconds, over gRPC only")
    checked_headers(headers)
    if endpoint.tls is not None:
        endpoint.tls.context()
    _keep_freed_memory()
    # imported here: each pulls in a heavy stack, and one of the two is never needed
    if endpoint.protocol == "grpc":
        from fluxserve_client.transports.grpc import GrpcTransport

        return lambda: GrpcTransport(endpoint, headers, keepalive)
    from fluxserve_client.transports.http import HttpTransport

    return lambda: HttpTransport(endpoint, headers)


def checked_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the headers with names in lower case. Raise `ValueError` for one that HTTP or gRPC cannot carry."""
    for name, value in headers.items():
        if not (_HEADER_NAME.fullmatch(name) and _HEADER_VALUE.fullmatch(value)):
            # without the value, which may be a secret
            raise ValueError(f"headers: got {name!r}, expected a name of A-Z a-z 0-9 . _ - with a value in ASCII")
    return {name.lower(): value for name, value in headers.items()}


def _keep_freed_memory() -> None:
    """Have malloc keep the memory of an answer for the next one.

    A picture of 3 MB passes through some six buffers on its way here. Left alone, glibc gives most of that back to the
    kernel after each answer and faults it in again for the next: thousands of page faults.
    A large block that is freed raises both of its bounds for doing so, up to 62 MiB; it is never written to, so it
    costs nothing. Where malloc's bounds were set by hand (MALLOC_…), or with another malloc, nothing changes.
    """
    np.empty(_LARGE, np.uint8)
