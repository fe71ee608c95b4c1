"""End work whose caller hung up: cancelling it is what stops the request on the server."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from fluxserve_gateway.errors import CallerGone

T = TypeVar("T")


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run `work` to its end, or until the caller hangs up.

    The request's body must have been read: what `receive` says next is that the connection is gone.

    Raises:
        CallerGone: the caller hung up; `work` was cancelled, and has ended.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_hung_up(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise CallerGone
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.wait({task, gone})
        if not task.cancelled():
            task.exception()  # nobody is left to hear it
        del task  # its error's traceback has this frame: a cycle, which would hold an answer until a collection


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
