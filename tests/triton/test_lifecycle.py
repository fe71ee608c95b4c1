"""Starting, dying, draining: each test with a server of its own."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from tritonclient.utils import InferenceServerException

from fluxserve import process as process_of
from fluxserve.errors import ServerError
from fluxserve.installation import bundled
from fluxserve.server import Ports, TritonServer
from fluxserve.serving.inflight import InflightTable
from fluxserve.settings import default_checkpoint
from tests.triton.conftest import LONG, REPOSITORY, ROOT, PlainClient, status_of, wait_for

pytestmark = pytest.mark.xdist_group("lifecycle")

SMALL = {"height": 64, "width": 64, "num_inference_steps": 1}
READY_S = 60


def grpc(ports: Ports) -> PlainClient:
    return PlainClient("grpc", f"127.0.0.1:{ports.grpc}")


@contextmanager
def serve(*options: str) -> Iterator[tuple[subprocess.Popen[str], Ports]]:
    """`fluxserve serve` as a user starts it, ready; killed at the end if it still runs."""
    ports = Ports.free()
    numbers = [f"--{name}-port={getattr(ports, name)}" for name in ("http", "grpc", "metrics")]
    command = [sys.executable, "-m", "fluxserve", "serve", *numbers, *options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("ready after"):
                break
        else:
            raise AssertionError("it ended before it was ready")
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield process, ports
    finally:
        process.kill()
        process.wait()


def tree(pid: int) -> set[int]:
    """A process and its descendants."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    below = [int(c) for c in children.read_text().split()] if children.exists() else []
    return {pid}.union(*(tree(c) for c in below))


def alive(pids: set[int]) -> set[int]:
    return {pid for pid in pids if process_of.started(pid)}


def shared_memory(supervisor: int) -> list[str]:
    return [file.name for file in Path("/dev/shm").glob(f"fluxserve-{supervisor}-*")]


