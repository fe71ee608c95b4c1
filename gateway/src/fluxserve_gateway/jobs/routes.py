"""The routes of jobs: take one in, look, list, cancel, fetch a picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from fluxserve_gateway.access import Access
from fluxserve_gateway.errors import InvalidField, JobNotFound
from fluxserve_gateway.jobs import documents
from fluxserve_gateway.jobs.database import Database
from fluxserve_gateway.jobs.files import Files
from fluxserve_gateway.jobs.intake import Intake
from fluxserve_gateway.jobs.store import Job, Store
from fluxserve_gateway.jobs.views import describe
from fluxserve_gateway.jobs.webhooks import secret_of
from fluxserve_gateway.jobs.worker import Worker

_DEFAULT_PAGE, _MAX_PAGE = 20, 100
_SHOWN = 60


@dataclass(frozen=True)
class Reading:
    """What the routes read from."""

    access: Access
    database: Database
    store: Store
    files: Files

    async def job(self, request: Request) -> tuple[Job, int]:
        """Find the job in the path, and how many are before it; one of another key is not found."""
        key = self.access.key_of(request)
        job_id = request.path_params["job_id"]
        found = await self.database.run(self.store.find, key.id, job_id)
        if found is None:
            raise _not_found(job_id)
        return found


def add_submission(app: FastAPI, intake: Intake, worker: Worker) -> None:
    """Add the route that takes jobs in."""

    @app.post("/v1/jobs", status_code=202, openapi_extra=documents.SUBMIT, responses=documents.TAKEN)
    async def submit(request: Request) -> JSONResponse:
        """Keep a generation, or an edit, to be drawn later. A form, or JSON with `images`, is an edit."""
        job, is_new = await intake.take(request)
        worker.wake()
        headers = {"location": f"/v1/jobs/{job.id}", **({} if is_new else {"idempotent-replayed": "true"})}
        return JSONResponse(describe(job), 202, headers)


def add_jobs(app: FastAPI, reading: Reading, cancelled: Callable[[Job, bool], None]) -> None:
    """Add the routes of jobs that are there. `cancelled` is called with a job, and whether it waited."""
    run, store = reading.database.run, reading.store

    @app.get("/v1/jobs", openapi_extra=documents.LIST, responses=documents.PAGE)
    async def page(request: Request) -> JSONResponse:
        """List the caller's jobs."""
        key = reading.access.key_of(request)
        limit, after, newest_first = _paging(request)
        found = await run(store.page, key.id, limit=limit + 1, after=after, newest_first=newest_first)
        if found is None:
            raise InvalidField(f"after: got {str(after)[:_SHOWN]!r}; allowed: the id of a job of yours", param="after")
        data = [describe(job) for job in found[:limit]]
        ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
        return JSONResponse({"object": "list", "data": data, **ends, "has_more": len(found) > limit})

    @app.get("/v1/jobs/{job_id}", openapi_extra=documents.ONE, responses=documents.FOUND)
    async def look(request: Request) -> JSONResponse:
        """Tell how far a job is, and its result."""
        return JSONResponse(describe(*await reading.job(request)))

    @app.delete("/v1/jobs/{job_id}", openapi_extra=documents.ONE, responses=documents.FOUND)
    async def cancel(request: Request) -> JSONResponse:
        """Cancel a job; one that has ended stays as it is."""
        key = reading.access.key_of(request)
        job_id = request.path_params["job_id"]
        found = await run(store.cancel, key.id, job_id)
        if found is None:
            raise _not_found(job_id)
        cancelled(*found)
        return JSONResponse(describe(found[0]))

    @app.get("/v1/jobs/{job_id}/images/{number}", openapi_extra=documents.IMAGE, responses=documents.PICTURE)
    async def picture(request: Request) -> Response:
        """Fetch a picture of a job that is completed."""
        job, _ = await reading.job(request)
        number = request.path_params["number"]
        result = job.result or {"data": [], "output_format": ""}
        files = {str(index): each["file"] for index, each in enumerate(result["data"])}
        data = await reading.files.get(files[number]) if number in files else None
        if data is None:
            message = f"number: got {number[:_SHOWN]!r}; the job is {job.status} and has {len(files)} pictures"
            raise JobNotFound(message, param="number")
        return Response(data, media_type=f"image/{result['output_format']}")


def add_secret(app: FastAPI, access: Access, master: bytes) -> None:
    """Add the route that tells a key its secret for webhooks."""

    @app.get("/v1/webhook_secret", responses=documents.SECRET)
    async def secret(request: Request) -> JSONResponse:
        """Tell the secret with which webhooks to the caller are signed."""
        return JSONResponse({"secret": secret_of(master, access.key_of(request).id)})


def _not_found(job_id: str) -> JobNotFound:
    return JobNotFound(f"job_id: got {job_id[:_SHOWN]!r}; no such job of yours is kept here", param="job_id")


def _paging(request: Request) -> tuple[int, str | None, bool]:
    given = request.query_params
    limit = given.get("limit", str(_DEFAULT_PAGE))
    if not (limit.isascii() and limit.isdecimal() and len(limit) <= 3 and 1 <= int(limit) <= _MAX_PAGE):
        raise InvalidField(f"limit: got {limit[:_SHOWN]!r}; allowed: 1 to {_MAX_PAGE}", param="limit")
    order = given.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidField(f"order: got {order[:_SHOWN]!r}; allowed: asc, desc", param="order")
    return int(limit), given.get("after"), order == "desc"
