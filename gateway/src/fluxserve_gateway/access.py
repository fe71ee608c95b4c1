"""Decide who may call: the holder of a key, or, where there are no keys, this machine's own programs alone."""

from __future__ import annotations

from urllib.parse import SplitResult, urlsplit

from starlette.requests import Request

from fluxserve_gateway.border import record_of
from fluxserve_gateway.config import Config
from fluxserve_gateway.errors import Forbidden, Unauthorised
from fluxserve_gateway.keys import Key, Keys, Limits

_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})

_ANYONE = Key(id="", name="", created=0, revoked=None, limits=Limits())


class Access:
    """Finds the key of a request, or refuses the request."""

    def __init__(self, keys: Keys | None, config: Config) -> None:
        """Look keys up in `keys`; None takes every request that comes from this machine."""
        self._keys = keys
        self._config = config

    def key_of(self, request: Request) -> Key:
        """Find the key of a request.

        Raises:
            Unauthorised: it has none, or one that is not known, or was revoked.
            Forbidden: there are no keys, and the request is a web page's or was sent to another name.
        """
        if self._keys is None:
            self._check_loopback(request)
            return _ANYONE
        scheme, _, secret = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secret.strip():
            raise Unauthorised(
                "no API key was given; send the header Authorization: Bearer KEY", code="missing_api_key"
            )
        key = self._keys.find(secret.strip())
        if key is None:
            raise Unauthorised("the API key is not known here, or was revoked")
        record_of(request).fields["key"] = key.id
        return key

    def _check_loopback(self, request: Request) -> None:
        """Keep web pages out: a browser lets any page send forms to this machine, or rename itself to it by DNS."""
        host = _parts(f"//{request.headers.get('host', '')}")
        if host is None or host.hostname not in _LOOPBACK_NAMES:
            raise Forbidden("host: a gateway without keys answers to localhost, 127.0.0.1 and [::1] alone")
        origin = request.headers.get("origin")
        if origin is None or origin in self._config.cors_origins:
            return
        page = _parts(origin)
        if page is None or page.netloc != host.netloc:
            raise Forbidden("origin: a gateway without keys takes no requests of other web pages")


def _parts(url: str) -> SplitResult | None:
    try:
        return urlsplit(url)
    except ValueError:
        return None
