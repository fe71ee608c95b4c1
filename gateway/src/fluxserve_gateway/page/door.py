"""Let a browser through to the page's routes and to no other: who may, how much, and under which policy.

Gradio serves more than this page uses: files by path, a proxy, an API to its functions. A value that looks like a file
makes it fetch URLs. So its routes are listed here, files go through routes of our own, and what reaches its functions
is numbers and text.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders, URLPath
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Match, NoMatchFound
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fluxserve_gateway import bodies, inputs
from fluxserve_gateway.access import Access
from fluxserve_gateway.border import record_of
from fluxserve_gateway.config import Config
from fluxserve_gateway.errors import Forbidden, InvalidField, NoSuchRoute, Unauthorised
from fluxserve_gateway.keys import Key
from fluxserve_gateway.page.drawing import Drawings
from fluxserve_gateway.page.shelf import Shelf

_JOIN, _DATA = "/gradio_api/queue/join", "/gradio_api/queue/data"
_HEARTBEAT, _PICTURES, _UPLOADS = "/gradio_api/heartbeat/", "/pictures/", "/uploads"
_READ = frozenset({"/", "/config", "/theme.css", "/favicon.ico", "/gradio_api/startup-events", _DATA})
_FILES = ("/assets/", "/static/", "/svelte/")
_READ_BELOW = (*_FILES, _HEARTBEAT, _PICTURES)
_WRITE = frozenset({_JOIN, _UPLOADS})
_KINDS = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"RIFF": "image/webp"}

_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",  # Gradio compiles its templates in the browser
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self'",
        "worker-src 'self' blob:",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
_KEPT = "private, max-age=86400"


class _AskForKey(Unauthorised):
    """The answer that has a browser ask for a key, in its own dialogue."""

    def headers(self) -> dict[str, str]:
        return {**super().headers(), "www-authenticate": 'Basic realm="any name, and an API key", charset="UTF-8"'}


class Door(BaseRoute):
    """The route that the page is behind. Other paths stay the API's, with its own 404 and 405."""

    def __init__(
        self,
        gradio: ASGIApp,
        access: Access,
        config: Config,
        held: bodies.Bodies,
        shelf: Shelf,
        drawings: Drawings,
    ) -> None:
        self._gradio = gradio
        self._access = access
        self._config = config
        self._held = held
        self._shelf = shelf
        self._drawings = drawings

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Take the page's own paths."""
        if scope["type"] != "http":
            return Match.NONE, {}
        path, method = scope["path"], scope["method"]
        reads = method in ("GET", "HEAD") and (path in _READ or path.startswith(_READ_BELOW))
        return (Match.FULL if reads or (method == "POST" and path in _WRITE) else Match.NONE), {}

    def url_path_for(self, name: str, /, **path_params: Any) -> URLPath:
        """Name no path."""
        raise NoMatchFound(name, path_params)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request whose path matched."""
        request = Request(scope, receive)
        key = scope["fluxserve.key"] = self._key_of(request)
        assert isinstance(key, Key)
        path = scope["path"]
        if path == _UPLOADS:
            await (await self._upload(request))(scope, receive, send)
        elif path.startswith(_PICTURES):
            await self._picture(path.removeprefix(_PICTURES))(scope, receive, send)
        elif path.startswith(_HEARTBEAT):  # an endless answer would hold up the gateway's end
            await Response(status_code=204)(scope, receive, send)
        elif path == _JOIN:
            await self._gradio(scope, await self._checked(request), send)
        elif path == _DATA:
            async with self._drawings.watched(request.query_params.get("session_hash", "")):
                await self._gradio(scope, receive, send)
        else:
            await self._gradio(scope, receive, _with_policy(send, kept=path.startswith(_FILES)))

    def _key_of(self, request: Request) -> Key:
        """Return the key that the browser was given for this page; without keys, keep other pages and names out.

        A browser sends what it was given with every request, also where another page makes it do so.
        """
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
            raise Forbidden("origin: the page takes no requests of other web pages")
        secret = _password(request.headers.get("authorization", ""))
        if secret is not None:
            headers = [pair for pair in request.scope["headers"] if pair[0] != b"authorization"]
            request.scope["headers"] = [*headers, (b"authorization", b"Bearer " + secret.encode())]
        try:
            return self._access.key_of(Request(request.scope))
        except Unauthorised as error:
            raise _AskForKey(error.message, code=error.code) from error

    async def _upload(self, request: Request) -> Response:
        """Keep an input image, checked as the API checks it."""
        data = bytes(await self._held.read(request, record_of(request).at_end, self._config.max_body))
        inputs.pictures([data], "image", self._config)
        return JSONResponse({"name": self._shelf.put(data)})

    def _picture(self, name: str) -> Response:
        data = self._shelf.get(name)
        if data is None:
            raise NoSuchRoute(404, "pictures: there is none of this name, or not any more", None)
        kind = next(kind for start, kind in _KINDS.items() if data.startswith(start))
        return Response(data, media_type=kind, headers={"cache-control": _KEPT})

    async def _checked(self, request: Request) -> Receive:
        """Read what a click sends; the values that Gradio would take for files are refused."""
        body = bytes(await self._held.read(request, record_of(request).at_end, bodies.MAX_JSON))
        values = bodies.json_object(body).get("data")
        if not isinstance(values, list) or not all(map(_is_plain, values)):
            raise InvalidField("data: allowed: numbers, text, and lists of them", param="data")
        return _again(body, request.receive)


def _is_plain(value: object) -> bool:
    items = value if isinstance(value, list) else [value]
    return all(item is None or isinstance(item, str | int | float) for item in items)


def _again(body: bytes, receive: Receive) -> Receive:
    """Hand on a body that was read."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return messages.pop() if messages else await receive()

    return next_message


def _password(header: str) -> str | None:
    """Return the password of HTTP's Basic scheme; None where there is none."""
    scheme, _, encoded = header.partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        return base64.b64decode(encoded, validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return ""


def _with_policy(send: Send, *, kept: bool) -> Callable[[Message], Awaitable[None]]:
    """Let the page run its own scripts and no others; `kept`: its files may be cached."""

    async def send_on(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["content-security-policy"] = _POLICY
            if kept:
                headers["cache-control"] = _KEPT
        await send(message)

    return send_on
