"""Starts Triton, watches its GPU worker, drains it, and leaves nothing behind.

The server is a binary: the one in the wheel `nvidia-pytriton` on a machine without containers, or any other by its path
(in the container: /opt/tritonserver/bin/tritonserver). Three things are ours to do around it:

- A worker that dies takes its model along, and Triton 2.51 goes on calling it ready. The supervisor watches the
  worker's pid (the in-flight table has it), unloads the model the moment it is gone, so that readiness tells the
  truth, and loads it again. For this the server runs in explicit model control, with the administrative APIs behind a
  key.
- SIGTERM makes Triton refuse whatever waits in a queue. The supervisor first closes the door (the table's draining
  flag), waits for what was admitted, and only then passes the signal on.
- Shared memory of a killed process stays. The supervisor removes what carries this server's prefix.
"""

import contextlib
import ctypes
import importlib.util
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fluxserve import settings
from fluxserve.errors import ServerError
from fluxserve.serving.inflight import InflightTable, process_started

LOOPBACK = "127.0.0.1"
READY_TIMEOUT_S = 600.0
DRAIN_TIMEOUT_S = 120.0
EXIT_TIMEOUT_S = 8.0
"""What was admitted is finished by then; a model whose worker was killed can never be unloaded, and uses this up."""

STUB_TIMEOUT_S = 600
"""Triton's own default, 30 s, is too short to load 24 GB."""

