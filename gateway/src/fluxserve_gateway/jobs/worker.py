"""Draw jobs: claim one under a lease, draw it, keep its pictures, end it; and beat meanwhile, to keep the lease.

What becomes of a drawing:

    drawn                                       completed
    refused, or it took too long                failed
    its caller cancels it                       cancelled, stopped on the server within two steps
    surely not begun (full, not ready)          waits again
    lost with its server or its gateway         waits again, at most `MAX_LOSSES` times, then failed
    this gateway ends                           stopped, and waits again
    this gateway lost its lease                 stopped; it is another gateway's
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from fluxserve_client import Cancelled, ConnectionFailed, FluxserveError, Progress, Result, Unavailable

from fluxserve_gateway import answers, fields
from fluxserve_gateway.answers import Echo
from fluxserve_gateway.errors import Overloaded, from_client, surely_not_begun
from fluxserve_gateway.fleet import Fleet
from fluxserve_gateway.jobs.database import Database
from fluxserve_gateway.jobs.files import Files
from fluxserve_gateway.jobs.metrics import JobMetrics
from fluxserve_gateway.jobs.settings import JobSettings
from fluxserve_gateway.jobs.store import CANCELLED, COMPLETED, FAILED, Job, Store
from fluxserve_gateway.metrics import Metrics

log = logging.getLogger("fluxserve_gateway")

MAX_LOSSES = 3
_RETRY_S = 1.0

_LOST = {
    "code": "lost",
    "message": f"its server or its gateway was lost {MAX_LOSSES} times while it was drawn",
    "param": None,
}


def input_name(job_id: str, number: int) -> str:
    """Name the file of an input image."""
    return f"{job_id}/input-{number}"


@dataclass
class _Running:
    """A job that this gateway draws.

    Attributes:
        drawing: the task; cancelling it stops the request on the server.
        steps: the step, and of how many.
        ends: why `drawing` was cancelled.
    """

    job: Job
    drawing: asyncio.Task[Result] | None = None
    steps: tuple[int, int] = (0, 0)
    ends: Literal["", "cancelled", "released", "lost"] = ""

    def end(self, why: Literal["cancelled", "released", "lost"]) -> None:
        """Stop the drawing."""
        if not self.ends:
            self.ends = why
            if self.drawing is not None:
                self.drawing.cancel()

    def progressed(self, progress: Progress) -> None:
        """Note the step."""
        self.steps = (progress.step, progress.steps)


class Worker:
    """Draws jobs, `at_a_time` at the same time."""

    def __init__(
        self,
        settings: JobSettings,
        database: Database,
        store: Store,
        files: Files,
        fleet: Fleet,
        metrics: tuple[Metrics, JobMetrics],
        timeout: float,
    ) -> None:
        """Make a worker; `timeout` is the seconds for one drawing."""
        self._settings, self._database, self._store, self._files = settings, database, store, files
        self._fleet, self._timeout = fleet, timeout
        self._metrics, self._job_metrics = metrics
        self._name = uuid.uuid4().hex
        self._running: dict[str, _Running] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()  # set when this gateway ends, and draws nothing any more
        self._stopping = False

    def wake(self) -> None:
        """Look for jobs now: one was taken in, or a place is free."""
        self._wake.set()

    def cancel(self, job_id: str) -> None:
        """Stop a job at once if it is drawn here; `beat` tells other gateways."""
        if running := self._running.get(job_id):
            running.end("cancelled")

    async def run(self) -> None:
        """Claim, draw and beat until `stop`, and until nothing is drawn any more."""
        beating = asyncio.create_task(self._beat_always())
        await self._claim_always()
        if self._tasks:
            await asyncio.wait(set(self._tasks))
        self._idle.set()
        await beating

    def stop(self) -> None:
        """Claim nothing more, and give back what is drawn now; then `run` ends."""
        self._stopping = True
        self._wake.set()
        for running in list(self._running.values()):
            running.end("released")

    # ---- claims

    async def _claim_always(self) -> None:
        while not self._stopping:
            self._wake.clear()
            try:
                await self._fill()
            except Exception as error:  # noqa: BLE001 (the next round must come)
                log.warning("jobs: none can be claimed: %s", error)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self._settings.poll)

    async def _fill(self) -> None:
        while len(self._running) < self._settings.at_a_time and not self._stopping:
            models = [name for name, servers in self._fleet.models.items() if any(each.ready for each in servers)]
            held = tuple(self._running)
            job = await self._database.run_own(self._store.claim, self._name, models, held) if models else None
            if job is None:
                return
            running = self._running[job.id] = _Running(job)
            if self._stopping:
                running.end("released")
            task = asyncio.create_task(self._attend(running))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    # ---- leases

    async def _beat_always(self) -> None:
        """Renew the leases. Where that fails for as long as a lease, the jobs are others' to draw: stop them."""
        loop = asyncio.get_running_loop()
        renewed = loop.time()
        while not self._idle.is_set():
            begun = loop.time()
            try:
                async with asyncio.timeout(self._settings.lease):  # a database may say nothing at all
                    await self._beat()
                renewed = begun
            except Exception as error:  # noqa: BLE001 (the next beat must come)
                log.warning("jobs: leases cannot be renewed: %s", str(error) or "no answer in time")
                if loop.time() - renewed >= self._settings.lease:
                    for running in self._running.values():
                        running.end("lost")
            with suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), self._settings.beat)

    async def _beat(self) -> None:
        before = dict(self._running)
        if not before:
            return
        steps = {job_id: running.steps for job_id, running in before.items()}
        held = await self._database.run_own(self._store.beat, self._name, steps)
        for job_id, running in before.items():
            claims, cancelling = held.get(job_id, (0, False))
            if claims != running.job.claims:
                running.end("lost")  # or it ended meanwhile, and nothing is left to end
            elif cancelling:
                running.end("cancelled")

    # ---- drawings

    async def _attend(self, running: _Running) -> None:
        job = running.job
        try:
            if job.claims > 1:  # its last drawing may still run, for a gateway that is gone
                await asyncio.gather(*(each.forget(job.last_draw_id) for each in self._fleet.models[job.model]))
            if running.ends == "lost":
                return
            if job.cancelling or running.ends == "cancelled":
                await self._finish(job, CANCELLED)
            elif job.losses >= MAX_LOSSES:
                await self._finish(job, FAILED, error=_LOST)
            elif running.ends == "released":
                await self._put_back(job, 0.0, lost=False)
            else:
                running.drawing = asyncio.create_task(self._draw(running))
                await asyncio.wait({running.drawing})
                await self._settle(running, running.drawing)
        except Exception:
            log.exception("job %s: its lease will lapse, and it is drawn again", job.id)
        finally:
            del self._running[job.id]
            self.wake()

    async def _draw(self, running: _Running) -> Result:
        job = running.job
        arguments = dict(job.request["arguments"])
        if job.inputs:
            inputs = await asyncio.gather(*(self._files.get(input_name(job.id, n)) for n in range(job.inputs)))
            arguments["image"] = [data for data in inputs if data is not None]
            if len(arguments["image"]) < job.inputs:
                raise OSError("an input image is gone from the files")
        return await self._fleet.draw(
            job.model, arguments, request_id=job.draw_id, timeout=self._timeout, progress=running.progressed
        )

    async def _settle(self, running: _Running, drawing: asyncio.Task[Result]) -> None:
        job = running.job
        if drawing.cancelled():
            if running.ends == "cancelled":
                await self._finish(job, CANCELLED)
            elif running.ends == "released":
                await self._put_back(job, 0.0, lost=False)
            return
        error = drawing.exception()
        if error is None:
            await self._keep(job, drawing.result())
        elif isinstance(error, Overloaded):
            await self._put_back(job, _RETRY_S, lost=False)
        elif isinstance(error, FluxserveError):
            await self._fail(job, error)
        else:
            raise error

    async def _keep(self, job: Job, result: Result) -> None:
        """Write the pictures, then the row: a row never names a file that is not there."""
        echo = Echo(**job.request["echo"])
        names = [f"{job.id}/{job.claims}-{number}.{result.format}" for number in range(len(result.images))]
        for name, image in zip(names, result.images, strict=True):
            await self._files.put(name, image)
        data = [{"seed": seed, "file": name} for seed, name in zip(result.seeds, names, strict=True)]
        await self._finish(job, COMPLETED, result={**answers.description(result, echo), "data": data})
        self._metrics.drawn(job.model, len(names) * result.height * result.width, result.timings.queue / 1000)

    async def _fail(self, job: Job, error: FluxserveError) -> None:
        if surely_not_begun(error):
            await self._put_back(job, _RETRY_S, lost=False)
        elif isinstance(error, ConnectionFailed | Unavailable):
            await self._put_back(job, _RETRY_S * 4**job.losses, lost=True)
        else:
            ours = from_client(error, fields.RENAMED)
            status = CANCELLED if job.cancelling and isinstance(error, Cancelled) else FAILED
            await self._finish(job, status, error={"code": ours.code, "message": ours.message, "param": ours.param})

    async def _finish(self, job: Job, status: str, **outcome: Any) -> None:
        if await self._database.run_own(self._store.finish, job, status, **outcome):
            self._job_metrics.ended(job.model, status)
            log.info("job %s %s", job.id, status)
        else:
            log.warning("job %s: %s too late: it is another gateway's", job.id, status)

    async def _put_back(self, job: Job, delay: float, *, lost: bool) -> None:
        await self._database.run_own(self._store.put_back, job, delay, lost=lost)
        log.warning("job %s waits again%s", job.id, ": it was lost with its server" if lost else "")
