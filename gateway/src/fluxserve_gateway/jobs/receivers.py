"""Who may receive webhooks: origins that the operator named, at addresses that are not private."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from urllib.parse import SplitResult, urlsplit

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import ThreadedResolver

_MAX_URL = 2000
_PORTS = {"http": 80, "https": 443}
_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")  # NAT64: a gateway may take these to any IPv4 address

Origin = tuple[str, str, int]


class Receivers:
    """The origins that may receive webhooks."""

    def __init__(self, origins: Iterable[str], *, private: bool) -> None:
        """Read the origins; `private` tells whether their addresses may be private.

        Raises:
            ValueError: what is no origin, or a private address where none may be.
        """
        self._shown = ", ".join(origins)
        self._origins = {self._checked(origin, private) for origin in origins}

    @staticmethod
    def _checked(text: str, private: bool) -> Origin:
        parts = _split(text)
        origin = None if parts is None else _origin(parts)
        if parts is None or origin is None or parts.path not in ("", "/") or parts.query:
            raise ValueError(f"webhook: got {text!r}, expected an origin, e.g. https://hooks.example.com")
        if not private and _is_literal(origin[1]) and not is_public(origin[1]):
            raise ValueError(f"webhook: got {text!r}, a private address; expected --webhook-private beside it")
        return origin

    def allow(self, url: str) -> bool:
        """Tell whether a webhook may be sent to this URL."""
        parts = _split(url)
        return parts is not None and _origin(parts) in self._origins

    @property
    def allowed(self) -> str:
        """Name the origins for an error message."""
        return f"a URL that begins with {self._shown}" if self._shown else "nothing: this gateway sends no webhooks"


def _split(url: str) -> SplitResult | None:
    """Split a URL that is plain ASCII without spaces, user or fragment; None if it is not."""
    if len(url) > _MAX_URL or not url.isascii() or not url.isprintable() or any(mark in url for mark in " \\#@"):
        return None
    try:
        return urlsplit(url)
    except ValueError:
        return None


def _origin(parts: SplitResult) -> Origin | None:
    try:
        port = parts.port
    except ValueError:
        return None
    if parts.scheme not in _PORTS or not parts.hostname or port == 0:
        return None
    return parts.scheme, parts.hostname, port or _PORTS[parts.scheme]


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_public(address: str) -> bool:
    """Tell whether an IP address is public, and so is the IPv4 address within it."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if ip.sixtofour is not None or ip.teredo is not None or ip in _TRANSLATED:
            return False
    return ip.is_global and not ip.is_multicast


class PublicResolver(AbstractResolver):
    """Resolves names to public addresses alone; the connection goes to the address that was judged."""

    def __init__(self) -> None:
        self._resolver = ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Resolve `host`. Raises `OSError` if it has no public address."""
        found = await self._resolver.resolve(host, port, family)
        public = [result for result in found if is_public(result["host"])]
        if not public:
            raise OSError(f"{host} has private addresses alone")
        return public

    async def close(self) -> None:
        """Close the resolver underneath."""
        await self._resolver.close()
