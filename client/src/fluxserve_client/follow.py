"""Follow a request through `control`: its progress, and previews of its picture."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from fluxserve_client.contract import (
    CONTROL,
    Tensors,
    control_tensors,
    parse_preview,
    parse_progress,
    preview_tensors,
)
from fluxserve_client.errors import FluxserveError
from fluxserve_client.result import Preview, Progress, State
from fluxserve_client.transports import Transport

log = logging.getLogger("fluxserve_client")

ProgressCallback = Callable[[Progress], Awaitable[None] | None]
PreviewCallback = Callable[[Preview], Awaitable[None] | None]

MAX_PARTIAL_IMAGES = 3
_FIRST_LOOK_S = 0.01  # then twice as long each time, up to the poll interval: the first steps may be quick


@dataclass(frozen=True)
class Callbacks:
    """What a caller wants to hear of a request.

    Attributes:
        partial_images: how many full-size previews; 0 for glimpses, as many as are seen.
    """

    progress: ProgressCallback | None = None
    preview: PreviewCallback | None = None
    partial_images: int = 0

    def __post_init__(self) -> None:
        count = self.partial_images
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"partial_images: got {type(count).__name__}, expected int")
        if not 0 <= count <= MAX_PARTIAL_IMAGES:
            raise ValueError(f"partial_images: got {count}, expected 0 to {MAX_PARTIAL_IMAGES}")
        if count and self.preview is None:
            raise ValueError(f"partial_images: got {count} without on_preview, which is called with them")

    @property
    def wanted(self) -> bool:
        """Whether there is anything to follow."""
        return self.progress is not None or self.preview is not None


class Follower:
    """Follows one request until its task is cancelled."""

    def __init__(self, transport: Transport, request_id: str, callbacks: Callbacks, poll_interval: float) -> None:
        self._transport, self._id, self._callbacks, self._interval = transport, request_id, callbacks, poll_interval
        self._seen: Progress | None = None
        self._previews, self._shown = 0, 0  # how many, and the step of the last

    async def run(self) -> BaseException | None:
        """Report every change; return what a callback raised, because SystemExit would end the event loop here."""
        wait = min(_FIRST_LOOK_S, self._interval)
        while True:
            await asyncio.sleep(wait)
            wait = min(2 * wait, self._interval)
            try:
                now, preview = await self._look()
            except FluxserveError as error:
                log.warning("the progress of request %s is not followed any more: %s", self._id, error)
                return None
            if raised := await self._report(now, preview):
                return raised

    async def _look(self) -> tuple[Progress, Preview | None]:
        after = self._after()
        if after is None:
            return parse_progress(await self._infer(control_tensors(self._id, "status"))), None
        kind = "partial" if self._callbacks.partial_images else "glimpse"
        outputs = await self._infer(preview_tensors(self._id, kind, after))
        return parse_progress(outputs), parse_preview(outputs, self._previews)

    async def _infer(self, inputs: Tensors) -> Tensors:
        return await self._transport.infer(CONTROL, inputs, "")

    def _after(self) -> int | None:
        """Return the step that the next preview must be later than; None while none is wanted.

        Partial images are spread evenly over the steps: the k-th of n shows step k · steps / (n + 1) or a later one.
        """
        count, now = self._callbacks.partial_images, self._seen
        if self._callbacks.preview is None or (count and self._previews >= count):
            return None
        if not count:
            return self._shown
        if now is None or not now.steps:  # their number is known once the request runs
            return None
        due = -(-now.steps * (self._previews + 1) // (count + 1))
        return max(due - 1, self._shown)

    async def _report(self, now: Progress, preview: Preview | None) -> BaseException | None:
        changed = now != self._seen and now.state is not State.UNKNOWN
        if changed:
            self._seen = now
        try:
            if changed and self._callbacks.progress is not None:
                await _told(self._callbacks.progress(now))
            if preview is not None and self._callbacks.preview is not None:
                self._previews, self._shown = self._previews + 1, preview.step
                await _told(self._callbacks.preview(preview))
        except GeneratorExit:  # means, in the caller's coroutine, that nothing can be awaited any more
            return RuntimeError("a callback raised GeneratorExit")
        except BaseException as error:  # noqa: BLE001 (raised again where the caller waits)
            return error
        return None


async def _told(reporting: Awaitable[None] | None) -> None:
    if inspect.isawaitable(reporting):
        await reporting
