"""The parts of jobs, put together; they live as long as the application."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from fluxserve_gateway.access import Access
from fluxserve_gateway.config import Config
from fluxserve_gateway.fleet import Fleet
from fluxserve_gateway.images import Images
from fluxserve_gateway.jobs.database import Database
from fluxserve_gateway.jobs.files import Files
from fluxserve_gateway.jobs.intake import Intake
from fluxserve_gateway.jobs.links import Links, add_links
from fluxserve_gateway.jobs.metrics import JobMetrics
from fluxserve_gateway.jobs.routes import Reading, add_jobs, add_secret, add_submission
from fluxserve_gateway.jobs.settings import JobSettings
from fluxserve_gateway.jobs.store import CANCELLED, Job, Store
from fluxserve_gateway.jobs.upkeep import Upkeep
from fluxserve_gateway.jobs.views import describe
from fluxserve_gateway.jobs.webhooks import Webhooks
from fluxserve_gateway.jobs.worker import Worker
from fluxserve_gateway.metrics import Metrics

log = logging.getLogger("fluxserve_gateway")


class Service:
    """One gateway's jobs."""

    def __init__(self, settings: JobSettings, config: Config, fleet: Fleet, images: Images, metrics: Metrics) -> None:
        """Open the database and the files.

        Raises:
            DatabaseError, ValueError, OSError: one of them cannot be used.
        """
        self.settings = settings
        self.files = Files(settings.files)
        self.database = Database(settings.database)
        try:
            self.files.belong_to(self.database.id)
        except (ValueError, OSError):
            self.database.close()
            raise
        self.store = Store(self.database, settings.keep, settings.lease)
        self.metrics = JobMetrics(metrics.registry, fleet.models)
        self.intake = Intake(settings, config, images, self.database, self.store, self.files)
        self.links = Links(self.database, self.store, self.files)
        images.keeper = self.links.keep
        self.worker = Worker(
            settings,
            self.database,
            self.store,
            self.files,
            fleet,
            (metrics, self.metrics),
            config.request_timeout,
        )
        self.upkeep = Upkeep(self.database, self.store, self.files, self.metrics, settings.sweep)
        self._webhooks = Webhooks(settings, self.database, self.store, describe, self.metrics.tried)

    def add_routes(self, app: FastAPI, access: Access) -> None:
        """Add the routes of jobs to the application."""
        add_submission(app, self.intake, self.worker)
        add_jobs(app, Reading(access, self.database, self.store, self.files), self.cancelled)
        add_links(app, self.links)
        if self.settings.webhook_origins:
            add_secret(app, access, self.settings.webhook_secret)

    def cancelled(self, job: Job, waited: bool) -> None:
        """Stop a job that its caller cancelled, if it is drawn here; if it waited, it has ended."""
        if waited:
            self.metrics.ended(job.model, CANCELLED)
        self.worker.cancel(job.id)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Draw jobs inside the block; at its end give back what is drawn then."""
        drawing = asyncio.create_task(self.worker.run())
        beside = [asyncio.create_task(self.upkeep.run())]
        if self.settings.webhook_origins:
            beside.append(asyncio.create_task(self._webhooks.run()))
        try:
            yield
        finally:
            self.worker.stop()
            for task in beside:
                task.cancel()
            await asyncio.wait({drawing, *beside})
            await asyncio.to_thread(self.database.close)
