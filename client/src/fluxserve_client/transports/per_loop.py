"""Connections for as many event loops as use a client, each closed with the loop that it belongs to."""

from __future__ import annotations

import asyncio
from asyncio import AbstractEventLoop
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping

from fluxserve_client.contract import Tensors
from fluxserve_client.forks import begin_anew_in_children
from fluxserve_client.transports import NO_HEADERS, Transport


class PerLoop:
    """A `Transport` that opens another one in every event loop, at the first call there.

    Each is held by an asynchronous generator. Event loops close those before they end, `asyncio.run` does so always,
    and the garbage collector has them closed too: a client that nobody closed leaves no open connection.
    """

    def __init__(self, open_one: Callable[[], Transport]) -> None:
        self._open_one = open_one
        self._opened: dict[AbstractEventLoop, tuple[Transport, AsyncGenerator[None, None]]] = {}
        begin_anew_in_children(self)

    async def infer(
        self, model: str, inputs: Tensors, request_id: str, headers: Mapping[str, str] = NO_HEADERS
    ) -> Tensors:
        return await (await self._here()).infer(model, inputs, request_id, headers)

    async def ready(self, model: str) -> bool:
        return await (await self._here()).ready(model)

    async def close(self) -> None:
        here, opened = asyncio.get_running_loop(), self._opened
        self._opened = {}
        for loop, (_, lifetime) in opened.items():
            if loop is here:
                await lifetime.aclose()
            elif not loop.is_closed():
                loop.call_soon_threadsafe(loop.create_task, lifetime.aclose())

    def after_fork(self) -> Iterable[object]:
        opened, self._opened = self._opened, {}
        return [*opened, *opened.values()]

    async def _here(self) -> Transport:
        loop = asyncio.get_running_loop()
        if loop not in self._opened:
            for ended in [other for other in self._opened if other.is_closed()]:
                del self._opened[ended]
            transport = self._open_one()
            lifetime = _lifetime(transport)
            self._opened[loop] = transport, lifetime
            await anext(lifetime)  # from here on the event loop knows the generator
        return self._opened[loop][0]


async def _lifetime(transport: Transport) -> AsyncGenerator[None, None]:
    try:
        yield
    finally:
        await transport.close()
