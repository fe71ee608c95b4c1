"""Where the server is, and how the connection is secured."""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from typing import Literal, get_args
from urllib.parse import urlsplit

Protocol = Literal["grpc", "http"]

_SCHEMES: dict[str, tuple[Protocol, bool]] = {
    "grpc": ("grpc", False),
    "grpcs": ("grpc", True),
    "http": ("http", False),
    "https": ("http", True),
}
_TRITON_PORT: dict[Protocol, int] = {"grpc": 8001, "http": 8000}


@dataclass(frozen=True)
class Tls:
    """How to secure the connection. `Tls()` trusts the usual certificate authorities.

    Attributes:
        ca: a PEM file of the authorities to trust instead.
        cert, key: PEM files of the client's own certificate and key, for mutual TLS; both or neither.
        insecure: accept any certificate. HTTP only: gRPC has no such mode.
    """

    ca: str | os.PathLike[str] | None = None
    cert: str | os.PathLike[str] | None = None
    key: str | os.PathLike[str] | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ValueError("cert, key: got one of them, expected both or neither")

    def context(self) -> ssl.SSLContext:
        """The same as an SSL context. Raises `OSError` if a file cannot be read."""
        context = ssl.create_default_context(cafile=self.ca)
        if self.cert is not None:
            context.load_cert_chain(self.cert, self.key)
        if self.insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


@dataclass(frozen=True)
class Endpoint:
    """One parsed address: `address` is "host:port", over HTTP perhaps with a path behind it."""

    protocol: Protocol
    address: str
    tls: Tls | None

    @classmethod
    def parse(cls, url: str, protocol: str | None = None, tls: Tls | None = None) -> Endpoint:
        """Read "host", "host:port" or "scheme://host[:port][/path]", scheme one of grpc, grpcs, http, https.

        Without a scheme, `protocol` decides (gRPC if None) and `tls` secures the connection if given. Without a
        port it is 443 under TLS, else Triton's own: 8001 for gRPC, 8000 for HTTP.

        Raises:
            ValueError: the address, or a scheme and options that contradict each other.
        """
        if protocol is not None and protocol not in get_args(Protocol):
            raise ValueError(f"protocol: got {protocol!r}, expected one of {', '.join(get_args(Protocol))}")
        bare = "://" not in url
        parts = urlsplit(f"{protocol or 'grpc'}{'s' if tls else ''}://{url}" if bare else url)
        if parts.scheme not in _SCHEMES:
            raise ValueError(f"url: got scheme {parts.scheme!r}, expected one of {', '.join(_SCHEMES)}")
        named, secure = _SCHEMES[parts.scheme]
        if protocol not in (None, named):
            raise ValueError(f"protocol: got {protocol!r} with url {url!r}, which says {named!r}")
        if tls is not None and not secure:
            raise ValueError(f"tls: given with url {url!r}, which is not encrypted; use {parts.scheme}s://")
        if named == "grpc" and tls is not None and tls.insecure:
            raise ValueError("tls: gRPC cannot skip verification; give the certificate as ca, or use https")
        port = parts.port or (443 if secure else _TRITON_PORT[named])
        address = _address(url, parts.netloc, parts.hostname, port)
        return cls(named, address + _path(url, named, parts.path), (tls or Tls()) if secure else None)


def _address(url: str, netloc: str, hostname: str | None, port: int) -> str:
    if not hostname or "@" in netloc:
        raise ValueError(f"url: got {url!r}, expected host[:port] or scheme://host[:port]")
    return f"[{hostname}]:{port}" if ":" in hostname else f"{hostname}:{port}"


def _path(url: str, protocol: Protocol, path: str) -> str:
    trimmed = path.rstrip("/")
    if trimmed and protocol == "grpc":
        raise ValueError(f"url: got {url!r}; a path is possible over HTTP only")
    return trimmed
