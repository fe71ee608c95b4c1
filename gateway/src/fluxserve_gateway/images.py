"""Answer the two routes that draw: from a request's body to a picture, or to a stream of events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fluxserve_client import Cancelled, DeadlineExceeded, FluxserveError, Preview, Progress, Result
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fluxserve_gateway import answers, bodies, fields, inputs
from fluxserve_gateway.access import Access
from fluxserve_gateway.answers import Echo
from fluxserve_gateway.border import Record, error_of, record_of
from fluxserve_gateway.config import Config
from fluxserve_gateway.errors import CallerGone, GatewayError, InvalidField, Overloaded, from_client
from fluxserve_gateway.fleet import Fleet
from fluxserve_gateway.keys import Key
from fluxserve_gateway.leaving import unless_gone
from fluxserve_gateway.limits import Usage
from fluxserve_gateway.metrics import Metrics

_JSON = "application/json"
_FORM = "multipart/form-data"

_GUESSED_PIXELS = 1 << 20  # of a picture whose size the model decides, until it is drawn

Event = Progress | Preview | Result


@dataclass(frozen=True)
class Drawing:
    """Holds one request for pictures, checked, as it goes to a server."""

    body: fields.Generation
    arguments: dict[str, Any]
    model: str
    echo: Echo


@dataclass
class Charge:
    """Holds what a request costs its key: the pixels requested, until the pixels drawn are known.

    A caller who hangs up pays for the pixels requested: the server has worked for them.
    """

    pixels: int


Keeper = Callable[[Key, Drawing, Result], Awaitable[list[str]]]
"""Keeps the pictures of a result, and returns the paths to fetch them at."""


class Images:
    """Draws the pictures that callers request.

    Attributes:
        bodies: what is held of requests.
        keeper: keeps results for `response_format: url`; None where nothing is kept.
    """

    def __init__(self, config: Config, fleet: Fleet, access: Access, metrics: Metrics) -> None:
        self._config = config
        self._fleet = fleet
        self._access = access
        self._metrics = metrics
        self.bodies = bodies.Bodies(config)
        self.keeper: Keeper | None = None
        self._usage = Usage()
        self._running = 0

    async def generations(self, request: Request) -> Response:
        """Answer `POST /v1/images/generations`."""
        record, key = self.begin(request, "image_generation")
        bodies.media_type(request, _JSON)
        content = bodies.json_object(await self.bodies.read(request, record.at_end, bodies.MAX_JSON))
        body = fields.parse(fields.Generation, content, text=False)
        return await self._answer(request, key, self.drawing(record, body, record.operation, ()))

    async def edits(self, request: Request) -> Response:
        """Answer `POST /v1/images/edits`."""
        record, key = self.begin(request, "image_edit")
        kind = bodies.media_type(request, _JSON, _FORM)
        body, files, param = await (self._edit_of_json if kind == _JSON else self._edit_of_form)(request, record)
        pictures = inputs.pictures(files, param, self._config)
        return await self._answer(request, key, self.drawing(record, body, record.operation, pictures))

    async def _edit_of_json(self, request: Request, record: Record) -> tuple[fields.Edit, list[bytes], str]:
        content = await self.bodies.read(request, record.at_end, self._config.max_body)
        given, files = await asyncio.to_thread(inputs.edit_of_json, content, self._config.max_images)
        return fields.parse(fields.Edit, given, text=False), files, "images"

    async def _edit_of_form(self, request: Request, record: Record) -> tuple[fields.Edit, list[bytes], str]:
        given, files = await self.bodies.form(request, record.at_end, self._config.max_images)
        return fields.parse(fields.Edit, given, text=True), inputs.uploaded(files), "image"

    async def follow(
        self, record: Record, key: Key, body: fields.Generation, files: Sequence[bytes]
    ) -> AsyncGenerator[Event, None]:
        """Draw for a caller within this process, the page: yield its progress and glimpses, and its result last.

        Closing the generator stops the request on the server.

        Args:
            record: what is known of the request; the caller closes it.
            key: whose request it is.
            body: an `Edit` if there are files.
            files: input images.

        Raises:
            GatewayError: as the routes answer.
        """
        record.operation = "image_edit" if files else "image_generation"
        self._enter(record, key)
        pictures = inputs.pictures(files, "image", self._config) if files else ()
        drawing = self.drawing(record, body, record.operation, pictures)
        charge = self.admit(key, drawing, record)

        async def draw(**callbacks: Any) -> Result:
            return await self._draw(drawing, record, charge, callbacks)

        async with aclosing(_follow(draw, glimpses=True)) as events:
            async for event in events:
                yield event

    def begin(self, request: Request, operation: str) -> tuple[Record, Key]:
        """Let a request in, before a byte of its body is read. `operation` is for the metrics."""
        record = record_of(request)
        record.operation = operation
        key = self._access.key_of(request)
        self._enter(record, key)
        return record, key

    def _enter(self, record: Record, key: Key) -> None:
        if self._running >= self._config.max_requests:
            raise Overloaded(f"the gateway has {self._running} requests, as many as it may; try again later")
        record.at_end(self._usage.enter(key))
        self._running += 1
        record.at_end(self._end)

    def _end(self) -> None:
        self._running -= 1

    def drawing(
        self, record: Record, body: fields.Generation, operation: str, pictures: tuple[inputs.Picture, ...]
    ) -> Drawing:
        """Choose the model, and put together what its server is to be sent."""
        model = record.model = self._fleet.named(body.model)
        record.fields |= {"n": body.count, "size": body.size or "auto", "stream": bool(body.stream)}
        if self._config.log_prompts:
            record.fields["prompt"] = body.prompt
        arguments = body.arguments()
        if pictures:
            arguments["image"] = [picture.data for picture in pictures]
        echoed = body.safety_identifier or body.user
        echo = Echo(operation, echoed or None, sum(picture.pixels for picture in pictures))
        return Drawing(body, arguments, model, echo)

    async def _answer(self, request: Request, key: Key, drawing: Drawing) -> Response:
        record = record_of(request)
        keep = self._keeper(drawing.body)
        charge = self.admit(key, drawing, record)

        async def draw(**callbacks: Any) -> Result:
            return await self._draw(drawing, record, charge, callbacks)

        if not drawing.body.stream:
            result = await unless_gone(request.receive, draw())
            if keep is None:
                return Response(answers.response(result, drawing.echo), media_type=_JSON)
            urls = [f"{request.base_url}{path}" for path in await keep(key, drawing, result)]
            return Response(answers.linked(result, drawing.echo, urls), media_type=_JSON)
        events = _follow(draw, drawing.body.previews)
        # an answer's status is its first line: it waits for a sign that the request was admitted, or for an error
        first = await unless_gone(request.receive, _first(events))
        return EventStream(first, events, drawing.echo, record)

    def _keeper(self, body: fields.Generation) -> Keeper | None:
        """What keeps the pictures of an answer with URLs; None where it has the pictures themselves."""
        if body.response_format != "url":
            return None
        if self.keeper is None or body.stream:
            why = "with stream" if body.stream else "of a gateway that keeps no jobs"
            message = f"response_format: got 'url'; allowed {why}: b64_json"
            raise InvalidField(message, param="response_format", code="unsupported_parameter")
        return self.keeper

    def admit(self, key: Key, drawing: Drawing, record: Record) -> Charge:
        """Count the request against its key."""
        size = drawing.body.height_width
        charge = Charge(drawing.body.count * (size[0] * size[1] if size else _GUESSED_PIXELS))
        end = self._usage.admit(key, charge.pixels)
        record.at_end(lambda: end(charge.pixels))
        return charge

    async def _draw(self, drawing: Drawing, record: Record, charge: Charge, callbacks: dict[str, Any]) -> Result:
        try:
            result = await self._fleet.draw(
                drawing.model,
                drawing.arguments,
                request_id=record.request_id,
                timeout=self._config.request_timeout,
                span=record.span,
                **callbacks,
            )
        except FluxserveError as error:
            if not isinstance(error, Cancelled | DeadlineExceeded):
                charge.pixels = 0
            record.fields["server_said"] = error.message[:300]
            raise from_client(error, fields.RENAMED) from error
        charge.pixels = len(result.images) * result.height * result.width
        self._metrics.drawn(drawing.model, charge.pixels, result.timings.queue / 1000)
        record.fields |= {"pixels": charge.pixels, "queue_ms": result.timings.queue, "total_ms": result.timings.total}
        return result


async def _follow(
    draw: Callable[..., Awaitable[Result]], partial_images: int = 0, glimpses: bool = False
) -> AsyncGenerator[Event, None]:
    """Yield a request's progress and previews as they happen, then its result. Closing this ends the request."""
    queue: asyncio.Queue[Progress | Preview | None] = asyncio.Queue()
    previews: dict[str, Any] = {"on_preview": queue.put_nowait} if partial_images or glimpses else {}
    previews |= {"partial_images": partial_images} if partial_images else {}
    task = asyncio.ensure_future(draw(progress=queue.put_nowait, **previews))
    task.add_done_callback(lambda _: queue.put_nowait(None))
    try:
        while (event := await queue.get()) is not None:
            yield event
        yield task.result()
    finally:
        task.cancel()
        await asyncio.wait({task})