def listening(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def supervised(reports: list[str]) -> Iterator[TritonServer]:
    """A server under its supervisor, as `fluxserve serve` runs it."""
    stopping = threading.Event()
    with (
        tempfile.TemporaryFile() as log,
        TritonServer(REPOSITORY, Ports.free(), bundled(), log) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        server.start()
        server.wait_ready(READY_S)
        watching = pool.submit(server.supervise, stopping.is_set, reports.append)
        try:
            yield server
        finally:
            stopping.set()
        watching.result(10)


def readiness_until_back(
    server: TritonServer, reports: list[str], models: Sequence[str]
) -> dict[str, set[bool | None]]:
    """What the server ("") and the models said of themselves, from now until the supervisor says that all is back.
    Asked again where one says nothing at once: it would answer when all is over."""
    seen: dict[str, set[bool | None]] = {name: set() for name in ("", *models)}

    def back() -> bool:
        for name, said in seen.items():
            said.add(server.readiness(name or None, 0.5))
        return len(reports) == 2 and server.is_ready()

    wait_for(back, READY_S)
    return seen


def test_a_worker_that_dies_is_not_ready_and_comes_back() -> None:
    """Readiness tells the truth, the request in flight is answered, the table is clean."""
    reports: list[str] = []
    with supervised(reports) as server, ThreadPoolExecutor(9) as pool:
        client = grpc(server.ports)
        in_flight = pool.submit(client.refused, lambda: client.draw(request_id="orphan", **LONG))
        wait_for(lambda: client.control("orphan", "status")[1] > 0)
        waiting = [pool.submit(client.refused, lambda k=k: client.draw(request_id=f"w{k}", **LONG)) for k in range(8)]
        wait_for(lambda: server.table.live() == 9)
        (worker,) = server.table.processes("generate")
        os.kill(worker, signal.SIGKILL)
        seen = readiness_until_back(server, reports, ["flux", "generate", "control"])
        assert False in seen[""] & seen["flux"] & seen["generate"]
        assert seen["control"] - {None} == {True}
        in_flight.result(30)  # `refused`: it was answered, with an error
        for each in waiting:
            each.result(30)
        assert server.table.live() == 0, "who waited was answered, and waits no longer"
        wait_for(lambda: server.is_ready("flux"))
        assert worker not in server.table.processes("generate")
        assert client.draw(request_id="orphan", **SMALL)["images"].shape == (1,), "its id is free again"
        assert server.table.live() == 0
    assert len(reports) == 2


@pytest.mark.parametrize("model", ["prepare", "control"])
def test_any_process_that_dies_comes_back(model: str) -> None:
    """With two instances Triton would go on sending every other request to the dead one."""
    reports: list[str] = []
    with supervised(reports) as server:
        before = server.table.processes(model)
        os.kill(before[-1], signal.SIGKILL)
        wait_for(lambda: len(reports) == 2, READY_S)
        wait_for(server.is_ready, READY_S)
        client = grpc(server.ports)
        for _ in range(2 * len(before)):
            client.draw(**SMALL)
            assert client.control("nobody", "status")[0] == "unknown"
        assert len(server.table.processes(model)) == len(before)
        assert not set(server.table.processes(model)) & set(before)


def test_a_server_that_dies_is_started_again() -> None:
    """Whatever kills Triton itself: 2.51 ends at one HTTP request with a shape of 2**62."""
    reports: list[str] = []
    with supervised(reports) as server:
        before = server.pid
        os.kill(before, signal.SIGSEGV)
        wait_for(lambda: len(reports) == 2, READY_S)
        wait_for(server.is_ready, READY_S)
        assert grpc(server.ports).draw(**SMALL)["images"].shape == (1,)


def test_a_taken_port_is_refused() -> None:
    with serve() as (_, ports), tempfile.TemporaryFile() as log:
        other = TritonServer(REPOSITORY, ports, bundled(), log)
        with other, pytest.raises(ServerError, match=f"--http-port: 127.0.0.1:{ports.http} can't be had"):
            other.start()


def test_a_path_with_blanks(tmp_path: Path) -> None:
    """The stubs' command lines are split at blanks by Triton."""
    repository = Path(shutil.copytree(REPOSITORY, tmp_path / "my models" / "repo sitory"))
    with tempfile.TemporaryFile() as log, TritonServer(repository, Ports.free(), bundled(), log) as server:
        server.start()
        server.wait_ready(READY_S)
        assert grpc(server.ports).draw(**SMALL)["images"].shape == (1,)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_demo_that_is_stopped_while_it_loads_leaves_no_process(number: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fluxserve", "demo", "-o", str(tmp_path / "x.png")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: len(tree(process.pid)) >= 5, READY_S)
    prefix = f"/fluxserve-{process.pid}-"  # of the stubs' own path: one may be started after we looked
    process.send_signal(number)
    process.wait(READY_S)

    def stubs() -> list[str]:
        found = []
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):  # it ended while we looked
                found.append(file.read_bytes().decode(errors="replace"))
        return [command for command in found if prefix in command]

    wait_for(lambda: not stubs(), READY_S)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_leaves_nothing(number: int) -> None:
    """What runs and what waits is finished, what is new is refused, and nothing stays."""
    with serve() as (process, ports), ThreadPoolExecutor(3) as pool:
        client = grpc(ports)
        pids = tree(process.pid)
        assert len(pids) >= 6, "the supervisor, the server and four workers"
        assert len(shared_memory(process.pid)) >= 5, "the table, and a region for each worker"
        size = {"height": 384, "width": 384, "num_inference_steps": 60}
        running = pool.submit(client.draw, request_id="running", **size)
        wait_for(lambda: client.control("running", "status")[1] > 0)
        waiting = pool.submit(client.draw, request_id="waiting", **(size | {"width": 128}))
        wait_for(lambda: client.control("waiting", "status")[0] == "queued")
        (table,) = (InflightTable(f) for f in Path("/dev/shm").glob(f"fluxserve-{process.pid}-*inflight"))
        process.send_signal(number)
        wait_for(lambda: table.draining)
        with pytest.raises(InferenceServerException) as refused:
            client.draw(**SMALL)
        assert status_of(refused.value) == "UNAVAILABLE"
        assert "shutting down" in refused.value.message()
        assert running.result(60)["images"].shape == waiting.result(60)["images"].shape == (1,)
        assert process.wait(60) == 0
    wait_for(lambda: not alive(pids), 10)
    assert shared_memory(process.pid) == []
    assert not any(listening(p) for p in (ports.http, ports.grpc, ports.metrics))


def test_a_killed_supervisor_takes_its_server_along() -> None:
    with serve() as (process, _):
        pids = tree(process.pid)
        process.kill()
        process.wait()
        wait_for(lambda: not alive(pids), 30)


def copy_of_tiny(folder: Path) -> Path:
    return Path(shutil.copytree(default_checkpoint(), folder / "model"))


def truncate(model: Path) -> str:
    file = model / "transformer" / "diffusion_pytorch_model.safetensors"
    os.truncate(file, file.stat().st_size - 1000)
    return "truncated or damaged"


def pickle(model: Path) -> str:
    file = model / "vae" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))
    return "pickled weights are never loaded"


def other_architecture(model: Path) -> str:
    file = model / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": "StableDiffusionPipeline"}))
    return "got 'StableDiffusionPipeline'; expected FluxPipeline"


def missing(model: Path) -> str:
    shutil.rmtree(model)
    return "no such folder; expected a diffusers-format checkpoint"


@pytest.mark.parametrize("damage", [truncate, pickle, other_architecture, missing])
def test_a_bad_checkpoint_fails_at_load_and_says_why(damage, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    model = copy_of_tiny(tmp_path)
    reason = damage(model)
    log = tmp_path / "log"
    with (
        log.open("wb") as out,
        TritonServer(REPOSITORY, Ports.free(), bundled(), out, {"checkpoint": str(model)}) as server,
    ):
        server.start()
        with pytest.raises(ServerError, match="before it was ready"):
            server.wait_ready(READY_S)
        assert not server.is_ready()
    assert reason in log.read_text(errors="replace")


def test_the_demo_says_why_it_failed(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "fluxserve",
        "demo",
        "--checkpoint",
        str(tmp_path / "none"),
        "-o",
        str(tmp_path / "x.png"),
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert run.returncode == 1
    assert f"{tmp_path / 'none'}: no such folder" in run.stderr


def test_the_demo_draws(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "fluxserve",
        "demo",
        "a red apple",
        "--seed",
        "5",
        "-o",
        str(tmp_path / "demo.png"),
    ]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "demo.png").stat().st_size > 1000
    for word in (str(tmp_path / "demo.png"), "seed 5", "denoise", "VAE", "text", "queue"):
        assert word in run.stdout
