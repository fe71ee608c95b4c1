"""Previews that callers ask `control` for: the loop takes them, a thread writes their files.

Nothing is computed, allocated or written for a request that nobody asks about: each step then reads two words of the
in-flight table. A glimpse is one matrix product on the device. A partial image is one pass of the VAE's decoder between
two steps, MOST times a picture. Copy, file and shared memory are the thread's work.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from fluxserve.device import received
from fluxserve.inflight import PREVIEWS, InflightTable
from fluxserve.media.images import write_image
from fluxserve.pipeline import View
from fluxserve.previews import Previews
from fluxserve.serving import errors
from fluxserve.serving.envelope import Delivery

MOST = 3
"""Partial images of a picture."""

_GLIMPSE, _PARTIAL = PREVIEWS


@dataclass
class _Taken:
    """The previews of one kind that a request has had."""

    step: int = 0
    count: int = 0
    writing: "Future[None] | None" = None


class Previewer:
    """Takes and keeps previews of the requests that one process runs."""

    def __init__(self, inflight: Path) -> None:
        self._table = InflightTable(inflight)  # the thread's: a view's lock does not part its threads
        self._previews = Previews(self._table)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="preview")
        self._taken: dict[int, dict[str, _Taken]] = {}

    def look(self, delivery: Delivery, images: int, view: View) -> None:
        """Take what somebody wants to see of a request, after each of its steps but the last.

        Args:
            images: pictures of the request.
        """
        wanted = self._table.wanted(delivery.ticket)
        if not wanted.any():
            return
        now = self._table.progress(delivery.ticket)
        if now.step >= now.steps:
            return
        kinds = self._taken.setdefault(delivery.ticket, {_GLIMPSE: _Taken(), _PARTIAL: _Taken()})
        for kind, first in zip(PREVIEWS, wanted, strict=True):
            taken = kinds[kind]
            busy = taken.writing is not None and not taken.writing.done()
            spent = kind == _PARTIAL and taken.count >= MOST * images
            if taken.step < first <= now.step and not busy and not spent:
                taken.step, taken.count = now.step, taken.count + 1
                taken.writing = self._begin(kind, delivery, now.step, view)

    def _begin(self, kind: str, delivery: Delivery, step: int, view: View) -> "Future[None]":
        pixels = received(view.glimpse() if kind == _GLIMPSE else view.partial())
        writing = self._writer.submit(self._write, kind, delivery, step, pixels)
        writing.add_done_callback(errors.report)
        return writing

    def _write(self, kind: str, delivery: Delivery, step: int, pixels: Callable[[], torch.Tensor]) -> None:
        """Write a glimpse as PNG, a partial image in the request's own format; raw pixels have none, and become PNG."""
        array = pixels().numpy()
        output_format = "png" if kind == _GLIMPSE or delivery.output_format == "raw" else delivery.output_format
        file = write_image(array, output_format, delivery.quality)
        self._previews.put(delivery.ticket, kind, step, file, array.shape[0] * array.shape[1])

    def end(self, ticket: int) -> None:
        """Forget a request whose slot was given back, and remove its previews."""
        if self._taken.pop(ticket, None) is not None:
            self._previews.drop(ticket)

    def close(self) -> None:
        self._writer.shutdown()
