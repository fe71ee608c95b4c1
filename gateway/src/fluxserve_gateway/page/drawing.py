"""One drawing of the page: from a form's values to events, until it ends, is stopped, or its tab is closed."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fluxserve_gateway import fields
from fluxserve_gateway.border import Record, error_of, log_request
from fluxserve_gateway.images import Event, Images
from fluxserve_gateway.keys import Key

_GRACE_S = 1.0
"""Between the end of a tab's stream and the end of its drawings: the next stream may be on its way."""


@dataclass(frozen=True)
class Caller:
    """Who draws.

    Attributes:
        tab: the session of one open page.
        key: what the page was opened with.
        address: for the log.
    """

    tab: str
    key: Key
    address: str


def body_of(given: Mapping[str, Any], edit: bool) -> fields.Generation:
    """Check a form's values as the API checks a body; the error names the field."""
    return fields.parse(fields.Edit if edit else fields.Generation, given, text=False)


class Drawings:
    """The drawings of all tabs."""

    def __init__(self, images: Images, ended: Callable[[Record, float], None]) -> None:
        """`ended` is called with each drawing's record, and the seconds it took."""
        self._images = images
        self._ended = ended
        self._running: defaultdict[str, set[asyncio.Task[None]]] = defaultdict(set)
        self._streams: defaultdict[str, int] = defaultdict(int)

    async def draw(
        self, caller: Caller, body: fields.Generation, files: Sequence[bytes]
    ) -> AsyncGenerator[Event, None]:
        """Yield progress, and the result last; nothing more once `stop` was called for the tab.

        Raises:
            GatewayError: as the API answers.
        """
        events: asyncio.Queue[Event | None] = asyncio.Queue()
        task = asyncio.create_task(self._run(caller, body, files, events.put_nowait))
        running = self._running[caller.tab]
        running.add(task)
        task.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (event := await events.get()) is not None:
                yield event
            if not task.cancelled():
                task.result()
        finally:
            task.cancel()
            await asyncio.wait({task})
            running.discard(task)
            if not running:
                self._running.pop(caller.tab, None)

    def stop(self, tab: str) -> None:
        """Stop what a tab draws; the server stops within two steps."""
        for task in self._running.get(tab, ()):
            task.cancel()

    @asynccontextmanager
    async def watched(self, tab: str) -> AsyncIterator[None]:
        """Mark a tab as open within the block; a tab that is closed stops what it draws."""
        self._streams[tab] += 1
        try:
            yield
        finally:
            asyncio.get_running_loop().call_later(_GRACE_S, self._closed, tab)

    def _closed(self, tab: str) -> None:
        self._streams[tab] -= 1
        if not self._streams[tab]:
            del self._streams[tab]
            self.stop(tab)

    async def _run(
        self, caller: Caller, body: fields.Generation, files: Sequence[bytes], put: Callable[[Event], None]
    ) -> None:
        record, begun = Record(), time.monotonic()
        record.fields["key"] = caller.key.id
        record.outcome = "abandoned"
        try:
            with record.ends:
                async with aclosing(self._images.follow(record, caller.key, body, files)) as events:
                    async for event in events:
                        put(event)
            record.outcome = "ok"
        except Exception as error:
            answer = error_of(error, record.request_id)
            record.outcome = answer.code or "error"
            raise answer from error
        finally:
            seconds = time.monotonic() - begun
            self._ended(record, seconds)
            log_request(record, "PAGE", "/", 0, seconds, caller.address)
