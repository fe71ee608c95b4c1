"""The supervisor without a server: what is found, what is refused, how it is started, what is removed."""

import contextlib
import errno
import os
import resource
import shutil
import socket
import subprocess
import sys
import sysconfig
import threading
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from fluxserve import contract, process, supervisor
from fluxserve.errors import ServerError
from fluxserve.supervisor import Ports, TritonServer, arguments, installation, server, sockets
from fluxserve.supervisor import memory as memories
from fluxserve.supervisor.installation import Installation, bundled, installed_at

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
LIBRARY = f"libpython{VERSION}.so.1.0"


def test_free_ports() -> None:
    seen = [Ports.free() for _ in range(20)]
    for ports in seen:
        assert len({ports.http, ports.grpc, ports.metrics}) == 3
        assert all(1024 <= p < 32768 for p in (ports.http, ports.grpc, ports.metrics))


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
    for name in contract.MODELS:
        (tmp_path / name / "1").mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "config.pbtxt").write_text("ensemble_scheduling")
        (tmp_path / name / "1" / "model.py").write_text("import fluxserve.serving")
    folders, libpython = (Path("/one"), Path("/two")), Path("/lib/libpython.so")
    installation = Installation(tmp_path / "none", backends, folders, libpython, tmp_path / "stub")
    return TritonServer(tmp_path, Ports(1, 2, 3), installation, options=options)


def test_the_queues_timeout_is_written_where_triton_reads_it(tmp_path: Path, memory: Path) -> None:
    shipped = (Path(__file__).parents[2] / "model_repository" / "generate" / "config.pbtxt").read_text()
    with made(tmp_path, queue_timeout="7") as running:
        (tmp_path / "generate" / "config.pbtxt").write_text(shipped)
        running.launch.command()
        folder = running.launch.home / "model_repository" / "generate"
        config = text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
        assert config.dynamic_batching.default_queue_policy.default_timeout_microseconds == 7_000_000
        assert (folder / "1" / "model.py").read_text() == "import fluxserve.serving"
        (tmp_path / "generate" / "config.pbtxt").write_text("nothing of the kind")
        with pytest.raises(ServerError, match="got 0 lines `default_timeout_microseconds: "):
            running.launch.command()
    assert (tmp_path / "generate" / "config.pbtxt").read_text() == "nothing of the kind", "the user's own is read only"


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


def test_the_command(tmp_path: Path, memory: Path) -> None:
    with made(tmp_path) as running:
        command = running.launch.command()
        assert command[0] == str(tmp_path / "none")
        assert {"--http-port=1", "--grpc-port=2", "--metrics-port=3"} < set(command)
        assert {f"--{p}-address=127.0.0.1" for p in ("http", "grpc", "metrics")} < set(command)
        assert "--model-control-mode=none" in command
        shut = "model-repository,shared-memory,trace,logging:fluxserve: NO HEADER HAS THIS NAME=shut"
        assert {f"--http-restricted-api={shut}", f"--grpc-restricted-protocol={shut}"} < set(command)
        models = running._home / "model_repository"
        assert {p.name for p in models.iterdir()} == set(contract.MODELS), "not what else lies in the folder"
        linked = running._home / "backends" / "python"
        assert {p.name for p in linked.iterdir()} == {"libtriton_python.so", "triton_python_backend_stub"}
        assert (linked / "triton_python_backend_stub").resolve() == tmp_path / "stub"


