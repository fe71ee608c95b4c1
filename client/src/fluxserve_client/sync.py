"""The client for programs without asyncio: the same one, run on an event loop of its own in a thread."""

from __future__ import annotations

import atexit
import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterable, Mapping
from numbers import Real
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, cast

from fluxserve_client.aio import AsyncClient
from fluxserve_client.errors import DeadlineExceeded
from fluxserve_client.forks import begin_anew_in_children
from fluxserve_client.retry import Retry
from fluxserve_client.transports import Transport
from fluxserve_client.transports.endpoint import Tls
from fluxserve_client.worker import Retired, Unresponsive, Worker

P = ParamSpec("P")
T = TypeVar("T")

_GRACE_S = 1.0
"""How long after `timeout` and `cancel_timeout` a call waits for its event loop before it leaves without it."""


def _blocking(
    method: Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Client, P], T]:
    """The blocking form of a method of `AsyncClient`, with its signature and documentation."""

    @functools.wraps(method)
    def call(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._run(method(self._client, *args, **kwargs), cast(Any, kwargs).get("timeout"))

    return call


class Client:
    """A client of one fluxserve server, blocking.

    ```python
    with Client("http://localhost:8000") as client:
        client.generate("a red fox in the snow", seed=7).save("fox.png")
    ```

    It works inside a running event loop too (Jupyter), and several threads may share it. Ctrl-C stops the request
    on the server before `KeyboardInterrupt` leaves the call; a second Ctrl-C does not wait for that. A progress
    callback runs in the client's thread. A forked process may use its parent's client, over gRPC only if the parent
    had not used gRPC before the fork. Arguments and errors are those of `AsyncClient`.
    """

    generate = _blocking(AsyncClient.generate)
    status = _blocking(AsyncClient.status)
    cancel = _blocking(AsyncClient.cancel)
    ready = _blocking(AsyncClient.ready)

    def __init__(
        self,
        url: str = "localhost",
        *,
        protocol: str | None = None,
        tls: Tls | None = None,
        headers: Mapping[str, str] | None = None,
        poll_interval: float = 0.1,
        cancel_timeout: float = 2.0,
        keepalive: float | None = None,
        retry: Retry | None = None,
        transport: Transport | None = None,
    ) -> None:
        self._client = AsyncClient(
            url,
            protocol=protocol,
            tls=tls,
            headers=headers,
            poll_interval=poll_interval,
            cancel_timeout=cancel_timeout,
            keepalive=keepalive,
            retry=retry,
            transport=transport,
        )
        self._patience = cancel_timeout + _GRACE_S
        self._lock = threading.Lock()
        self._worker: Worker | None = None
        begin_anew_in_children(self)
        _open.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections and end the thread; calls after this raise `RuntimeError`.

        Calls that run in other threads raise it too, once their requests are stopped on the server.
        """
        worker = self._worker_here()
        with contextlib.suppress(Retired):  # another thread closed the client first
            worker.run(self._client.close())
        worker.retire()
        worker.thread.join()

    def after_fork(self) -> Iterable[object]:
        """Begin anew in a child process: the thread stayed in the parent; see `forks`."""
        worker, self._worker, self._lock = self._worker, None, threading.Lock()
        return [] if worker is None else [worker, worker.loop]

    def _worker_here(self) -> Worker:
        """The thread of this process, started at the first call: a fork before that leaves nothing to lose."""
        with self._lock:
            if self._worker is None:
                self._worker = Worker()
                # the thread of a client that nobody closed ends with the client
                weakref.finalize(self, self._worker.retire).atexit = False
            return self._worker

    def _run(self, coroutine: Coroutine[Any, Any, T], timeout: float | None) -> T:
        bounded = isinstance(timeout, Real) and 0 <= timeout < threading.TIMEOUT_MAX - self._patience
        patience = float(timeout) + self._patience if timeout is not None and bounded else None
        try:
            return self._worker_here().run(coroutine, patience)
        except Unresponsive as error:
            message = f"no answer within {timeout:g} s: a progress callback holds the client's thread"
            late = DeadlineExceeded(message, status="DEADLINE_EXCEEDED")
            late.add_note("the request may run on the server until that callback returns")
            raise late from error


def _close_all() -> None:
    """Stop what daemon threads have asked for and cannot wait for any more."""
    for client in list(_open):
        if client._worker is not None:
            client.close()


_open: weakref.WeakSet[Client] = weakref.WeakSet()
atexit.register(_close_all)
