"""Remove what was kept long enough, fail what nobody could draw, and count for Prometheus."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from fluxserve_gateway.jobs.database import Database
from fluxserve_gateway.jobs.files import Files
from fluxserve_gateway.jobs.metrics import JobMetrics
from fluxserve_gateway.jobs.store import FAILED, Store

log = logging.getLogger("fluxserve_gateway")

_BATCH = 100
_COUNT_S = 5.0
_ABANDONED_S = 3600.0  # files of no job: a gateway died between writing them and the row, or a lost claim wrote them

GIVEN_UP = {"code": "queue_timeout", "message": "no server drew the job for as long as it may wait", "param": None}


class Upkeep:
    """Every gateway's share of the housekeeping; each part may run twice at the same time."""

    def __init__(self, database: Database, store: Store, files: Files, metrics: JobMetrics, every: float) -> None:
        """Make it; `every` is the seconds between two sweeps."""
        self._database, self._store, self._files, self._metrics = database, store, files, metrics
        self._every = every

    async def run(self) -> None:
        """Sweep and count until cancelled."""
        await asyncio.gather(
            _repeat("removal", self._every, self.sweep),
            _repeat("removal of abandoned files", _ABANDONED_S, self.remove_abandoned),
            _repeat("count", _COUNT_S, self._count),
        )

    async def sweep(self) -> None:
        """Remove jobs that have expired, their files first, so that no file outlives the knowledge of it."""
        for model in await self._database.run_own(self._store.give_up, GIVEN_UP):
            self._metrics.ended(model, FAILED)
        while expired := await self._database.run_own(self._store.expired, _BATCH):
            for job_id in expired:
                await self._files.remove(job_id)
                await self._database.run_own(self._store.remove, job_id)

    async def remove_abandoned(self, older_than_s: float = _ABANDONED_S) -> None:
        """Remove files that belong to no job."""
        found = await self._files.abandoned(older_than_s)
        ids = list(found)
        for start in range(0, len(ids), _BATCH):
            batch = ids[start : start + _BATCH]
            for job_id in set(batch) - await self._database.run_own(self._store.among, batch):
                await self._files.delete(found[job_id])

    async def _count(self) -> None:
        self._metrics.counted(await self._database.run_own(self._store.counts))


async def _repeat(name: str, every: float, do: Callable[[], Awaitable[None]]) -> None:
    while True:
        try:
            await do()
        except Exception as error:  # noqa: BLE001 (the next round must come)
            log.warning("jobs: the %s failed: %s", name, error)
        await asyncio.sleep(every)
