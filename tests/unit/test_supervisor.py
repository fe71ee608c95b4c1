"""The supervisor without a server: what is found, what is refused, how it is started, what is removed."""

import contextlib
import errno
import os
import resource
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fluxserve import contract, process
from fluxserve.errors import ServerError
from fluxserve.supervisor import Ports, TritonServer, server, sockets
from fluxserve.supervisor import memory as memories
from fluxserve.supervisor.installation import Installation, installed_at
from tests.support.unstarted import made

# --- one server, not started -----------------------------------------------------------------------------------------


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What stands for /dev/shm; temporary folders go beside it."""
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(server, "_SHARED_MEMORY", folder)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return folder


def test_free_ports() -> None:
    seen = [Ports.free() for _ in range(20)]
    for ports in seen:
        assert len({ports.http, ports.grpc, ports.metrics}) == 3
        assert all(1024 <= p < 32768 for p in (ports.http, ports.grpc, ports.metrics))


def test_nothing_is_left_behind(tmp_path: Path, memory: Path) -> None:
    before = set(tmp_path.iterdir())
    with made(tmp_path) as running:
        assert running.table.path.parent == memory and running.table.path.exists()
        running.launch.command()
        (memory / f"{running._prefix}region").touch()
        (memory / "somebody-elses").touch()
    assert [p.name for p in memory.iterdir()] == ["somebody-elses"]
    assert {p.name for p in set(tmp_path.iterdir()) - before} == {"backends", "stub", *contract.MODELS}
    running.stop()


def test_a_table_elsewhere_is_removed_too(tmp_path: Path, memory: Path) -> None:
    with made(tmp_path, inflight=str(tmp_path / "table")) as running:
        assert running.table.path == tmp_path / "table" and running.table.path.exists()
    assert not list(tmp_path.glob("table*"))


GONE = 2**22 + 1
"""Above the largest pid there is."""


def test_leftovers_of_the_dead_are_removed_and_of_the_living_kept(tmp_path: Path, memory: Path) -> None:
    pid, started = os.getpid(), process.started(os.getpid())
    dead = [memory / f"fluxserve-{GONE}-77-abc-inflight", memory / f"fluxserve-{pid}-{started + 1}-abc-inflight"]
    living = memory / f"fluxserve-{pid}-{started}-abc-inflight"
    for file in (*dead, living):
        file.touch()
    with made(tmp_path) as running:
        assert not any(file.exists() for file in dead), "the pid is gone, or somebody else's by now"
        assert living.exists()
        assert running.table.path.name.startswith(f"fluxserve-{pid}-{started}-"), "so it is found, should we be killed"


def test_a_foreign_name_among_the_leftovers(tmp_path: Path, memory: Path) -> None:
    (memory / "fluxserve-1st-2nd-try").touch()
    with made(tmp_path):
        pass


def test_a_leftover_of_another_user(tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (memory / f"fluxserve-{GONE}-77-abc-inflight").touch()

    def sticky(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(1, "Operation not permitted", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", sticky)
        process.remove_leftovers(memory)


class Ready(BaseHTTPRequestHandler):
    """A server that is always ready."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def ready() -> Iterator[int]:
    """The port of a server that is always ready."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Ready) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield http.server_port
        http.shutdown()


def test_ready(tmp_path: Path, memory: Path, ready: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with made(tmp_path) as running:
        running.ports = Ports(ready, 2, 3)
        assert running.is_ready() and running.is_ready("flux")
        running.ports = Ports.free()
        assert not running.is_ready()


def test_an_answer_that_does_not_come(tmp_path: Path, memory: Path) -> None:
    """As when Triton's thread is busy with loading: connected, and nothing said."""
    with socket.create_server(("127.0.0.1", 0)) as silent, made(tmp_path) as running:
        running.ports = Ports(silent.getsockname()[1], 2, 3)
        assert running.readiness("flux", 0.05) is None


