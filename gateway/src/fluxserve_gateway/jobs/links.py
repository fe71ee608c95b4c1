"""`response_format: url`: keep the pictures of an answer, and hand out paths that need no key.

A path has 256 random bits, which are the name of the file. It works for as long as the file is there: the request is
kept as a completed job, and upkeep removes both.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import asdict

from fastapi import FastAPI, Request
from fastapi.responses import Response
from fluxserve_client import Result

from fluxserve_gateway import answers
from fluxserve_gateway.errors import JobNotFound
from fluxserve_gateway.images import Drawing
from fluxserve_gateway.jobs import documents
from fluxserve_gateway.jobs.database import Database
from fluxserve_gateway.jobs.files import Files, new_id
from fluxserve_gateway.jobs.store import NewJob, Store
from fluxserve_gateway.keys import Key

_NAME = re.compile(r"job_[0-9a-f]{32}/[0-9A-Za-z_-]{43}-[0-9]\.(png|jpeg|webp)")


class Links:
    """Keeps results, and finds them by their paths."""

    def __init__(self, database: Database, store: Store, files: Files) -> None:
        self._database, self._store, self._files = database, store, files

    async def keep(self, key: Key, drawing: Drawing, result: Result) -> list[str]:
        """Keep a result as a completed job; return the paths of its pictures. Input images are not kept."""
        job_id, token = new_id(), secrets.token_urlsafe(32)
        names = [f"{job_id}/{token}-{number}.{result.format}" for number in range(len(result.images))]
        for name, image in zip(names, result.images, strict=True):
            await self._files.put(name, image)
        arguments = {name: value for name, value in drawing.arguments.items() if name != "image"}
        request = {"arguments": arguments, "echo": asdict(drawing.echo)}
        data = [{"seed": seed, "file": name} for seed, name in zip(result.seeds, names, strict=True)]
        new = NewJob(job_id, key.id, None, "", drawing.model, request, 0, None)
        kept = {**answers.description(result, drawing.echo), "data": data}
        await self._database.run(self._store.add_completed, new, kept)
        return [f"v1/files/{name}" for name in names]

    async def find(self, name: str) -> Response:
        """Answer with the file of a path. Raises `JobNotFound` if there is none, or no longer."""
        known = _NAME.fullmatch(name)
        data = await self._files.get(name) if known else None
        if known is None or data is None:
            raise JobNotFound("no such file is kept here, or no longer")
        return Response(data, media_type=f"image/{known[1]}")


def add_links(app: FastAPI, links: Links) -> None:
    """Add the route that answers the paths."""

    @app.get("/v1/files/{job_id}/{name}", openapi_extra=documents.LINK, responses=documents.LINKED)
    async def file(request: Request) -> Response:
        """Fetch a picture by the URL that an answer had."""
        return await links.find("{job_id}/{name}".format(**request.path_params))