async def _first(events: AsyncGenerator[Event, None]) -> Event:
    return await anext(events)


class EventStream(Response):
    """Sends events. A caller who hangs up ends their source at once, not at the next event."""

    media_type = "text/event-stream"

    def __init__(self, first: Event, rest: AsyncGenerator[Event, None], echo: Echo, record: Record) -> None:
        """Send `first`, and then `rest`, which is closed when the stream ends."""
        super().__init__(headers={"x-accel-buffering": "no"})  # a proxy passes each event on as it comes
        del self.headers["content-length"]
        self._first, self._rest, self._echo, self._record = first, rest, echo, record

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._rest):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await unless_gone(receive, self._pump(send))

    async def _pump(self, send: Send) -> None:
        """Send every event. A failure, too, is an event: the status has been sent."""
        try:
            await self._send(self._first, send)
            async for event in self._rest:
                await self._send(event, send)
        except CallerGone:
            raise
        except Exception as error:  # noqa: BLE001 (foreseen or not, the caller must learn about it)
            await self._fail(error_of(error, self._record.request_id), send)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, event: Event, send: Send) -> None:
        for chunk in answers.events(event, self._echo):
            await send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def _fail(self, error: GatewayError, send: Send) -> None:
        self._record.outcome = error.code or "error"
        await send({"type": "http.response.body", "body": answers.failed(error), "more_body": True})
