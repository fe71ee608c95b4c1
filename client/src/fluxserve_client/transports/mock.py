"""A transport without a wire, for tests of the client and of programs that use it."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Collection, Mapping

from fluxserve_client.contract import CONTROL, FLUX, Tensors
from fluxserve_client.transports import NO_HEADERS

Handler = Callable[[str, Tensors, str], Tensors | Awaitable[Tensors]]


class MockTransport:
    """Answers every call with `handler(model, inputs, request_id)`, a function or a coroutine function.

    The handler sees the tensors exactly as a server would, and raises `FluxserveError`s as a real transport does.
    Use it as `AsyncClient(transport=MockTransport(handler))`.

    Attributes:
        ready_models: the models that `ready` says yes for.
        headers: of the newest call, as `generate(headers=…)` was given them.
        closed: whether the client closed it.
    """

    def __init__(self, handler: Handler, *, ready_models: Collection[str] = (FLUX, CONTROL)) -> None:
        self._handler = handler
        self.ready_models = ready_models
        self.headers = NO_HEADERS
        self.closed = False

    async def infer(
        self, model: str, inputs: Tensors, request_id: str, headers: Mapping[str, str] = NO_HEADERS
    ) -> Tensors:
        self.headers = headers
        answer = self._handler(model, inputs, request_id)
        return await answer if inspect.isawaitable(answer) else answer

    async def ready(self, model: str) -> bool:
        return model in self.ready_models

    async def close(self) -> None:
        self.closed = True
