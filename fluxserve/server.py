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
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fluxserve import contract, launcher, process, settings
from fluxserve.errors import ServerError
from fluxserve.installation import Installation
from fluxserve.serving.inflight import InflightTable

LOOPBACK = "127.0.0.1"
READY_TIMEOUT_S = 600.0
DRAIN_TIMEOUT_S = 120.0
EXIT_TIMEOUT_S = 8.0
"""For Triton's own unloading, after draining. A model whose process was killed is never unloaded, and uses it up."""

STUB_TIMEOUT_S = 600
"""Triton's own default, 30 s, is too short to load 24 GB."""

MAX_RESTARTS = 3
RESTARTS_WITHIN_S = 600.0
_POLL_S = 0.1
_ADMIN_HEADER = "fluxserve-admin"
_ADMIN_APIS = "model-repository,shared-memory,trace,logging"
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (where Triton's Python backend puts its regions)
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
        arguments: Sequence[str] = (),
    ) -> None:
        """
        Args:
            log: where the server's output goes; None: to this process's.
            options: settings of the models by field name of settings.Settings, as text.
            address: what to listen on. Anything but loopback is the caller's explicit choice.
            arguments: of tritonserver, beside those that are ours.
        """
        self.repository, self.ports, self._installation = repository, ports, installation
        self._log, self._options, self._address = log, dict(options or {}), address
        self._arguments = arguments
        self._key = secrets.token_hex(16)
        process.remove_leftovers(_SHARED_MEMORY, Path(tempfile.gettempdir()))
        self._prefix = f"{process.own_prefix()}{secrets.token_hex(3)}-"
        self._home = Path(tempfile.mkdtemp(prefix=self._prefix))
        self._options.setdefault("inflight", str(_SHARED_MEMORY / f"{self._prefix}inflight"))
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
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
        """Start the process; returns at once.

        Raises:
            ServerError: no repository, or a port that somebody listens on: whose answers would be taken for ours.
        """
        if not self.repository.is_dir():
            raise ServerError(f"{self.repository}: no such folder; expected a model repository")
        self._refuse_taken_ports()
        self._process = subprocess.Popen(
            launcher.command(self._command()),
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT if self._log else None,
            start_new_session=True,  # Ctrl-C is for us to handle: the server would drop what waits in its queues
        )
        self._guard = process.guard(self._process.pid)

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
            if self.exit_status() is not None:
                raise ServerError(f"tritonserver ended with status {self.exit_status()} before it was ready")
            if stopping() or (self.table.processes("generate") and self.is_ready()):
                return spent
            progress(spent)
            time.sleep(_POLL_S)
        raise ServerError(f"tritonserver was not ready within {timeout:.0f} s")

    def supervise(self, stopping: Callable[[], bool], report: Callable[[str], None]) -> None:
        """Watch until `stopping` says so; load a model again when one of its processes died, start Triton when it did.

        Raises:
            ServerError: too many deaths, or what died can't be brought back.
        """
        deaths: deque[float] = deque(maxlen=MAX_RESTARTS)

        def mourn(who: str) -> None:
            now = time.monotonic()
            if len(deaths) == MAX_RESTARTS and now - deaths[0] < RESTARTS_WITHIN_S:
                raise ServerError(f"{who} died, the {MAX_RESTARTS + 1}th death in {now - deaths[0]:.0f} s; giving up")
            deaths.append(now)
            report(f"{who} died; starting it again")

        while not stopping():
            if self.exit_status() is not None:
                mourn(f"tritonserver (status {self.exit_status()})")
                self._restart(stopping)
                report("tritonserver is back")
            for model in self.table.dead_models():
                mourn(f"a process of {model}")
                self.table.forget_processes(model)
                self.reload(model)
                report(f"{model} is back")
            time.sleep(_POLL_S)

    def _restart(self, stopping: Callable[[], bool]) -> None:
        """Triton is gone, and with it every request; its stubs may linger."""
        self._kill_group()
        for model in contract.MODELS:
            self.table.forget_processes(model)
        self.table.release_waits()
        self.start()
        self.wait_ready(stopping=stopping)

    def stop(self, drain_timeout: float = DRAIN_TIMEOUT_S, hurry: Callable[[], bool] = lambda: False) -> None:
        """Refuse new requests, let the admitted ones finish, end the server, remove what it left. Twice is harmless.

        Draining ends with the last admitted request, after `drain_timeout` seconds, or once `hurry` says so.
        """
        running = self._process
        if running is not None and running.poll() is None:
            self.table.drain()
            deadline = time.monotonic() + drain_timeout
            while self.table.live() and time.monotonic() < deadline and not hurry() and running.poll() is None:
                time.sleep(_POLL_S)
            running.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.wait(EXIT_TIMEOUT_S + 5)
        self._kill_group()
        self._clean()

    def _kill_group(self) -> None:
        """End what is left of the server's session: Triton itself, or stubs that it left behind while they loaded."""
        if self._process is None or self._guard is None:
            return
        self._guard.kill()
        self._guard.communicate()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def exit_status(self) -> int | None:
        return self._process.poll() if self._process else None

    def exposed(self) -> list[Path]:
        """Return the files in shared memory that other users may open: none, unless the kernel refuses `launcher`."""
        return launcher.exposed(_SHARED_MEMORY, self._prefix)

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    # --- the server's HTTP API -------------------------------------------------------------------------------------

    def is_ready(self, model: str | None = None) -> bool:
        """What /v2/health/ready, or a model's ready state, says; False as well if it says nothing."""
        return self.readiness(model, 5) is True

    def readiness(self, model: str | None, patience: float) -> bool | None:
        """The same, and None without an answer within so many seconds: nobody listens, or Triton has given the
        connection to the thread that loads a model, which answers when that is done."""
        path = f"v2/models/{model}/ready" if model else "v2/health/ready"
        try:
            with _DIRECT.open(f"http://{self.http_url}/{path}", timeout=patience) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError:
            return False
        except OSError:
            return None

    def reload(self, model: str) -> None:
        """Unload and load a model; what depends on it is not ready meanwhile, and what waited for it was answered."""
        self._admin(f"v2/repository/models/{model}/unload")
        if model == contract.GENERATE.name:
            self.table.release_waits()
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
            f"--model-repository={self._repository()}",
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
            *self._arguments,
        ]

    def _refuse_taken_ports(self) -> None:
        for name in ("http", "grpc", "metrics"):
            port = getattr(self.ports, name)
            try:
                socket.create_server((self._address, port), family=_family(self._address)).close()
            except OSError as error:
                raise ServerError(f"--{name}-port: {self._address}:{port} can't be had ({error.strerror})") from error

    def _repository(self) -> Path:
        """The repository by a path of ours: Triton splits its stubs' command lines at blanks."""
        link = self._home / "model_repository"
        link.unlink(missing_ok=True)
        link.symlink_to(self.repository.resolve())
        return link

    def _backends(self) -> Path:
        """The bundled backends with the stub of the running Python put in its place, by links."""
        assert self._installation.backends is not None
        folder = self._home / "backends" / "python"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for file in (self._installation.backends / "python").iterdir():
            if file.is_file():
                (folder / file.name).symlink_to(file)
        if self._installation.stub:
            (folder / "triton_python_backend_stub").symlink_to(self._installation.stub)
        return folder.parent

    def _libraries(self) -> list[str]:
        """Folders for the loader, before those that it has been told. libpython by a link, in a folder of its own: it
        stands among the system's libraries, whose cuDNN or CUDA would otherwise go before PyTorch's own."""
        found = [str(folder) for folder in self._installation.libraries]
        if self._installation.libpython is not None:
            link = self._home / "lib" / self._installation.libpython.name
            link.parent.mkdir(exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(self._installation.libpython)
            found.append(str(link.parent))
        return found

    def _environment(self) -> dict[str, str]:
        """This process's environment with the models' settings, and the libraries of the server for it alone.

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
        if libraries := self._libraries():
            env["LD_LIBRARY_PATH"] = os.pathsep.join([*libraries, *filter(None, [env.get("LD_LIBRARY_PATH")])])
        return env

    def _clean(self) -> None:
        shutil.rmtree(self._home, ignore_errors=True)
        for left in _SHARED_MEMORY.glob(f"{self._prefix}*"):
            left.unlink(missing_ok=True)
        self.table.path.unlink(missing_ok=True)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _message(error: urllib.error.HTTPError) -> str:
    body = error.read().decode(errors="replace")
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {error.code}: {body[:200]}"