def test_the_environment(tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/mine")
    with made(tmp_path, engine="other") as running:
        env = running.launch.environment()
        assert env["FLUXSERVE_ENGINE"] == "other"
        assert env["FLUXSERVE_INFLIGHT"] == str(running.table.path)
        *given, own, mine = env["LD_LIBRARY_PATH"].split(":")
        assert given == ["/one", "/two"] and mine == "/mine"
        (libpython,) = Path(own).iterdir()  # alone: what stands beside it would go before PyTorch's own libraries
        assert libpython.readlink() == Path("/lib/libpython.so")
        assert running.launch.environment() == env, "a server that is started again"
        assert env["HF_HUB_OFFLINE"] == env["TRANSFORMERS_OFFLINE"] == "1"
        assert str(Path(supervisor.__file__).parents[2]) in env["PYTHONPATH"].split(":")
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


def no_config(model: Path) -> str:
    (model / "config.pbtxt").unlink()
    return "generate/config.pbtxt: No such file or directory"


def dangling(model: Path) -> str:
    shutil.rmtree(model)
    model.symlink_to("nowhere")
    return "generate/config.pbtxt: No such file or directory"


def no_version(model: Path) -> str:
    (model / "1" / "model.py").rename(model / "model.py")
    return "generate/1/model.py: No such file or directory"


def a_file(model: Path) -> str:
    shutil.rmtree(model)
    model.touch()
    return "generate/config.pbtxt: Not a directory"


def somebody_elses(model: Path) -> str:
    (model / "1" / "model.py").write_text("import vllm")
    return "generate/1/model.py: another model's"


def endless(model: Path) -> str:
    shutil.rmtree(model)
    model.symlink_to(model)
    return "generate/config.pbtxt: Too many levels of symbolic links"


@pytest.mark.parametrize("damage", [no_config, dangling, no_version, a_file, somebody_elses, endless])
def test_a_model_that_is_not_ours_is_refused_by_name(
    tmp_path: Path, memory: Path, damage: Callable[[Path], str]
) -> None:
    with made(tmp_path) as running:
        message = damage(tmp_path / "generate")
        with pytest.raises(ServerError) as refused:
            running.start()
        assert f"{tmp_path}/{message}; expected `generate` of fluxserve's model repository" == str(refused.value)
        assert running.exit_status() is None, "before Triton starts"


def test_the_ensemble_is_ours_too(tmp_path: Path, memory: Path) -> None:
    with made(tmp_path) as running:
        shutil.rmtree(tmp_path / "flux" / "1")
        with pytest.raises(ServerError, match="flux: no folder `1` for its version"):
            running.launch.command()
        (tmp_path / "flux" / "config.pbtxt").write_text('backend: "vllm"')
        with pytest.raises(ServerError, match=r"flux/config\.pbtxt: another model's"):
            running.launch.command()


def test_a_model_that_cannot_be_read(tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path, **_: object) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    with made(tmp_path) as running, monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", denied)
        with pytest.raises(ServerError, match=r"flux/config\.pbtxt: Permission denied; expected `flux`"):
            running.launch.command()


def test_paths_are_of_the_folder_that_the_user_is_in(
    tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton runs in a folder of its own, which holds this package and nothing else."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    monkeypatch.setenv("FLUXSERVE_ARTIFACT", "model")
    monkeypatch.setattr("sys.path", ["", "here", *sys.path])
    with made(tmp_path, checkpoint="model") as running:
        given = ["--grpc-server-cert=a.pem", "--log-f=log", "--trace-config=triton,file=t", "--log-info=1"]
        assert replace(running.launch, arguments=given).command()[-4:] == [
            f"--grpc-server-cert={tmp_path}/a.pem",
            f"--log-f={tmp_path}/log",
            f"--trace-config=triton,file={tmp_path}/t",
            "--log-info=1",
        ]
        env = running.launch.environment()
        assert env["FLUXSERVE_CHECKPOINT"] == env["FLUXSERVE_ARTIFACT"] == str(tmp_path / "model")
        assert all(Path(folder).is_absolute() for folder in env["PYTHONPATH"].split(":"))
        (package,) = running.launch.folder().iterdir()
        assert package.resolve() == Path(supervisor.__file__).parents[1]
    with made(tmp_path, checkpoint="black-forest-labs/FLUX.1-dev") as running:
        assert running.launch.environment()["FLUXSERVE_CHECKPOINT"] == "black-forest-labs/FLUX.1-dev", "no path of ours"


def test_a_collector_on_this_machine_is_reached_without_a_proxy(
    tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "intern")
    monkeypatch.delenv("NO_PROXY", raising=False)
    with made(tmp_path) as running:
        env = running.launch.environment()
        assert env["no_proxy"] == "intern,localhost,127.0.0.1,::1" and env["NO_PROXY"] == "localhost,127.0.0.1,::1"


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


# --- arguments and memory --------------------------------------------------------------------------------------------


def test_arguments_are_passed_on(tmp_path: Path, memory: Path) -> None:
    with made(tmp_path) as running:
        given = ["--log-verbose=1", "--backend-config=python,shm-growth-byte-size=2097152"]
        assert replace(running.launch, arguments=given).command()[-2:] == given


@pytest.mark.parametrize(
    "argument",
    [
        "--model-control-mode=explicit",
        "--model-contr=explicit",  # Triton takes any beginning of a name
        "--http-port=80",
        "--grpc-addr=0.0.0.0",
        "--model-repository=/tmp",
        "--backend-config=python,shm-region-prefix-name=x",
        "--backend-directory=/tmp",
        "--exit-timeout-secs=1",
        "--",
        "80",
        "",
    ],
)
def test_an_argument_of_ours_is_refused_by_name(tmp_path: Path, memory: Path, argument: str) -> None:
    with made(tmp_path) as running, pytest.raises(ServerError, match=f"--triton-arg: got {argument!r}; expected"):
        replace(running.launch, arguments=[argument]).command()


def test_a_tracing_argument_beside_trace_is_refused(tmp_path: Path, memory: Path) -> None:
    with made(tmp_path) as running:
        given = arguments.tracing("http://here:4318/v1/traces", 7)
        assert "--trace-config=rate=7" in replace(running.launch, arguments=given).command()
        with pytest.raises(ServerError, match="twice"):
            replace(running.launch, arguments=[*given, "--trace-config=rate=1"]).command()


@pytest.mark.parametrize("url", ["", "localhost:4318", "ftp://x", "http://"])
def test_a_collector_is_an_address(url: str) -> None:
    with pytest.raises(ServerError, match=f"--trace: got {url!r}; expected"):
        arguments.tracing(url)
    with pytest.raises(ServerError, match="--trace-rate: got 0; expected"):
        arguments.tracing("http://x", 0)


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
