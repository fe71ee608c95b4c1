"""Trying again, for whoever opts in: a server that starts again, drains or is full takes the request a little later."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from fluxserve_client.contract import Tensors
from fluxserve_client.errors import ConnectionFailed, FluxserveError, RequestIdInUse, Unavailable
from fluxserve_client.transports import NO_HEADERS, Transport

log = logging.getLogger("fluxserve_client")


@dataclass(frozen=True)
class Retry:
    """How often, and after how long, a call is sent again.

    Tried again are `Unavailable` (also `QueueFull`) and `ConnectionFailed`, with the same request id. A server that
    still draws the request whose connection broke answers `RequestIdInUse`; that is tried again too, so that no
    request runs twice at a time. With a seed of -1 the second picture is another one.

    Args:
        attempts: calls in all, 1 or more.
        first: seconds before the second attempt, at most; doubled for each further one. The wait itself is random,
            between half of that and all of it, so that many clients don't come back together.
        most: seconds that no wait exceeds.
    """

    attempts: int = 9
    first: float = 0.5
    most: float = 8.0
    sleep: Callable[[float], Awaitable[None]] = field(default=asyncio.sleep, repr=False)

    def __post_init__(self) -> None:
        for name, least in (("attempts", 1), ("first", 0), ("most", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {least} or more")

    def wait(self, attempt: int) -> float:
        """Seconds after a failed attempt, counted from 1."""
        longest: float = min(self.most, self.first * 2.0 ** (attempt - 1))
        return longest * random.uniform(0.5, 1.0)  # noqa: S311 (jitter, no secret)


class RetryingTransport:
    """A transport that sends again what another could not deliver."""

    def __init__(self, transport: Transport, retry: Retry) -> None:
        self._transport, self._retry = transport, retry

    async def infer(
        self, model: str, inputs: Tensors, request_id: str, headers: Mapping[str, str] = NO_HEADERS
    ) -> Tensors:
        broken = False
        for attempt in range(1, self._retry.attempts):
            try:
                return await self._transport.infer(model, inputs, request_id, headers)
            except (Unavailable, ConnectionFailed, RequestIdInUse) as error:
                if isinstance(error, RequestIdInUse) and not broken:
                    raise  # somebody else's
                broken = broken or isinstance(error, ConnectionFailed)
                await self._pause(attempt, model, error)
        return await self._transport.infer(model, inputs, request_id, headers)

    async def _pause(self, attempt: int, model: str, error: FluxserveError) -> None:
        seconds = self._retry.wait(attempt)
        log.info("%s: attempt %d of %d in %.1f s: %s", model, attempt + 1, self._retry.attempts, seconds, error)
        await self._retry.sleep(seconds)

    async def ready(self, model: str) -> bool:
        return await self._transport.ready(model)

    async def close(self) -> None:
        await self._transport.close()
