"""A transport without a wire, for tests of the client and of programs that use it."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Collection

from fluxserve_client.contract import CONTROL, FLUX, Tensors

Handler = Callable[[str, Tensors, str], Tensors | Awaitable[Tensors]]


class MockTransport:
    """Answers every call with `handler(model, inputs, request_id)`, a function or a coroutine function.

    The handler sees the tensors exactly as a server would, and raises `FluxserveError`s as a real transport does.
    Use it as `AsyncClient(transport=MockTransport(handler))`.

    Attributes:
        ready_models: the models that `ready` says yes for.
        closed: whether the client closed it.
    """

    def __init__(self, handler: Handler, *, ready_models: Collection[str] = (FLUX, CONTROL)) -> None:
        self._handler = handler
        self.ready_models = ready_models
        self.closed = False

    async def infer(self, model: str, inputs: Tensors, request_id: str) -> Tensors:
        answer = self._handler(model, inputs, request_id)
        return await answer if inspect.isawaitable(answer) else answer

    async def ready(self, model: str) -> bool:
        return model in self.ready_models

    async def close(self) -> None:
        self.closed = True
