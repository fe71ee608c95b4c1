"""Where the server is, and how the connection is secured."""

from __future__ import annotations

import ipaddress
import os
import re
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import SplitResult, urlsplit

Protocol = Literal["grpc", "http"]

_SCHEMES: dict[str, tuple[Protocol, bool]] = {
    "grpc": ("grpc", False),
    "grpcs": ("grpc", True),
    "http": ("http", False),
    "https": ("http", True),
}
# What is said over a scheme when the other side expects something else, and what to ask then. The first that fits.
_MISTAKEN = (
    ("grpcs|https", r"wrong.version.number|handshake read failed|ssl:default \[None\]", "is that a port without TLS?"),
    (
        "grpc",
        r"parsing HTTP/2|expected SETTINGS frame|failed to connect.*socket closed",
        "is that the HTTP port, or one with TLS? Triton's port for gRPC is 8001",
    ),
    ("http", r"not HTTP/1\.1", "is that the gRPC port, or one with TLS? Triton's port for HTTP is 8000"),
    ("grpcs?", r"too many pings", "the server allows fewer: see `keepalive`"),
)
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
        """The same as an SSL context. Raises `OSError` or `ValueError`, with the file's name, if one cannot be used."""
        files = [file for file in (self.ca, self.cert, self.key) if file is not None]
        for file in files:
            Path(file).read_bytes()  # ssl's own error has no name
        try:
            context = ssl.create_default_context(cafile=self.ca)
            if self.cert is not None:
                context.load_cert_chain(self.cert, self.key)
        except ssl.SSLError as error:
            names = ", ".join(map(str, files))
            raise ValueError(f"tls: got {names}, expected PEM files of certificates and their key ({error})") from error
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
        parts = _split(url, f"{protocol or 'grpc'}{'s' if tls else ''}://{url}" if bare else url)
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

    @property
    def is_loopback(self) -> bool:
        """Whether the server is on this machine, where no proxy has a part."""
        host = urlsplit(f"//{self.address}").hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:  # a name
            return host == "localhost" or host.endswith(".localhost")

    def explain(self, message: str) -> str:
        """Add to the words of a broken connection what they usually mean."""
        scheme = f"{self.protocol}s" if self.tls else self.protocol
        for schemes, words, question in _MISTAKEN:
            if re.fullmatch(schemes, scheme) and re.search(words, message, re.IGNORECASE | re.DOTALL):
                return f"{message}; {question}"
        return message


def _split(url: str, full: str) -> SplitResult:
    try:
        parts = urlsplit(full)
        _ = parts.port  # checked when it is read
    except ValueError as error:
        raise ValueError(f"url: got {url!r}, expected host[:port] or scheme://host[:port] ({error})") from error
    return parts


def _address(url: str, netloc: str, hostname: str | None, port: int) -> str:
    if not hostname or "@" in netloc:
        raise ValueError(f"url: got {url!r}, expected host[:port] or scheme://host[:port]")
    return f"[{hostname}]:{port}" if ":" in hostname else f"{hostname}:{port}"


def _path(url: str, protocol: Protocol, path: str) -> str:
    trimmed = path.rstrip("/")
    if trimmed and protocol == "grpc":
        raise ValueError(f"url: got {url!r}; a path is possible over HTTP only")
    return trimmed
