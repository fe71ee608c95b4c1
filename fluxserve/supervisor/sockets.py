"""Ports of a server: free ones, taken ones, and answers that still lie in their sockets."""

import contextlib
import random
import socket
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

from fluxserve.errors import ServerError

LOOPBACK = "127.0.0.1"
_UNASSIGNED = range(10_000, 32_768)
"""Linux gives outgoing connections ports from 32768 on."""


@dataclass(frozen=True)
class Ports:
    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002

    @staticmethod
    def free() -> "Ports":
        """Three ports that nobody listens on just now, below those that outgoing connections get: a server that is
        started again finds them free once more."""
        while True:
            ports = Ports(*random.sample(_UNASSIGNED, 3))
            with contextlib.suppress(ServerError):
                ports.refuse_taken(LOOPBACK)
                return ports

    def refuse_taken(self, address: str) -> None:
        """Raise ServerError for a port that can't be listened on: another server's answers would pass for ours."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        for name in ("http", "grpc", "metrics"):
            port = getattr(self, name)
            try:
                socket.create_server((address, port), family=family).close()
            except OSError as error:
                raise ServerError(f"--{name}-port: {address}:{port} can't be had ({error.strerror})") from error

    def unsent(self) -> int:
        """Bytes that the server has written to connections of these ports and that no client has acknowledged."""
        ours = set(astuple(self))
        return sum(size for port, size in _send_queues() if port in ours)


def _send_queues() -> Iterator[tuple[int, int]]:
    """Local port and bytes in the send queue of every TCP socket that is connected."""
    established = "01"
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in table.read_text(encoding="ascii").splitlines()[1:] if table.exists() else ():
            _, local, _, state, queues, *_ = line.split()
            if state == established:
                yield int(local.rpartition(":")[2], 16), int(queues.partition(":")[0], 16)
