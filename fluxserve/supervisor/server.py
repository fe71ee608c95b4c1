"""One tritonserver process, from its start to its end.

The server is a binary: the one in the wheel `nvidia-pytriton` on a machine without containers, or any other by its path
(in the container: /opt/tritonserver/bin/tritonserver). Three things around it are not Triton's:

- Triton 2.51 calls a model ready whose process is gone, and notices no version of a process that hangs. `trouble` sees
  both, in the table that the processes write (serving/processes.py).
- SIGTERM makes Triton refuse whatever waits in a queue. `stop` first closes the door (the in-flight table's draining
  flag), waits until every admitted request is answered, and only then passes the signal on.
- Shared memory of a killed process stays. `stop` removes what carries this server's prefix.
"""

import contextlib
import http.client
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from fluxserve import contract, process
from fluxserve.errors import ServerError
from fluxserve.inflight import InflightTable
from fluxserve.serving.processes import STOPPED_SILENCE_S, ProcessTable
from fluxserve.supervisor import launcher, memory
from fluxserve.supervisor.installation import Installation
from fluxserve.supervisor.launch import Launch
from fluxserve.supervisor.log import Log
from fluxserve.supervisor.sockets import LOOPBACK, Ports, reached, resolved

READY_TIMEOUT_S = 600.0
DRAIN_TIMEOUT_S = 120.0
EXIT_TIMEOUT_S = 5.0
"""For Triton's own ending once everything is answered; an idle HTTP connection would hold it up for ever."""

GONE_TIMEOUT_S = 10.0
"""For the kernel to take a killed process apart, with the memory of its GPU."""

