"""docker/nginx.conf in nginx: which requests reach the server behind it, and which do not."""

import http.client
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fluxserve.families.flux.models import FLUX1_DEV
from tests.support import programs
from tests.support.bodies import MIB, largest_mib

CONFIGURATION = Path(__file__).parents[2] / "docker" / "nginx.conf"

INFER = "/v2/models/flux/infer"
LENGTH = "Inference-Header-Content-Length"


@dataclass
class Proxy:
    """Requests to nginx, and those that came through: path, headers by name, bytes of the body."""

    port: int
    passed: list[tuple[str, list[tuple[str, str]], int]] = field(default_factory=list)

    def ask(self, method: str, path: str, headers: tuple[tuple[str, str], ...] = (), body: bytes = b"{}") -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.putrequest(method, path)
        for name, value in (*headers, ("Content-Length", str(len(body)))):
            connection.putheader(name, value)
        connection.endheaders(body)
        try:
            return connection.getresponse().status
        finally:
            connection.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    nginx, proxy = programs.needed("nginx"), Proxy(free_port())

    class Server(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            proxy.passed.append((self.path, self.headers.items(), len(body)))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            pass

    folder = tmp_path_factory.mktemp("nginx")
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as upstream:
        threading.Thread(target=upstream.serve_forever, daemon=True).start()
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        temporary = "".join(f"{kind}_temp_path {folder}/{kind}; " for kind in kinds)
        text = CONFIGURATION.read_text(encoding="utf-8")
        text = text.replace("127.0.0.1:8000", f"127.0.0.1:{upstream.server_address[1]}")
        text = text.replace("127.0.0.1:8080", f"127.0.0.1:{proxy.port}").replace(
            "access_log off;", f"access_log off; {temporary}"
        )
        file = folder / "nginx.conf"
        user = "user root;" if os.geteuid() == 0 else ""  # whose the folder is
        file.write_text(f"daemon off; {user} pid {folder}/pid; error_log {folder}/log;\n{text}", encoding="utf-8")
        process = subprocess.Popen([nginx, "-p", str(folder), "-e", str(folder / "log"), "-c", str(file)])
        try:
            for _ in range(100):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", proxy.port)) == 0:
                        break
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.05)
            yield proxy
        finally:
            process.terminate()
            process.wait(10)
            upstream.shutdown()


@pytest.fixture
def proxy(running: Proxy) -> Proxy:
    running.passed.clear()
    return running


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", INFER),
        ("POST", "/v2/models/control/infer"),
        *(
            ("GET", f"/v2/{path}")
            for path in ("health/ready", "health/live", "models/flux/ready", "models/control/ready")
        ),
    ],
)
def test_what_clients_need_passes(proxy: Proxy, method: str, path: str) -> None:
    assert proxy.ask(method, path) == 200
    assert [passed[0] for passed in proxy.passed] == [path]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/v2/models/prepare/infer", 404),
        ("POST", "/v2/models/generate/infer", 404),
        ("POST", "/v2/models/flux/versions/1/infer", 404),
        ("POST", "/v2/repository/index", 404),
        ("POST", "/v2/repository/models/generate/unload", 404),
        ("POST", "/v2/systemsharedmemory/region/x/register", 404),
        ("POST", "/v2/logging", 404),
        ("GET", "/metrics", 404),
        ("GET", "/v2/models/stats", 404),
        ("GET", INFER, 403),
        ("POST", "/v2/models/flux/infer/", 404),
        ("POST", "/v2/models/flux%00/infer", 400),
    ],
)
def test_nothing_else_does(proxy: Proxy, method: str, path: str, status: int) -> None:
    assert proxy.ask(method, path) == status
    assert proxy.passed == []


@pytest.mark.parametrize("path", ["/v2/models/x/../flux/infer", "/v2//models/flux/infer", "/v2/models/%66lux/infer"])
def test_paths_are_never_as_a_client_spells_them(proxy: Proxy, path: str) -> None:
    assert proxy.ask("POST", path) == 200
    assert [passed[0] for passed in proxy.passed] == [INFER]


@pytest.mark.parametrize("value", ["2147483648", "99999999999999999999", "-1", "x", "1e9", "0x10", "12345678"])
def test_the_header_that_ends_triton_does_not_pass(proxy: Proxy, value: str) -> None:
    assert proxy.ask("POST", INFER, ((LENGTH, value),)) == 400
    assert proxy.passed == []


def test_a_good_header_passes(proxy: Proxy) -> None:
    assert proxy.ask("POST", INFER, ((LENGTH, "2"),)) == 200
    assert (LENGTH, "2") in proxy.passed[0][1]


def test_of_two_headers_only_the_one_that_was_judged_passes(proxy: Proxy) -> None:
    """nginx before 1.23 judges the first of them, a newer one both."""
    status = proxy.ask("POST", INFER, ((LENGTH, "2"), (LENGTH, "2147483648")))
    assert status in (200, 400)
    values = [value for passed in proxy.passed for name, value in passed[1] if name == LENGTH]
    assert values == (["2"] if status == 200 else [])


def test_bodies(proxy: Proxy) -> None:
    most = largest_mib(FLUX1_DEV) * MIB
    assert proxy.ask("POST", INFER, body=bytes(most)) == 200
    assert proxy.passed[0][2] == most
    assert proxy.ask("POST", INFER, body=bytes(most + 1)) == 413
    assert proxy.ask("POST", INFER, (("Content-Encoding", "gzip"),)) == 415
    assert len(proxy.passed) == 1
