"""The client for programs without asyncio: the same one, run on an event loop of its own in a thread."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable, Coroutine, Mapping
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from fluxserve_client.aio import AsyncClient
from fluxserve_client.transports import Transport
from fluxserve_client.transports.endpoint import Tls

P = ParamSpec("P")
T = TypeVar("T")


def _blocking(
    method: Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Client, P], T]:
    """The blocking form of a method of `AsyncClient`, with its signature and documentation."""

    @functools.wraps(method)
    def call(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._run(method(self._client, *args, **kwargs))

    return call


class Client:
    """A client of one fluxserve server, blocking.

    ```python
    with Client("http://localhost:8000") as client:
        client.generate("a red fox in the snow", seed=7).save("fox.png")
    ```

    It works inside a running event loop too (Jupyter), and several threads may share it. Ctrl-C stops the request
    on the server before `KeyboardInterrupt` leaves the call; a second Ctrl-C does not wait for that. A progress
    callback runs in the client's thread. Arguments and errors are those of `AsyncClient`.
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
        transport: Transport | None = None,
    ) -> None:
        self._client = AsyncClient(
            url,
            protocol=protocol,
            tls=tls,
            headers=headers,
            poll_interval=poll_interval,
            cancel_timeout=cancel_timeout,
            transport=transport,
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fluxserve-client", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections and end the thread; calls after this raise `RuntimeError`."""
        if self._loop.is_closed():
            return
        self._run(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        if self._loop.is_closed():
            coroutine.close()
            raise RuntimeError("this client is closed")
        if threading.current_thread() is self._thread:  # would wait for itself, for ever
            coroutine.close()
            raise RuntimeError("called from a progress callback; to stop the request, raise an exception there")
        started: list[asyncio.Task[T]] = []
        ended = threading.Event()

        def start() -> None:
            started.append(self._loop.create_task(coroutine))
            started[0].add_done_callback(lambda _: ended.set())

        self._loop.call_soon_threadsafe(start)
        try:
            ended.wait()
        except BaseException as interrupt:  # Ctrl-C: the request must stop before we leave
            self._loop.call_soon_threadsafe(lambda: started[0].cancel())  # in order, so `start` ran before
            ended.wait()
            _keep_notes(started[0], interrupt)
            raise
        return started[0].result()


def _keep_notes(task: asyncio.Task[Any], interrupt: BaseException) -> None:
    """Carry what could not be done from the cancelled call to the exception that its caller sees."""
    try:
        error: BaseException | None = task.exception()
    except asyncio.CancelledError as cancelled:
        error = cancelled
    for note in getattr(error, "__notes__", ()):
        interrupt.add_note(note)
