"""Read a body within bounds of bytes, time and kind, counted while it arrives; and the pictures in it."""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import json
import re
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from fluxserve_gateway.config import Config
from fluxserve_gateway.errors import CallerGone, InvalidField, Overloaded, TooLarge, TooSlow, WrongMediaType

_MAX_FIELDS = 64
_MAX_FIELD = 1 << 20
_FORMATS = ("PNG", "JPEG", "WEBP")
_DATA_URL = re.compile(r"data:image/(?:png|jpeg|jpg|webp);base64,", re.IGNORECASE)


@dataclass(frozen=True)
class Picture:
    """An input image as it came, and its size in pixels by its header."""

    data: bytes
    pixels: int


class Bodies:
    """The bytes of bodies that one gateway holds at the same time."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._held = 0

    @property
    def held(self) -> int:
        """Bytes in bodies that are held now."""
        return self._held

    async def read(self, request: Request, at_end: Callable[[Callable[[], None]], object]) -> bytes:
        """Read the body; its bytes count against the gateway's bound until the request ends.

        Args:
            request: whose body it is.
            at_end: takes a function to call at the request's end.

        Raises:
            TooLarge: more than `max_body`, by the header or by what arrived.
            TooSlow: it did not arrive within `body_timeout`.
            Overloaded: the gateway holds `max_bodies` already.
            CallerGone: the caller hung up meanwhile.
        """
        body = bytearray()
        at_end(lambda: self._release(len(body)))
        try:
            async with asyncio.timeout(self._config.body_timeout):
                await self._receive(request, body)
        except TimeoutError as error:
            raise TooSlow(f"the body did not arrive within {self._config.body_timeout:g} s") from error
        except ClientDisconnect as error:
            raise CallerGone from error
        return bytes(body)

    def _release(self, size: int) -> None:
        self._held -= size

    async def _receive(self, request: Request, body: bytearray) -> None:
        length = request.headers.get("content-length", "")
        self._check(int(length) if length.isdecimal() else 0, 0)
        async for chunk in request.stream():
            self._check(len(body) + len(chunk), len(chunk))
            self._held += len(chunk)
            body += chunk

    def _check(self, size: int, more: int) -> None:
        if size > self._config.max_body:
            raise TooLarge(f"body: got {size} bytes or more; allowed: at most {self._config.max_body}")
        if self._held + more > self._config.max_bodies:
            raise Overloaded("the gateway holds as many bytes of requests as it may; try again later")


def json_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body; a body of other JSON, or of none, is refused."""
    try:
        value = json.loads(body, parse_constant=_no_constant, object_pairs_hook=_once_each)
    except (ValueError, RecursionError) as error:
        raise InvalidField(f"body: got no JSON ({str(error)[:80]})", code="invalid_json") from error
    if not isinstance(value, dict):
        raise InvalidField(f"body: got JSON of {type(value).__name__}; allowed: an object", code="invalid_json")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is there twice")
    return found


def media_type(request: Request, *allowed: str) -> str:
    """The body's media type, one of `allowed`; a body that names none, or another, is refused."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in allowed:
        raise WrongMediaType(f"content-type: got {kind[:60]!r}; allowed: {', '.join(allowed)}")
    return kind


async def form(request: Request, body: bytes, max_files: int) -> tuple[dict[str, str], list[tuple[str, bytes]]]:
    """The fields, and the (name, bytes) of the files, of a multipart body.

    Raises:
        InvalidField: a body that is not multipart, too many fields or files, or a field that is given twice.
    """
    bounds = {"max_files": max_files, "max_fields": _MAX_FIELDS, "max_part_size": _MAX_FIELD}
    parser = MultiPartParser(request.headers, _once(body), **bounds)
    parser.spool_max_size = len(body) + 1  # the body is in memory already: no copy of it goes to a disk
    try:
        parts = await parser.parse()
    except MultiPartException as error:
        raise InvalidField(f"body: {error.message}", code="invalid_multipart") from error
    fields: dict[str, str] = {}
    files: list[tuple[str, bytes]] = []
    try:
        for name, value in parts.multi_items():
            if isinstance(value, UploadFile):
                files.append((name, await value.read()))
            elif name in fields:
                raise InvalidField(f"{name[:60]}: got it twice; allowed: once", param=name[:60])
            else:
                fields[name] = value
    finally:
        await parts.close()
    return fields, files


async def _once(body: bytes) -> AsyncGenerator[bytes, None]:
    yield body


def uploaded(files: Sequence[tuple[str, bytes]]) -> list[bytes]:
    """The files of the parts `image` and `image[]`; any other part with a file is refused by name."""
    for name, _ in files:
        if name in ("mask", "markup"):
            message = f"{name}: got a file; allowed: nothing: no server here takes a mask yet"
            raise InvalidField(message, param=name, code="unsupported_parameter")
        if name not in ("image", "image[]"):
            raise InvalidField(f"{name[:60]}: got a file; allowed: image, image[]", param=name[:60])
    return [data for _, data in files]


def referenced(images: object) -> list[bytes]:
    """The files in `images` of a JSON body: objects whose `image_url` is a data URL. Nothing is fetched."""
    if not isinstance(images, list):
        raise InvalidField("images: allowed: a list of objects with image_url", param="images")
    return [_from_data_url(image) for image in images]


def _from_data_url(image: object) -> bytes:
    allowed = "allowed: an object with image_url, a data URL of PNG, JPEG or WebP in base64"
    if isinstance(image, Mapping) and "file_id" in image:
        raise InvalidField(f"images: got a file_id, and no files are kept here; {allowed}", param="images")
    if not isinstance(image, Mapping) or set(image) != {"image_url"} or not isinstance(image["image_url"], str):
        raise InvalidField(f"images: got {type(image).__name__}; {allowed}", param="images")
    head = _DATA_URL.match(image["image_url"])
    if head is None:
        shown = image["image_url"][:40]
        raise InvalidField(f"images: got {shown!r}, and no URL is fetched; {allowed}", param="images")
    try:
        return base64.b64decode(image["image_url"][head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidField(f"images: got damaged base64 ({error}); {allowed}", param="images") from error


async def pictures(files: Sequence[bytes], param: str, config: Config) -> tuple[Picture, ...]:
    """Check number, kind and size in pixels of input images, by their headers; nothing is decoded."""
    if not 1 <= len(files) <= config.max_images:
        got = f"{param}: got {len(files)} images"
        raise InvalidField(f"{got}; allowed: 1 to {config.max_images}", param=param)
    return tuple([await asyncio.to_thread(_picture, data, param, config.max_image_pixels) for data in files])


def _picture(data: bytes, param: str, most: int) -> Picture:
    try:
        width, height = Image.open(io.BytesIO(data), formats=_FORMATS).size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InvalidField(f"{param}: got {len(data)} bytes; allowed: a PNG, JPEG or WebP file", param=param) from error
    if width * height > most:
        raise InvalidField(f"{param}: got {width} x {height} pixels; allowed: at most {most}", param=param)
    return Picture(data, width * height)
