"""Servers with a supervisor, in this process or as a user starts them, and what lives and dies around them."""

import contextlib
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tritonclient.utils import InferenceServerException

from fluxserve import process as process_of
from fluxserve.supervisor import Ports, TritonServer, Watch
from fluxserve.supervisor.installation import bundled
from tests.triton.conftest import READY_S, REPOSITORY, ROOT, PlainClient, status_of, wait_for

SMALL = {"height": 64, "width": 64, "num_inference_steps": 1}


def grpc(ports: Ports) -> PlainClient:
    return PlainClient("grpc", f"127.0.0.1:{ports.grpc}")


def outcome(call: Callable[[], object]) -> str:
    """OK, or the status that a call failed with."""
    try:
        call()
    except InferenceServerException as error:
        return status_of(error)
    return "OK"


@dataclass
class Supervised:
    server: TritonServer
    reports: list[str]
    watching: "Future[None]"

    @property
    def client(self) -> PlainClient:
        return grpc(self.server.ports)

    def deaths(self) -> list[str]:
        return [line for line in self.reports if "; starting it again;" in line]

    def back(self, times: int) -> None:
        """Wait until the server has come back so often."""
        wait_for(lambda: self.watching.done() or sum("is back" in line for line in self.reports) == times, READY_S)
        assert not self.watching.done(), self.watching.result(0)


@contextmanager
def supervised(grows: int = 0) -> Iterator[Supervised]:
    """A server under its watch, as `fluxserve serve` runs it. `grows`: bytes that it may hold beyond what it has."""
    stopping, reports = threading.Event(), list[str]()
    with (
        tempfile.TemporaryFile() as log,
        TritonServer(REPOSITORY, Ports.free(), bundled(), log) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        server.start()
        server.wait_ready(READY_S)
        limit = server.memory() + grows if grows else 0
        watching = pool.submit(Watch(server, stopping.is_set, reports.append, limit).run)
        try:
            yield Supervised(server, reports, watching)
        except BaseException:
            log.seek(0)
            errors = [line for line in log.read().decode(errors="replace").splitlines() if line.startswith("E")]
            print(*reports, *errors, sep="\n")
            raise
        finally:
            stopping.set()


@dataclass
class Serve:
    """`fluxserve serve` as a user starts it."""

    process: "subprocess.Popen[str]"
    ports: Ports
    lines: list[str] = field(default_factory=list)

    @property
    def client(self) -> PlainClient:
        return grpc(self.ports)

    def read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(self.process.stdout)

    def said(self, words: str) -> bool:
        return any(words in line for line in self.lines)

    def models(self, name: str) -> set[int]:
        """The processes that Triton runs a model in: its stub, and no process that the model started itself."""
        file = f"/{name}/1/model.py"
        return {pid for pid in tree(self.process.pid) if any(word.endswith(file) for word in _arguments(pid)[1:2])}


@contextmanager
def serve(*options: str) -> Iterator[Serve]:
    """`fluxserve serve`, ready; killed at the end if it still runs."""
    ports = Ports.free()
    numbers = [f"--{name}-port={getattr(ports, name)}" for name in ("http", "grpc", "metrics")]
    command = [sys.executable, "-m", "fluxserve", "serve", *numbers, *options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    served = Serve(process, ports)
    reader = threading.Thread(target=served.read, daemon=True)
    try:
        reader.start()
        wait_for(lambda: served.said("ready after") or process.poll() is not None, READY_S)
        assert process.poll() is None, "".join(served.lines)
        yield served
    finally:
        process.kill()
        process.wait()
        reader.join()


def tree(pid: int) -> set[int]:
    """A process and its descendants."""
    below: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
        below = [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return {pid}.union(*(tree(c) for c in below))


def _arguments(pid: int) -> list[str]:
    """A process's command line; none if it ended meanwhile."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


def alive(pids: set[int]) -> set[int]:
    return {pid for pid in pids if process_of.started(pid)}


def listening(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def shared_memory(supervisor: int) -> list[str]:
    return [file.name for file in Path("/dev/shm").glob(f"fluxserve-{supervisor}-*")]
