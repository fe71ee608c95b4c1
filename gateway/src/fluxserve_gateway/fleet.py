"""Choose a server for each request: by its model, its readiness and its requests in flight."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from fluxserve_client import AsyncClient, ConnectionFailed, FluxserveError, Result, Unavailable

from fluxserve_gateway.errors import InvalidField, ModelNotFound, Overloaded, surely_not_begun
from fluxserve_gateway.spans import NoTracer, Span, Tracer

log = logging.getLogger("fluxserve_gateway")

_PROBE_TIMEOUT_S = 2.0
_MISSES = 3  # probes in a row without an answer, after which a server is not ready
_FORGET_TIMEOUT_S = 1.0


class Server:
    """Represents one fluxserve server.

    Attributes:
        url: its address, for logs and metrics.
        client: the way to it.
        in_flight: requests that this gateway has there now.
        ready: whether it takes requests, by the last probes or the last failure.
        turn: the number of its last request, of all that the fleet has sent.
    """

    def __init__(self, url: str, client: AsyncClient) -> None:
        self.url = url
        self.client = client
        self.in_flight = 0
        self.ready = False
        self.turn = 0
        self._misses = 0

    async def probe(self) -> None:
        """Ask whether it is ready. Only a clear answer counts at once: a late one may be a moment's load."""
        try:
            ready = await self.client.ready(timeout=_PROBE_TIMEOUT_S)
        except Exception as error:  # noqa: BLE001 (whatever it is, the next probe must come)
            self._misses += 1
            refused = isinstance(error, ConnectionFailed) and surely_not_begun(error)
            if self.ready and not refused and self._misses < _MISSES:
                return
            if self.ready:
                log.warning("server %s is not ready: %s", self.url, error)
            self.ready = False
            return
        self._misses = 0
        if ready != self.ready:
            log.info("server %s is %s", self.url, "ready" if ready else "not ready")
        self.ready = ready

    async def forget(self, request_id: str) -> None:
        """Stop a request whose connection broke, if the server still has it; it may be gone as well."""
        with suppress(FluxserveError):
            await self.client.cancel(request_id, timeout=_FORGET_TIMEOUT_S)


class Fleet:
    """Sends each request to the ready server of its model that has the fewest in flight."""

    def __init__(self, models: Mapping[str, Sequence[Server]], tracer: Tracer | None = None) -> None:
        """Serve `models`: each name that callers may use, and its servers. A server may have several names.

        `tracer` makes the spans of the gateway; None makes none.
        """
        if not models:
            raise ValueError("server: got none; expected one or more of MODEL=URL")
        self.models = {name: tuple(servers) for name, servers in models.items()}
        self.servers: tuple[Server, ...] = tuple({id(s): s for each in self.models.values() for s in each}.values())
        self.tracer: Tracer = tracer or NoTracer()
        self._turn = 0

    @property
    def ready(self) -> bool:
        """Tell whether any model can be drawn."""
        return any(server.ready for server in self.servers)

    async def probe(self) -> None:
        """Ask all servers at once whether they are ready."""
        await asyncio.gather(*(server.probe() for server in self.servers))

    async def watch(self, interval: float) -> None:
        """Probe every `interval` seconds, until cancelled."""
        while True:
            await asyncio.sleep(interval)
            await self.probe()

    async def close(self) -> None:
        """End the calls that run, stop their requests, and close the connections."""
        await asyncio.gather(*(server.client.close() for server in self.servers))

    def named(self, model: str | None) -> str:
        """Return the model to draw with: `model`, or the only one.

        Raises:
            InvalidField: none was named, and several are served.
            ModelNotFound: a name that is not served.
        """
        known = ", ".join(self.models)
        if model is None:
            if len(self.models) > 1:
                raise InvalidField(f"model: got nothing; allowed: {known}", param="model")
            return next(iter(self.models))
        if model not in self.models:
            raise ModelNotFound(f"model: got {model[:60]!r}; allowed: {known}", param="model")
        return model

    async def draw(
        self,
        model: str,
        arguments: Mapping[str, Any],
        *,
        request_id: str,
        timeout: float,
        span: Span = None,
        **callbacks: Any,
    ) -> Result:
        """Draw on one server; on another one only if the first has surely not begun.

        Args:
            model: a name that `named` returned.
            arguments: of `AsyncClient.generate`.
            request_id: the request's id on the server.
            timeout: seconds for all attempts together.
            span: of the request, the parent of the calls' spans.
            callbacks: `progress`, `on_preview` and `partial_images` of `AsyncClient.generate`.

        Raises:
            Overloaded: no server of the model is ready.
            FluxserveError: what the last server that was tried answered.
        """
        deadline = asyncio.get_running_loop().time() + timeout
        tried: set[Server] = set()
        failure: FluxserveError | None = None
        while (server := self._next(self.models[model], tried)) is not None:
            tried.add(server)
            left = max(deadline - asyncio.get_running_loop().time(), 0.0)
            server.in_flight += 1
            try:
                with self.tracer.call(span, server.url, model, request_id) as headers:
                    return await server.client.generate(
                        **arguments, request_id=request_id, headers=headers, timeout=left, **callbacks
                    )
            except (Unavailable, ConnectionFailed) as error:
                if isinstance(error, ConnectionFailed):
                    server.ready = False  # until a probe says otherwise
                    log.warning("server %s: %s", server.url, error.message)
                if not surely_not_begun(error):
                    await server.forget(request_id)
                    raise
                failure = error
            finally:
                server.in_flight -= 1
        if failure is not None:
            raise failure
        raise Overloaded(f"model: no server of {model!r} is ready now; try again later", code="model_not_ready")

    def _next(self, servers: Iterable[Server], tried: set[Server]) -> Server | None:
        """Choose the server with the fewest requests in flight; among equals, that of the oldest turn."""
        fit = [server for server in servers if server.ready and server not in tried]
        if not fit:
            return None
        chosen = min(fit, key=lambda server: (server.in_flight, server.turn))
        self._turn += 1
        chosen.turn = self._turn
        return chosen
