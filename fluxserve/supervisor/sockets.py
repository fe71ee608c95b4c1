"""Addresses and ports of a server: free ones, taken ones, and answers that still lie in their sockets."""

import contextlib
import errno
import os
import random
import socket
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

from fluxserve.errors import ServerError

LOOPBACK = "127.0.0.1"
_REACH_S = 2.0
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
        ports = asdict(self)
        if len(set(ports.values())) < len(ports):
            got = ", ".join(f"--{name}-port {port}" for name, port in ports.items())
            raise ServerError(f"ports: got {got}; expected a different one for each")
        for name, port in ports.items():
            try:
                _listen(address, port).close()
            except OSError as error:
                why = f"{_words(error)}{_holders(port) if error.errno == errno.EADDRINUSE else ''}"
                raise ServerError(f"--{name}-port: {address}:{port} can't be had ({why})") from error

    def unsent(self) -> int:
        """Bytes that the server has written to connections of these ports and that no client has acknowledged."""
        ours, established = set(astuple(self)), "01"
        connected = ((_port(local), queues) for local, state, queues in _sockets(1, 3, 4) if state == established)
        return sum(int(queues.partition(":")[0], 16) for port, queues in connected if port in ours)


def resolved(address: str) -> str:
    """The IP address that a name stands for, IPv4 if it has one; an IP address in its usual form.

    Triton's HTTP takes no names: with one it listens on 255.255.255.255.

    Raises:
        ServerError: no address, one with a scope, or one that this machine can't be reached by.
    """
    expected = "expected an IP address of this machine without a scope, or a name that has one"
    if not address or "%" in address:
        raise ServerError(f"--address: got {address!r}; {expected}")
    try:
        found = {family: str(place[0]) for family, *_, place in socket.getaddrinfo(address, None)}
    except (OSError, UnicodeError) as error:
        raise ServerError(f"--address: got {address!r}; {expected} ({_words(error)})") from error
    ip = found.get(socket.AF_INET) or found[socket.AF_INET6]
    try:
        with _listen(ip, 0) as listening, socket.socket(listening.family) as other:
            other.settimeout(_REACH_S)
            other.connect((reached(ip), listening.getsockname()[1]))
    except OSError as error:
        what = repr(address) if address == ip else f"{address!r}, which is {ip}"
        raise ServerError(f"--address: got {what}; {expected} ({_words(error)})") from error
    return ip


def _words(error: Exception) -> str:
    """The system's words, without what Python adds; a resolver's errors have numbers of their own."""
    if isinstance(error, OSError) and not isinstance(error, socket.gaierror) and error.errno:
        return os.strerror(error.errno)
    return (isinstance(error, OSError) and error.strerror) or str(error)


def reached(ip: str) -> str:
    """Where this machine reaches a server: loopback, if it listens everywhere."""
    return {"0.0.0.0": LOOPBACK, "::": "::1"}.get(ip, ip)  # noqa: S104 (compared, not bound)


def _listen(ip: str, port: int) -> socket.socket:
    return socket.create_server((ip, port), family=socket.AF_INET6 if ":" in ip else socket.AF_INET)


def _holders(port: int) -> str:
    """Which processes listen on a port, as far as this user may see."""
    listens, inode = "0A", 9
    table = ((_port(local), state, number) for local, state, number in _sockets(1, 3, inode))
    ours = {f"socket:[{number}]" for at, state, number in table if (at, state) == (port, listens)}
    found = sorted({file.parts[2] for file in Path("/proc").glob("[0-9]*/fd/*") if _target(file) in ours})
    named = [f"{Path('/proc', pid, 'comm').read_text(errors='replace').strip()}, process {pid}" for pid in found]
    return f"; {' and '.join(named)}" if named else ""


def _target(file: Path) -> str:
    with contextlib.suppress(OSError):  # closed meanwhile, or another user's
        return str(file.readlink())
    return ""


def _port(address: str) -> int:
    return int(address.rpartition(":")[2], 16)


def _sockets(*columns: int) -> Iterator[tuple[str, ...]]:
    """Columns of the kernel's tables of TCP sockets."""
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in table.read_text(encoding="ascii").splitlines()[1:] if table.exists() else ():
            fields = line.split()
            yield tuple(fields[column] for column in columns)
