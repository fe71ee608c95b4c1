"""Run the gateway: the fleet from its addresses, logs as JSON lines, uvicorn with TLS and trusted proxies."""

from __future__ import annotations

import ipaddress
import logging
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from fluxserve_client import AsyncClient, Tls

from fluxserve_gateway.app import create_app
from fluxserve_gateway.config import Config
from fluxserve_gateway.fleet import Fleet, Server
from fluxserve_gateway.jobs.settings import JobSettings
from fluxserve_gateway.keys import Keys
from fluxserve_gateway.log import Lines
from fluxserve_gateway.spans import Tracer

_DRAIN_S = 120
_MAX_PORT = 65535


@dataclass(frozen=True)
class Listening:
    """Says where callers reach the gateway.

    Attributes:
        host, port: the address; port 0 takes a free one.
        certificate, key: PEM files for TLS; both or neither.
        proxies: addresses, or networks, whose X-Forwarded-For and -Proto are believed.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    certificate: Path | None = None
    key: Path | None = None
    proxies: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("tls-cert, tls-key: got one of them, expected both or neither")
        if not 0 <= self.port <= _MAX_PORT:
            raise ValueError(f"port: got {self.port}; allowed: 0 to {_MAX_PORT}")
        for proxy in self.proxies:
            ipaddress.ip_network(proxy)  # raises ValueError: a name, or "*", is no address

    @property
    def is_loopback(self) -> bool:
        """Tell whether only this machine's programs reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def fleet_of(named: Sequence[str], ca: Path | None = None, tracer: Tracer | None = None) -> Fleet:
    """Make the fleet of "MODEL=URL" pairs; a URL that is there twice is one server.

    Args:
        named: the pairs.
        ca: a PEM file of the authorities to trust; a bare HOST[:PORT] is then reached over TLS.
        tracer: makes the gateway's spans; None makes none.

    Raises:
        ValueError: a pair, or an address, that cannot be read; a `ca` that no server needs.
        OSError: a certificate that cannot be read.
    """
    servers: dict[str, Server] = {}
    models: dict[str, list[Server]] = {}
    secured = False
    for pair in named:
        model, equals, url = pair.partition("=")
        if not (model and equals and url):
            raise ValueError(f"server: got {pair!r}, expected MODEL=URL, e.g. flux.1-dev=grpc://localhost:8001")
        plain = url.lower().startswith(("grpc://", "http://"))
        secured |= not plain
        if url not in servers:
            servers[url] = Server(url, AsyncClient(url, tls=Tls(ca=ca) if ca and not plain else None))
        if servers[url] not in models.setdefault(model, []):
            models[model].append(servers[url])
    if ca and servers and not secured:
        raise ValueError(f"server-ca: got {ca} and no server behind TLS, expected HOST[:PORT], grpcs:// or https://")
    return Fleet(models, tracer)


def run(
    fleet: Fleet,
    config: Config,
    keys: Keys | None,
    listening: Listening,
    *,
    jobs: JobSettings | None = None,
    page: bool = False,
    quiet: bool = False,
) -> None:
    """Serve until SIGTERM or Ctrl-C; what runs then is finished, within two minutes.

    Raises:
        ValueError: no keys on an address that other machines reach; a page without Gradio.
        OSError: the address is in use, or is not this machine's.
    """
    if keys is None and not listening.is_loopback:
        raise ValueError(f"no-auth: got host {listening.host}, expected a loopback address, e.g. 127.0.0.1")
    config = replace(config, https=listening.certificate is not None)
    app = create_app(fleet, config=config, keys=keys, jobs=jobs, page=page)
    lines = Lines(sys.stdout.fileno())
    logging.basicConfig(level=logging.WARNING if quiet else logging.INFO, handlers=[lines], force=True)
    server = http_server(app, listening, config.send_timeout)
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises the signal again once it has drained
        signal.signal(number, lambda *_: None)
    try:
        server.run()
    except SystemExit as ended:
        raise OSError(f"nothing serves {listening.host}, port {listening.port}; the log says why") from ended
    finally:
        lines.close()


def http_server(app: FastAPI, listening: Listening, send_timeout: float, drain_s: int = _DRAIN_S) -> uvicorn.Server:
    """Make the HTTP server of a gateway.

    Args:
        app: the application.
        listening: the address.
        send_timeout: seconds after which a connection whose peer reads nothing is ended.
        drain_s: seconds for which running requests are waited for at the end.
    """
    return _Server(
        uvicorn.Config(
            app,
            host=listening.host,
            port=listening.port,
            ssl_certfile=listening.certificate,
            ssl_keyfile=listening.key,
            proxy_headers=bool(listening.proxies),
            forwarded_allow_ips=list(listening.proxies),
            server_header=False,
            access_log=False,  # `Border` writes ours
            log_config=None,
            timeout_graceful_shutdown=drain_s,
            http="h11",
            ws="none",
        ),
        send_timeout,
    )


class _Server(uvicorn.Server):
    """Ends the connection of a caller who reads nothing, and so frees the answer that was for him."""

    def __init__(self, config: uvicorn.Config, send_timeout: float) -> None:
        super().__init__(config)
        self._send_timeout = send_timeout

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in (each for server in self.servers for each in server.sockets):
            # Accepted connections inherit it. Without it the kernel probes a full window for ever, while the rest of
            # an answer that the application has handed over stays in this process.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * self._send_timeout))
