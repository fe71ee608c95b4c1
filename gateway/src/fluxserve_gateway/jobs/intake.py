"""`POST /v1/jobs`: read a generation or an edit, and keep it as a job."""

from __future__ import annotations

import asyncio
import hashlib
import json
from contextlib import suppress
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError
from starlette.requests import Request

from fluxserve_gateway import bodies, fields, inputs
from fluxserve_gateway.border import Record
from fluxserve_gateway.config import Config
from fluxserve_gateway.errors import Conflict, InvalidField, Overloaded, RateLimited
from fluxserve_gateway.images import Drawing, Images
from fluxserve_gateway.jobs.database import Database
from fluxserve_gateway.jobs.files import Files, new_id
from fluxserve_gateway.jobs.receivers import Receivers
from fluxserve_gateway.jobs.settings import JobSettings
from fluxserve_gateway.jobs.store import Job, NewJob, Store, TooMany
from fluxserve_gateway.jobs.worker import input_name

_JSON = "application/json"
_FORM = "multipart/form-data"
_MAX_KEY = 255
_RETRY_S = 10.0


def _no_stream(value: bool | None) -> bool | None:
    if value:
        raise PydanticCustomError("refused", "false: a job has no stream; look at it with GET")
    return value


def _no_pictures(value: str | None) -> str | None:
    if value == "b64_json":
        raise PydanticCustomError("refused", "'url': a job's result has the paths of its pictures")
    return value


Links = Annotated[Literal["b64_json", "url"] | None, AfterValidator(_no_pictures)]
NoStream = Annotated[bool | None, AfterValidator(_no_stream)]


class JobGeneration(fields.Generation):
    """A generation that is kept as a job."""

    stream: NoStream = None
    response_format: Links = None
    webhook: fields.Text | None = None


class JobEdit(fields.Edit):
    """An edit that is kept as a job."""

    stream: NoStream = None
    response_format: Links = None
    webhook: fields.Text | None = None


class Intake:
    """Takes jobs in."""

    def __init__(
        self, settings: JobSettings, config: Config, images: Images, database: Database, store: Store, files: Files
    ) -> None:
        self._settings, self._config, self._images = settings, config, images
        self._database, self._store, self._files = database, store, files
        self._receivers = Receivers(settings.webhook_origins, private=settings.webhook_private)

    async def take(self, request: Request) -> tuple[Job, bool]:
        """Read the request, and keep it.

        Returns:
            The job, and whether it is new: with an idempotency key that is known, it is the one from then.

        Raises:
            Conflict: the idempotency key came with another request before.
            RateLimited, Overloaded: as many jobs wait as may.
            GatewayError: what is wrong with the request; nothing was kept.
        """
        record, key = self._images.begin(request, "job")
        idempotency_key = _idempotency_key(request)
        body, drawing = await self._read(request, record)
        fingerprint = _fingerprint(body, drawing)
        if idempotency_key and (known := await self._database.run(self._store.known, key.id, idempotency_key)):
            return _same(known, fingerprint), False
        charge = self._images.admit(key, drawing, record)
        charge_if_kept, charge.pixels = charge.pixels, 0
        kept = list(drawing.arguments.pop("image", []))
        new = NewJob(
            id=new_id(),
            owner=key.id,
            idempotency_key=idempotency_key,
            fingerprint=fingerprint,
            model=drawing.model,
            request={"arguments": drawing.arguments, "echo": asdict(drawing.echo)},
            inputs=len(kept),
            webhook=body.webhook,
        )
        job, is_new = await self._keep(new, kept)
        record.fields["job"] = job.id
        if is_new:
            charge.pixels = charge_if_kept
        return (job, True) if is_new else (_same(job, fingerprint), False)

    async def _read(self, request: Request, record: Record) -> tuple[JobGeneration | JobEdit, Drawing]:
        body, files, param = await self._body(request, record)
        if body.webhook is not None and not self._receivers.allow(body.webhook):
            message = f"webhook: got {body.webhook[:60]!r}; allowed: {self._receivers.allowed}"
            raise InvalidField(message, param="webhook")
        if isinstance(body, JobGeneration):
            return body, self._images.drawing(record, body, "image_generation", ())
        pictures = inputs.pictures(files, param, self._config)
        return body, self._images.drawing(record, body, "image_edit", pictures)

    async def _body(self, request: Request, record: Record) -> tuple[JobGeneration | JobEdit, list[bytes], str]:
        """Read the body: a form, and JSON with `images`, is an edit; other JSON is a generation."""
        if bodies.media_type(request, _JSON, _FORM) == _FORM:
            given, files = await self._images.bodies.form(request, record.at_end, self._config.max_images)
            return fields.parse(JobEdit, given, text=True), inputs.uploaded(files), "image"
        content = await self._images.bodies.read(request, record.at_end, self._config.max_body)
        parsed, found = await asyncio.to_thread(inputs.of_json, content, self._config.max_images)
        if found is None:
            return fields.parse(JobGeneration, parsed, text=False), [], ""
        return fields.parse(JobEdit, parsed, text=False), found, "images"

    async def _keep(self, new: NewJob, pictures: list[bytes]) -> tuple[Job, bool]:
        """Write the input images, then the row: a job never lacks its files."""
        is_new = False
        try:
            for number, picture in enumerate(pictures):
                await self._files.put(input_name(new.id, number), picture)
            job, is_new = await self._database.run(
                self._store.submit, new, self._settings.max_queued, self._settings.max_queued_per_key
            )
        except TooMany as error:
            if error.of_key:
                message = f"this key has {error.queued} jobs that wait; allowed: {self._settings.max_queued_per_key}"
                raise RateLimited(message, retry_after=_RETRY_S, code="too_many_jobs") from error
            message = f"{error.queued} jobs wait, as many as may; try again later"
            raise Overloaded(message, retry_after=_RETRY_S, code="queue_full") from error
        finally:
            if pictures and not is_new:
                with suppress(Overloaded):  # upkeep removes them
                    await self._files.remove(new.id)
        return job, is_new


def _idempotency_key(request: Request) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is not None and not (0 < len(key) <= _MAX_KEY and key.isascii() and key.isprintable()):
        message = f"Idempotency-Key: got {key[:60]!r}; allowed: 1 to {_MAX_KEY} printable characters of ASCII"
        raise InvalidField(message, param="Idempotency-Key")
    return key


def _fingerprint(body: JobGeneration | JobEdit, drawing: Drawing) -> str:
    """Hash what a request asks for, as a form or as JSON."""
    given: dict[str, Any] = body.model_dump(exclude_none=True)
    digests = [hashlib.sha256(picture).hexdigest() for picture in drawing.arguments.get("image", [])]
    text = json.dumps([drawing.echo.operation, given, digests], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _same(job: Job, fingerprint: str) -> Job:
    if job.fingerprint != fingerprint:
        raise Conflict(
            "Idempotency-Key: it came with another request before; send a new key with a new request",
            param="Idempotency-Key",
            code="idempotency_mismatch",
        )
    return job