POLL_S = 0.1
_GAP_S = 2.0
"""Between two looks of a supervisor that runs. After a longer gap it was paused itself, perhaps with everybody else."""

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (where Triton's Python backend puts its regions)
_STANDARD_ERROR = 2
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Asks the server itself: a proxy of the environment has no business between the two."""


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
            log: where the server's output goes; None: to standard error.
            options: settings of the models by field name of settings.Settings, as text.
            address: what to listen on, an address or a name. Anything but loopback is the caller's explicit choice.
            arguments: of tritonserver, beside those that are ours.

        Raises:
            ServerError: an address that is none of this machine's, or no room for the tables.
        """
        self.repository, self.ports, self._address = repository, ports, resolved(address)
        self._log = Log(log.fileno() if log else _STANDARD_ERROR)
        process.remove_leftovers(_SHARED_MEMORY)
        self._prefix = f"{process.own_prefix()}{secrets.token_hex(3)}-"
        # Triton splits its stubs' command lines at blanks, so that no path of the user's may be in one.
        self._home = Path(tempfile.mkdtemp(prefix=f"{self._prefix}home-", dir=_SHARED_MEMORY))
        settings = {"inflight": str(_SHARED_MEMORY / f"{self._prefix}inflight"), **(options or {})}
        self._installation = installation
        self.launch = Launch(
            repository, ports, self._address, installation, settings, arguments, self._prefix, self._home
        )
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._looked_ns = self._attentive_ns = time.monotonic_ns()
        self._stopped_ns = 0
        self.table = InflightTable(Path(settings["inflight"]))
        self.processes = ProcessTable.beside(self.table.path)

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
        ip = reached(self._address)
        return f"[{ip}]" if ":" in ip else ip

    def __enter__(self) -> "TritonServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(drain_timeout=0.0)

    # --- life ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the process; returns at once.

        Raises:
            ServerError: no repository, arguments that contradict ours, or a port that somebody listens on.
        """
        if not self.repository.is_dir():
            raise ServerError(f"{self.repository}: no such folder; expected a model repository")
        command, environment = self.launch.command(), self.launch.environment()
        self.ports.refuse_taken(self._address)
        self._process = subprocess.Popen(
            launcher.command(command),
            cwd=self.launch.folder(),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us to handle: the server would drop what waits in its queues
        )
        self._guard = process.guard(self._process.pid)
        assert self._process.stdout is not None
        self._log.read(self._process.stdout)

    def wait_ready(
        self,
        timeout: float = READY_TIMEOUT_S,
        progress: Callable[[float], None] = lambda _: None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> float:
        """Wait until every model is ready, or `stopping` says not to; returns the seconds it took.

        Raises:
            ServerError: a process ended or hangs, or time ran out; with the reason that the log gives.
        """
        begin = time.monotonic()
        while (spent := time.monotonic() - begin) < timeout:
            if trouble := self.trouble():
                raise ServerError(f"{trouble} before it was ready{self.why()}")
            if stopping() or self.is_up():
                return spent
            progress(spent)
            time.sleep(POLL_S)
        raise ServerError(self.late(timeout))

    def why(self) -> str:
        """The reason in the log of a server that has ended, to stand behind what happened; nothing if it runs."""
        if self.exit_status() is None:
            return ""
        reason = self._log.ended()
        return f": {reason}" if reason else ""

    def late(self, seconds: float) -> str:
        """What is still waited for, where the server is not ready after so long."""
        absent = [name for name in contract.MODELS if name != contract.FLUX.name and not self.processes.pids(name)]
        waited = f"{', '.join(absent)} did not load" if absent else f"nobody says ready at http://{self.http_url}"
        last = self._log.last()
        return f"tritonserver was not ready within {seconds:.0f} s: {waited}" + (
            f"; its last words: {last}" if last else ""
        )

    def is_up(self) -> bool:
        """Whether every model is loaded. The bundled server's memory is limited from then on."""
        if not (self.processes.pids("generate") and self.readiness(None, 0.5)):
            return False
        if self._installation.stub:
            memory.bound(self.pid)
        return True

    def drained(self) -> bool:
        """Whether no request waits or runs, and every answer was taken by its client."""
        return not (self.table.live() or self.processes.busy() or self.ports.unsent())

    def stop(self, drain_timeout: float = DRAIN_TIMEOUT_S, hurry: Callable[[], bool] = lambda: False) -> None:
        """Refuse new requests, let the admitted ones finish, end the server, remove what it left. Twice is harmless.

        Draining ends with the last answer, after `drain_timeout` seconds, or once `hurry` says so.
        """
        if self.exit_status() is None and self._process is not None:
            self.table.drain()
            deadline = time.monotonic() + drain_timeout
            while not self.drained() and time.monotonic() < deadline and not hurry() and self.exit_status() is None:
                time.sleep(POLL_S)
            self._end(deadline, hurry)
        self.kill(hurry)
        self._clean()

    def _end(self, deadline: float, hurry: Callable[[], bool]) -> None:
        """Let Triton end by itself: for a few seconds, or until `deadline` where a client still takes its answer."""
        assert self._process is not None
        self._process.terminate()
        patience = time.monotonic() + EXIT_TIMEOUT_S
        while self.exit_status() is None and not hurry():
            now = time.monotonic()
            if now > patience and (now > deadline or not self.ports.unsent()):
                return
            time.sleep(POLL_S)

    def kill(self, hurry: Callable[[], bool] = lambda: False) -> None:
        """End the server's whole session at once, and forget its requests: their clients see a broken connection."""
        if self._process is None or self._guard is None:
            return
        self._guard.kill()
        self._guard.communicate()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.forget()
        deadline = time.monotonic() + GONE_TIMEOUT_S
        while not self.processes.gone() and time.monotonic() < deadline and not hurry():
            time.sleep(POLL_S / 10)
        self.table.reset()
        self.processes.reset()
        self._stopped_ns = 0
        for left in self._left() - {self.table.path, self.processes.path}:
            left.unlink(missing_ok=True)

    def exit_status(self) -> int | None:
        return self._process.poll() if self._process else None

    def exposed(self) -> list[Path]:
        """Return the files in shared memory that other users may open: none, unless the kernel refuses `launcher`."""
        return launcher.exposed(_SHARED_MEMORY, self._prefix)

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    # --- how it is -------------------------------------------------------------------------------------------------

    def trouble(self) -> str | None:
        """What is wrong: a process ended or hangs; None if all is well. Meant to be asked all the time.

        After a pause of this process itself everybody's silence begins anew. Whoever was paused along with it, in a
        container or a suspended machine, can go on where it was.
        """
        now = time.monotonic_ns()
        if now - self._looked_ns > _GAP_S * 1e9:
            self._attentive_ns = now
        self._looked_ns = now
        if (status := self.exit_status()) is not None:
            return f"tritonserver ended with {_status(status)}"
        return self._stopped(now) or self.processes.trouble(self._attentive_ns)

    def _stopped(self, now: int) -> str | None:
        if self._process is None or not process.stopped(self._process.pid):
            self._stopped_ns = 0
            return None
        self._stopped_ns = max(self._stopped_ns or now, self._attentive_ns)
        seconds = (now - self._stopped_ns) / 1e9
        return f"tritonserver is stopped for {seconds:.1f} s" if seconds > STOPPED_SILENCE_S else None

    def memory(self) -> int:
        """Bytes that the server holds, its regions in shared memory included."""
        return memory.held(self.pid, _SHARED_MEMORY.glob(f"{self._prefix}*"))

    def is_ready(self, model: str | None = None) -> bool:
        """What /v2/health/ready, or a model's ready state, says; False as well if it says nothing."""
        return self.readiness(model, 5) is True

    def readiness(self, model: str | None, patience: float) -> bool | None:
        """The same, and None without an answer within so many seconds: nobody listens yet, or any more."""
        path = f"v2/models/{model}/ready" if model else "v2/health/ready"
        try:
            with _DIRECT.open(f"http://{self.http_url}/{path}", timeout=patience) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError:
            return False
        except (OSError, http.client.HTTPException):
            return None

    def _clean(self) -> None:
        self._log.close()
        shutil.rmtree(self._home, ignore_errors=True)
        for left in self._left() | {self.table.path, self.processes.path}:
            left.unlink(missing_ok=True)

    def _left(self) -> set[Path]:
        """This server's files in shared memory."""
        return set(_SHARED_MEMORY.glob(f"{self._prefix}*")) - {self._home}


def _status(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"status {status}"
