"""Read a body within bounds of bytes, time and kind, counted while it arrives: JSON, or a form."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from fluxserve_gateway.config import Config
from fluxserve_gateway.errors import CallerGone, InvalidField, Overloaded, TooLarge, TooSlow, WrongMediaType

MAX_JSON = 1 << 20  # bytes without input images; a prompt of 32,000 characters, all escaped, is a third of it
_MAX_VALUES = 256  # of a JSON body: some ten times what the largest request has
_MAX_FIELDS = 64
_MAX_FIELD = 1 << 20

AtEnd = Callable[[Callable[[], None]], object]


class Bodies:
    """Reads bodies, and bounds the bytes of all that one gateway holds at the same time."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._held = 0

    async def read(self, request: Request, at_end: AtEnd, most: int) -> bytearray:
        """Read a body of at most `most` bytes; they count against the gateway's bound until the request ends.

        Args:
            request: whose body it is.
            at_end: takes a function to call at the request's end.
            most: bytes; never more than `max_body`.

        Raises:
            TooLarge: more than `most`, by the header or by what arrived.
            TooSlow: it did not arrive within `body_timeout`.
            Overloaded: the gateway holds `max_bodies` already.
            CallerGone: the caller hung up meanwhile.
        """
        body = bytearray()
        async with self._in_time():
            async for chunk in self._chunks(request, at_end, min(most, self._config.max_body)):
                body += chunk
        return body

    async def form(
        self, request: Request, at_end: AtEnd, max_files: int
    ) -> tuple[dict[str, str], list[tuple[str, bytes]]]:
        """Read the fields, and the (name, bytes) of the files, of a multipart body while it arrives.

        Raises:
            InvalidField: a body that is not multipart, too many fields or files, or a field that is given twice.
            GatewayError: as `read` does.
        """
        bounds = {"max_files": max_files, "max_fields": _MAX_FIELDS, "max_part_size": _MAX_FIELD}
        async with aclosing(self._chunks(request, at_end, self._config.max_body)) as chunks, self._in_time():
            parser = MultiPartParser(request.headers, chunks, **bounds)
            parser.spool_max_size = self._config.max_body  # no copy of a picture goes to a disk
            try:
                parts = await parser.parse()
            except MultiPartException as error:
                raise InvalidField(f"body: {error.message}", code="invalid_multipart") from error
        try:
            return await _sorted(parts)
        finally:
            await parts.close()

    @asynccontextmanager
    async def _in_time(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(self._config.body_timeout):
                yield
        except TimeoutError as error:
            raise TooSlow(f"the body did not arrive within {self._config.body_timeout:g} s") from error
        except ClientDisconnect as error:
            raise CallerGone from error

    async def _chunks(self, request: Request, at_end: AtEnd, most: int) -> AsyncGenerator[bytes, None]:
        """Yield a body as it arrives, counted and bounded."""
        size = 0

        def release() -> None:
            self._held -= size

        at_end(release)
        length = request.headers.get("content-length", "")
        self._check(int(length) if length.isdecimal() else 0, 0, most)
        async for chunk in request.stream():
            self._check(size + len(chunk), len(chunk), most)
            size += len(chunk)
            self._held += len(chunk)
            yield chunk

    def _check(self, size: int, more: int, most: int) -> None:
        if size > most:
            raise TooLarge(f"body: got {size} bytes or more; allowed: at most {most}")
        if self._held + more > self._config.max_bodies:
            raise Overloaded("the gateway holds as many bytes of requests as it may; try again later")


def json_object(body: bytes | bytearray) -> dict[str, Any]:
    """Parse a body that is a JSON object; refuse other JSON, and a body that is none.

    Values are bounded before they are parsed: a million objects would stop the event loop.
    """
    try:
        text = body.decode("utf-8-sig")
        _check_values(text)
        value = json.loads(text, parse_constant=_no_constant, object_pairs_hook=_once_each)
    except ValueError as error:
        raise InvalidField(f"body: got no JSON ({str(error)[:80]})", code="invalid_json") from error
    if not isinstance(value, dict):
        raise InvalidField(f"body: got JSON of {type(value).__name__}; allowed: an object", code="invalid_json")
    return value


def _check_values(text: str) -> None:
    """Refuse too many marks of structure outside of strings; they bound the values and the depth."""
    outside = text.replace("\\\\", "").replace('\\"', "").split('"', 2 * _MAX_VALUES)[::2]
    marks = sum(part.count(mark) for part in outside for mark in "[{,:")
    if marks > _MAX_VALUES:
        raise InvalidField(f"body: got JSON of more than {_MAX_VALUES} values", code="invalid_json")


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def media_type(request: Request, *allowed: str) -> str:
    """Return the body's media type, one of `allowed`; refuse a body that names none, or another."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in allowed:
        raise WrongMediaType(f"content-type: got {kind[:60]!r}; allowed: {', '.join(allowed)}")
    return kind


async def _sorted(parts: FormData) -> tuple[dict[str, str], list[tuple[str, bytes]]]:
    fields: dict[str, str] = {}
    files: list[tuple[str, bytes]] = []
    for name, value in parts.multi_items():
        if isinstance(value, UploadFile):
            files.append((name, await value.read()))
            await value.close()  # before the next is read: one copy of each is kept
        elif name in fields:
            raise InvalidField(f"{name[:60]}: got it twice; allowed: once", param=name[:60])
        else:
            fields[name] = value
    return fields, files