MAX_RESTARTS = 3
RESTARTS_WITHIN_S = 600.0
_POLL_S = 0.1
_ADMIN_HEADER = "fluxserve-admin"
_ADMIN_APIS = "model-repository,shared-memory,trace,logging"
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (where Triton's Python backend puts its regions)
_PR_SET_PDEATHSIG = 1
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Asks the server itself: a proxy of the environment has no business between the two, and none with the key."""


@dataclass(frozen=True)
class Ports:
    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002

    @staticmethod
    def free() -> "Ports":
        """Three ports that nobody listens on just now."""
        sockets = [socket.create_server((LOOPBACK, 0)) for _ in range(3)]
        numbers = [s.getsockname()[1] for s in sockets]
        for s in sockets:
            s.close()
        return Ports(*numbers)


@dataclass(frozen=True)
class Installation:
    """A tritonserver binary, where its backends are, and the libraries it needs on its path."""

    binary: Path
    backends: Path | None = None
    libraries: tuple[Path, ...] = ()
    stub: Path | None = None


def installed_at(binary: Path) -> Installation:
    """Another server, by the path of its binary; it brings its backends and libraries itself."""
    if not binary.is_file():
        raise ServerError(f"{binary}: no such file; expected a tritonserver binary")
    return Installation(binary)


def bundled() -> Installation:
    """The server inside the wheel nvidia-pytriton, with the Python stub of the running interpreter.

    Raises:
        ServerError: it is not installed, has no stub for this Python, libpython is missing, or NumPy is too new.
    """
    found = importlib.util.find_spec("pytriton")
    if found is None or found.origin is None:
        raise ServerError("no tritonserver: install the extra 'server' (pip install 'fluxserve[server]') or name one")
    package = Path(found.origin).parent
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = package / "tritonserver" / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        known = ", ".join(sorted(p.name for p in stub.parent.parent.iterdir()))
        raise ServerError(f"the bundled tritonserver has no stub for Python {version}; it has {known}")
    _refuse_new_numpy()
    libraries = (package.parent / "nvidia_pytriton.libs", _libpython_folder(version))
    return Installation(
        binary=package / "tritonserver" / "bin" / "tritonserver",
        backends=package / "tritonserver" / "backends",
        libraries=libraries,
        stub=stub,
    )


def _refuse_new_numpy() -> None:
    import numpy as np

    if int(np.__version__.split(".")[0]) >= 2:
        raise ServerError(
            f"numpy {np.__version__}: the bundled server's stub reads wrong values with it; install numpy<2"
        )


def _libpython_folder(version: str) -> Path:
    """Where libpython of this interpreter is; a statically linked python needs the distribution's package for it."""
    name = f"libpython{version}.so.1.0"
    triplet = sysconfig.get_config_var("MULTIARCH") or ""
    folders = [
        Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib"),
        Path("/usr/lib") / triplet,
        Path("/usr/local/lib"),
    ]
    for folder in folders:
        if (folder / name).is_file():
            return folder
    raise ServerError(f"{name} not found; on Debian and Ubuntu it comes with the package libpython{version}")


class TritonServer:
    """One tritonserver process on loopback; a context manager that drains and stops it."""

    def __init__(
        self,
        repository: Path,
        ports: Ports,
        installation: Installation,
        log: IO[bytes] | None = None,
        options: Mapping[str, str] | None = None,
        address: str = LOOPBACK,
    ) -> None:
        """
        Args:
            log: where the server's output goes; None: to this process's.
            options: settings of the models by field name of settings.Settings, as text.
            address: what to listen on. Anything but loopback is the caller's explicit choice.
        """
        self.repository, self.ports, self._installation = repository, ports, installation
        self._log, self._options, self._address = log, dict(options or {}), address
        self._key = secrets.token_hex(16)
        _remove_leftovers()
        self._home = Path(tempfile.mkdtemp(prefix="fluxserve-"))
        self._prefix = f"fluxserve-{os.getpid()}-{process_started(os.getpid())}-{secrets.token_hex(3)}-"
        self._options.setdefault("inflight", str(_SHARED_MEMORY / f"{self._prefix}inflight"))
        self._process: subprocess.Popen[bytes] | None = None
        self.table = InflightTable(Path(self._options["inflight"]))

    @property
    def http_url(self) -> str:
        return f"{self._host}:{self.ports.http}"

    @property
    def grpc_url(self) -> str:
        return f"{self._host}:{self.ports.grpc}"

    @property
    def metrics_url(self) -> str:
        return f"http://{self._host}:{self.ports.metrics}/metrics"

    @property
    def _host(self) -> str:
        """Where this machine reaches the server: loopback, if it listens everywhere."""
        if self._address in ("0.0.0.0", "::"):  # noqa: S104 (compared, not bound)
            return LOOPBACK
        return f"[{self._address}]" if ":" in self._address else self._address

    def __enter__(self) -> "TritonServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(drain_timeout=0.0)

    # --- life ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the process; returns at once."""
        if not self.repository.is_dir():
            raise ServerError(f"{self.repository}: no such folder; expected a model repository")
        self._process = subprocess.Popen(
            self._command(),
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT if self._log else None,
            start_new_session=True,  # Ctrl-C is for us to handle: the server would drop what waits in its queues
            preexec_fn=_die_with_parent,
        )

    def wait_ready(
        self,
        timeout: float = READY_TIMEOUT_S,
        progress: Callable[[float], None] = lambda _: None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> float:
        """Wait until every model is ready, or `stopping` says not to; returns the seconds it took.

        Raises:
            ServerError: the process ended (a model did not load: its log says why), or time ran out.
        """
        begin = time.monotonic()
        while (spent := time.monotonic() - begin) < timeout:
            if stopping():
                return spent
            if self.is_ready():
                return spent
            if self.exit_status() is not None:
                raise ServerError(f"tritonserver ended with status {self.exit_status()} before it was ready")
            progress(spent)
            time.sleep(_POLL_S)
        raise ServerError(f"tritonserver was not ready within {timeout:.0f} s")

    def supervise(self, stopping: Callable[[], bool], report: Callable[[str], None]) -> None:
        """Watch until `stopping` says so, loading a model again when one of its processes died.

        Raises:
            ServerError: the server ended by itself, or processes died too often or a model can't be loaded again.
        """
        restarts: deque[float] = deque(maxlen=MAX_RESTARTS)
        while not stopping():
            if self.exit_status() is not None:
                raise ServerError(f"tritonserver ended with status {self.exit_status()}")
            for model in self.table.dead_models():
                now = time.monotonic()
                if len(restarts) == MAX_RESTARTS and now - restarts[0] < RESTARTS_WITHIN_S:
                    raise ServerError(f"{len(restarts) + 1} deaths in {now - restarts[0]:.0f} s; giving up at {model}")
                restarts.append(now)
                report(f"a process of {model} died; loading the model again")
                self.table.forget(model)
                self.reload(model)
                report(f"{model} is back")
            time.sleep(_POLL_S)

    def stop(self, drain_timeout: float = DRAIN_TIMEOUT_S) -> None:
        """Refuse new requests, let the admitted ones finish, end the server, remove what it left. Twice is harmless."""
        process = self._process
        if process is not None and process.poll() is None:
            self.table.drain()
            deadline = time.monotonic() + drain_timeout
            while self.table.live() and time.monotonic() < deadline and process.poll() is None:
                time.sleep(_POLL_S)
            process.terminate()
            try:
                process.wait(EXIT_TIMEOUT_S + 5)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._clean()

    def exit_status(self) -> int | None:
        return self._process.poll() if self._process else None

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    # --- the server's HTTP API -------------------------------------------------------------------------------------

    def is_ready(self, model: str | None = None) -> bool:
        """What /v2/health/ready, or a model's ready state, says."""
        path = f"v2/models/{model}/ready" if model else "v2/health/ready"
        try:
            with _DIRECT.open(f"http://{self.http_url}/{path}", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:  # not listening yet, or it answered that it is not ready
            return False

    def reload(self, model: str) -> None:
        """Unload and load a model; what depends on it is not ready meanwhile."""
        self._admin(f"v2/repository/models/{model}/unload")
        self._admin(f"v2/repository/models/{model}/load")

    def _admin(self, path: str) -> None:
        request = urllib.request.Request(
            f"http://{self.http_url}/{path}", data=b"{}", headers={_ADMIN_HEADER: self._key}, method="POST"
        )
        try:
            _DIRECT.open(request, timeout=READY_TIMEOUT_S).close()
        except urllib.error.HTTPError as error:
            raise ServerError(f"{path}: {_message(error)}") from error
        except OSError as error:
            raise ServerError(f"{path}: {error}") from error

    # --- how it is started -----------------------------------------------------------------------------------------

    def _command(self) -> list[str]:
        listen = [f"--{p}-address={self._address}" for p in ("http", "grpc", "metrics")]
        ports = [f"--{p}-port={getattr(self.ports, p)}" for p in ("http", "grpc", "metrics")]
        python = [f"shm-region-prefix-name={self._prefix}", f"stub-timeout-seconds={STUB_TIMEOUT_S}"]
        backends = [f"--backend-directory={self._backends()}"] if self._installation.backends else []
        return [
            str(self._installation.binary),
            f"--model-repository={self.repository}",
            "--model-control-mode=explicit",
            "--load-model=*",
            "--disable-auto-complete-config",
            f"--exit-timeout-secs={EXIT_TIMEOUT_S:.0f}",
            f"--http-restricted-api={_ADMIN_APIS}:{_ADMIN_HEADER}={self._key}",
            f"--grpc-restricted-protocol={_ADMIN_APIS}:{_ADMIN_HEADER}={self._key}",
            *(f"--backend-config=python,{option}" for option in python),
            *backends,
            *listen,
            *ports,
        ]

    def _backends(self) -> Path:
        """The bundled backends with the stub of the running Python put in its place, by links."""
        assert self._installation.backends is not None
        folder = self._home / "backends" / "python"
        folder.mkdir(parents=True)
        for file in (self._installation.backends / "python").iterdir():
            if file.is_file():
                (folder / file.name).symlink_to(file)
        if self._installation.stub:
            (folder / "triton_python_backend_stub").symlink_to(self._installation.stub)
        return folder.parent

    def _environment(self) -> dict[str, str]:
        """This process's environment with the models' settings; the libraries' path is for the server alone.

        The stubs embed Python and find its home, and with it the packages, through the `python` on PATH. PYTHONPATH
        comes on top: some of the wheel's stubs heed it (Python 3.11), some do not (3.12).
        """
        env = settings.environment(**self._options)
        here = Path(sys.executable).parent
        env["PATH"] = os.pathsep.join([str(here), env.get("PATH", "")])
        env["PYTHONPATH"] = os.pathsep.join(
            dict.fromkeys([str(Path(__file__).resolve().parents[1]), *filter(None, sys.path)])
        )
        env.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
        if self._installation.libraries:
            env["LD_LIBRARY_PATH"] = os.pathsep.join(map(str, self._installation.libraries))
        return env

    def _clean(self) -> None:
        shutil.rmtree(self._home, ignore_errors=True)
        for left in _SHARED_MEMORY.glob(f"{self._prefix}*"):
            left.unlink(missing_ok=True)
        self.table.path.unlink(missing_ok=True)


def _remove_leftovers() -> None:
    """Shared memory of supervisors that were killed, and so could not clean up.

    The start time is part of the name because in a container every supervisor has the same pid.
    """
    for left in _SHARED_MEMORY.glob("fluxserve-*"):
        name = re.fullmatch(r"fluxserve-(\d+)-(\d+)-.*", left.name)
        if name and process_started(int(name[1])) != int(name[2]):
            with contextlib.suppress(PermissionError):  # another user's: theirs to remove
                left.unlink(missing_ok=True)


def _die_with_parent() -> None:
    """In the child: get SIGTERM if the supervisor is killed, so that no server is orphaned."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _message(error: urllib.error.HTTPError) -> str:
    body = error.read().decode(errors="replace")
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {error.code}: {body[:200]}"
