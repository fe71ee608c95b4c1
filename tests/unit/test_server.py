"""server.py as far as it goes without a server: what is found, what is refused, how it is started, what is removed."""

import os
import socket
import sys
import sysconfig
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from fluxserve import installation, process, server
from fluxserve.errors import ServerError
from fluxserve.installation import Installation, bundled, installed_at
from fluxserve.server import Ports, TritonServer

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
LIBRARY = f"libpython{VERSION}.so.1.0"


def test_free_ports() -> None:
    seen = [Ports.free() for _ in range(20)]
    for ports in seen:
        assert len({ports.http, ports.grpc, ports.metrics}) == 3
        assert all(1024 <= p < 65536 for p in (ports.http, ports.grpc, ports.metrics))


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The layout of nvidia-pytriton as far as `bundled` looks at it."""
    stub = tmp_path / "pytriton" / "tritonserver" / "python_backend_stubs" / VERSION / "triton_python_backend_stub"
    stub.parent.mkdir(parents=True)
    stub.touch()
    (tmp_path / "pytriton" / "__init__.py").touch()
    (tmp_path / LIBRARY).touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pytriton", raising=False)
    monkeypatch.setattr(np, "__version__", "1.26.4")
    settle(monkeypatch, LIBDIR=str(tmp_path))
    return tmp_path / "pytriton"


def settle(monkeypatch: pytest.MonkeyPatch, **variables: str | None) -> None:
    real = sysconfig.get_config_var
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: variables[name] if name in variables else real(name))


def test_bundled(wheel: Path) -> None:
    found = bundled()
    assert found.binary == wheel / "tritonserver" / "bin" / "tritonserver"
    assert found.backends == wheel / "tritonserver" / "backends"
    assert found.libraries == (wheel.parent / "nvidia_pytriton.libs",)
    assert found.libpython == wheel.parent / LIBRARY
    assert found.stub is not None and found.stub.is_file()


@pytest.mark.parametrize("version", ["2.0.0", "2.4.1", "10.0"])
def test_a_newer_numpy_is_refused(wheel: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(np, "__version__", version)
    with pytest.raises(ServerError, match=f"numpy {version}: .* install numpy<2"):
        bundled()


def test_no_stub_for_this_python(wheel: Path) -> None:
    stubs = wheel / "tritonserver" / "python_backend_stubs"
    (stubs / VERSION).rename(stubs / "3.7")
    with pytest.raises(ServerError, match=f"no stub for Python {VERSION}; it has 3.7"):
        bundled()


def test_no_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ServerError, match=r"pip install 'fluxserve\[server\]'"):
        bundled()


def test_no_libpython(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for libdir in (str(tmp_path), None):
        settle(monkeypatch, LIBDIR=libdir, MULTIARCH=None)
        with pytest.raises(ServerError, match=r"libpython2\.0\.so\.1\.0 not found; .* package libpython2\.0"):
            installation._libpython("2.0")
    (tmp_path / "libpython2.0.so.1.0").touch()
    settle(monkeypatch, LIBDIR=str(tmp_path), MULTIARCH=None)
    assert installation._libpython("2.0") == tmp_path / "libpython2.0.so.1.0"


# --- one server, not started -----------------------------------------------------------------------------------------


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What stands for /dev/shm; temporary folders go beside it."""
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(server, "_SHARED_MEMORY", folder)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return folder


def made(tmp_path: Path, **options: str) -> TritonServer:
    backends = tmp_path / "backends"
    (backends / "python" / "folder").mkdir(parents=True, exist_ok=True)
    (backends / "python" / "libtriton_python.so").touch()
    (tmp_path / "stub").touch()
    folders, libpython = (Path("/one"), Path("/two")), Path("/lib/libpython.so")
    installation = Installation(tmp_path / "none", backends, folders, libpython, tmp_path / "stub")
    return TritonServer(tmp_path, Ports(1, 2, 3), installation, options=options)


def test_nothing_is_left_behind(tmp_path: Path, memory: Path) -> None:
    before = set(tmp_path.iterdir())
    with made(tmp_path) as running:
        assert running.table.path.parent == memory and running.table.path.exists()
        running._backends()
        (memory / f"{running._prefix}region").touch()
        (memory / "somebody-elses").touch()
    assert [p.name for p in memory.iterdir()] == ["somebody-elses"]
    assert {p.name for p in set(tmp_path.iterdir()) - before} == {"backends", "stub"}
    running.stop()


def test_a_table_elsewhere_is_removed_too(tmp_path: Path, memory: Path) -> None:
    with made(tmp_path, inflight=str(tmp_path / "table")) as running:
        assert running.table.path == tmp_path / "table" and running.table.path.exists()
    assert not (tmp_path / "table").exists()


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


def test_the_command(tmp_path: Path, memory: Path) -> None:
    with made(tmp_path) as running:
        command = running._command()
        assert command[0] == str(tmp_path / "none")
        assert {"--http-port=1", "--grpc-port=2", "--metrics-port=3"} < set(command)
        assert {f"--{p}-address=127.0.0.1" for p in ("http", "grpc", "metrics")} < set(command)
        (restricted,) = (c for c in command if c.startswith("--http-restricted-api="))
        assert "model-repository" in restricted and running._key in restricted and len(running._key) == 32
        linked = running._home / "backends" / "python"
        assert {p.name for p in linked.iterdir()} == {"libtriton_python.so", "triton_python_backend_stub"}
        assert (linked / "triton_python_backend_stub").resolve() == tmp_path / "stub"


def test_the_environment(tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/mine")
    with made(tmp_path, engine="other") as running:
        env = running._environment()
        assert env["FLUXSERVE_ENGINE"] == "other"
        assert env["FLUXSERVE_INFLIGHT"] == str(running.table.path)
        *given, own, mine = env["LD_LIBRARY_PATH"].split(":")
        assert given == ["/one", "/two"] and mine == "/mine"
        (libpython,) = Path(own).iterdir()  # alone: what stands beside it would go before PyTorch's own libraries
        assert libpython.readlink() == Path("/lib/libpython.so")
        assert running._environment() == env, "a server that is started again"
        assert env["HF_HUB_OFFLINE"] == env["TRANSFORMERS_OFFLINE"] == "1"
        assert str(Path(server.__file__).parents[1]) in env["PYTHONPATH"].split(":")
    assert os.environ["LD_LIBRARY_PATH"] == "/mine"


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
    ("address", "host"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::1", "[::1]"), ("box", "box")]
)
def test_urls(tmp_path: Path, memory: Path, address: str, host: str) -> None:
    with TritonServer(tmp_path, Ports(1, 2, 3), Installation(tmp_path), address=address) as running:
        urls = running.http_url, running.grpc_url, running.metrics_url
        assert urls == (f"{host}:1", f"{host}:2", f"http://{host}:3/metrics")


def test_a_server_that_ends_before_it_is_ready(tmp_path: Path, memory: Path) -> None:
    script = tmp_path / "none"
    script.write_text("#!/bin/sh\nexit 3\n")
    script.chmod(0o700)
    with made(tmp_path) as running:
        running.start()
        with pytest.raises(ServerError, match="ended with status 3 before it was ready"):
            running.wait_ready(20)


def test_a_server_that_never_gets_ready(tmp_path: Path, memory: Path) -> None:
    script = tmp_path / "none"
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    script.chmod(0o700)
    with made(tmp_path) as running:
        running.start()
        with pytest.raises(ServerError, match="not ready within 0 s"):
            running.wait_ready(0.2)
        assert running.wait_ready(5, stopping=lambda: True) < 1
    assert running.exit_status() is not None, "stopped on the way out"
