"""Previews that callers ask `control` for: the loop takes them, a thread writes their files.

Nothing is computed, allocated or written for a request that nobody asks about: each step then reads two words of the
in-flight table. A glimpse is one matrix product on the device. A partial image is one pass of the VAE's decoder between
two steps, MOST times a picture. Copy, file and shared memory are the thread's work.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fluxserve.device import received
from fluxserve.inflight import PREVIEWS, InflightTable
from fluxserve.job import Job
from fluxserve.pipeline import View
from fluxserve.previews import Previews
from fluxserve.serving import errors
from fluxserve.serving.envelope import Delivery
from fluxserve.serving.files import Files

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

    def __init__(self, inflight: Path, files: Files) -> None:
        self._files = files
        self._table = InflightTable(inflight)  # the thread's: a view's lock does not part its threads
        self._previews = Previews(self._table)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="preview")
        self._taken: dict[int, dict[str, _Taken]] = {}

    def look(self, job: Job, delivery: Delivery, view: View) -> None:
        """Take what somebody wants to see of a request, after each of its steps but the last."""
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
            spent = kind == _PARTIAL and taken.count >= MOST * len(job.seeds)
            if taken.step < first <= now.step and not busy and not spent:
                taken.step, taken.count = now.step, taken.count + 1
                taken.writing = self._begin(kind, job, delivery, now.step, view)

    def _begin(self, kind: str, job: Job, delivery: Delivery, step: int, view: View) -> "Future[None]":
        """Have a glimpse written as PNG, a partial image in the request's own format, with PNG in the place of raw."""
        pixels = received(view.glimpse() if kind == _GLIMPSE else view.partial())
        output_format = "png" if kind == _GLIMPSE or delivery.output_format == "raw" else delivery.output_format
        seed, done = view.seed, view.done  # the loop goes on meanwhile

        def write() -> None:
            array = pixels().numpy()
            file = self._files.preview(array, job, seed, done, output_format, delivery.quality)
            self._previews.put(delivery.ticket, kind, step, file, array.shape[0] * array.shape[1])

        writing = self._writer.submit(write)
        writing.add_done_callback(errors.report)
        return writing

    def end(self, ticket: int) -> None:
        """Forget a request whose slot was given back, and remove its previews."""
        if self._taken.pop(ticket, None) is not None:
            self._previews.drop(ticket)

    def close(self) -> None:
        self._writer.shutdown()