def test_an_answer_that_is_no_http(tmp_path: Path, memory: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, made(tmp_path) as running:
        running.ports = Ports(other.getsockname()[1], 2, 3)

        def answer() -> None:
            with other.accept()[0] as connection:
                connection.recv(1000)
                connection.sendall(b"220 mail.example.com ESMTP\r\n")

        threading.Thread(target=answer, daemon=True).start()
        assert running.readiness(None, 5) is None


def test_an_answer_that_says_no(tmp_path: Path, memory: Path, ready: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Ready, "do_GET", lambda self: self.send_error(400))
    with made(tmp_path) as running:
        running.ports = Ports(ready, 2, 3)
        assert running.readiness("flux", 5) is False and not running.is_ready("flux")


def test_a_proxy_is_not_asked(tmp_path: Path, memory: Path, ready: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "_opener", None)  # urlopen keeps the one that it made first
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{Ports.free().http}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with made(tmp_path) as running:
        running.ports = Ports(ready, 2, 3)
        assert running.is_ready()


def test_what_is_not_there(tmp_path: Path, memory: Path) -> None:
    with pytest.raises(ServerError, match="none: no such file"):
        installed_at(tmp_path / "none")
    assert installed_at(Path(sys.executable)) == Installation(Path(sys.executable))
    with made(tmp_path) as running:
        running.repository = tmp_path / "nowhere"
        with pytest.raises(ServerError, match="nowhere: no such folder"):
            running.start()


@pytest.mark.parametrize(
    ("address", "host"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("localhost", "127.0.0.1")]
)
def test_urls(tmp_path: Path, memory: Path, address: str, host: str) -> None:
    with TritonServer(tmp_path, Ports(1, 2, 3), Installation(tmp_path), address=address) as running:
        urls = running.http_url, running.grpc_url, running.metrics_url
        assert urls == (f"{host}:1", f"{host}:2", f"http://{host}:3/metrics")


NO_ADDRESS = ("", " ", "box.invalid", "256.1.1.1", "192.0.2.1", "255.255.255.255", "224.0.0.1", "fe80::1%lo", "::1%lo")


@pytest.mark.parametrize("address", [*NO_ADDRESS, "[::1]", "127.0.0.1:80", "http://127.0.0.1", "2001:db8::1", "a" * 70])
def test_an_address_that_cannot_work_is_refused(tmp_path: Path, memory: Path, address: str) -> None:
    with pytest.raises(ServerError) as refused:
        TritonServer(tmp_path, Ports(1, 2, 3), Installation(tmp_path), address=address)
    said = str(refused.value)
    assert said.startswith(f"--address: got {address!r}; expected an IP address of this machine") and "\n" not in said
    assert list(memory.iterdir()) == [], "before anything is made"


def test_an_address_in_ipv6(tmp_path: Path, memory: Path) -> None:
    if not socket.has_ipv6 or not Path("/proc/net/if_inet6").exists():
        pytest.skip("no IPv6")
    with made(tmp_path) as running:
        running._address = "::1"
        command = replace(running.launch, address="::1").command()
        assert {"--http-address=ipv6:::1", "--grpc-address=[::1]", "--metrics-address=ipv6:::1"} < set(command)
        assert running.grpc_url == "[::1]:2"
    assert [sockets.resolved(address) for address in ("::1", "0:0::1", "::", "127.1")] == [
        "::1",
        "::1",
        "::",
        "127.0.0.1",
    ]


def test_a_port_given_twice() -> None:
    with pytest.raises(
        ServerError, match=r"--http-port 80, --grpc-port 80, --metrics-port 3; expected a different one"
    ):
        Ports(80, 80, 3).refuse_taken("127.0.0.1")


def test_who_has_a_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        who = rf"--grpc-port: 127.0.0.1:{port} can't be had \(Address already in use; .*, process {os.getpid()}\)"
        with pytest.raises(ServerError, match=who):
            Ports(Ports.free().http, port, 1023).refuse_taken("127.0.0.1")


def test_a_port_of_roots(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> socket.socket:
        raise PermissionError(errno.EACCES, "Permission denied (while attempting to bind)")

    monkeypatch.setattr(socket, "create_server", refused)
    with pytest.raises(ServerError, match=r"--http-port: 127.0.0.1:80 can't be had \(Permission denied\)$"):
        Ports(80, 2, 3).refuse_taken("127.0.0.1")


def test_a_server_that_ends_before_it_is_ready(tmp_path: Path, memory: Path) -> None:
    script = tmp_path / "none"
    script.write_text("#!/bin/sh\necho no room; exit 3\n")
    script.chmod(0o700)
    with made(tmp_path) as running:
        running.start()
        with pytest.raises(ServerError, match=r"ended with status 3 before it was ready: no room$"):
            running.wait_ready(20)


def test_a_server_that_never_gets_ready(tmp_path: Path, memory: Path) -> None:
    script = tmp_path / "none"
    script.write_text("#!/bin/sh\necho loading\nexec sleep 60\n")
    script.chmod(0o700)
    with made(tmp_path) as running:
        running.start()
        waited = r"prepare, generate, control did not load; its last words: loading$"
        with pytest.raises(ServerError, match=f"not ready within 1 s: {waited}"):
            running.wait_ready(1)
        assert running.wait_ready(5, stopping=lambda: True) < 1
    assert running.exit_status() is not None, "stopped on the way out"


def test_sizes() -> None:
    assert [memories.parse(t) for t in ("0", "67108864", "100M", "2g")] == [0, 64 << 20, 100 << 20, 2 << 30]
    for text in ("", "x", "1.5G", "-1", "10", "1M", "5P"):
        with pytest.raises(ValueError, match="expected"):
            memories.parse(text)


def test_the_limit_of_a_control_group(tmp_path: Path) -> None:
    assert memories.default_limit(tmp_path) == 0
    (tmp_path / "memory.max").write_text("max\n")
    assert memories.default_limit(tmp_path) == 0
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert memories.default_limit(tmp_path) == 0
    (tmp_path / "memory.max").write_text("1000\n")
    assert memories.default_limit(tmp_path) == 850


def test_what_a_session_holds(tmp_path: Path) -> None:
    """A process that fills memory, and a file in shared memory; another session's is not counted."""
    script = "import sys; x = bytearray(b'x') * (64 << 20); print('full', flush=True); sys.stdin.read()"
    (region := tmp_path / "region").write_bytes(bytes(8 << 20))
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as filled:
        assert filled.stdout is not None and filled.stdout.readline() == b"full\n"
        held = memories.held(filled.pid, [region, tmp_path / "gone"])
        assert 72 << 20 <= held < 200 << 20
        limit = memories.bound(filled.pid, 1 << 20)
        assert resource.prlimit(filled.pid, resource.RLIMIT_DATA) == (limit, limit)
    assert memories.held(filled.pid, []) == 0
    memories.bound(filled.pid)  # it is gone: no error


def test_bytes_that_nobody_takes() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        ports = Ports(listening.getsockname()[1], 1, 2)
        with socket.create_connection(listening.getsockname()), listening.accept()[0] as answering:
            assert ports.unsent() == 0
            answering.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    answering.send(bytes(1 << 20))
            assert ports.unsent() > 0
