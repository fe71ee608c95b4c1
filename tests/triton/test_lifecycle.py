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
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tritonclient.utils import InferenceServerException

from fluxserve.errors import ServerError
from fluxserve.inflight import InflightTable
from fluxserve.settings import default_checkpoint
from fluxserve.supervisor import EXIT_TIMEOUT_S, Ports, TritonServer
from fluxserve.supervisor.installation import bundled
from tests.triton.conftest import READY_S, REPOSITORY, ROOT, status_of, wait_for
from tests.triton.supervised import SMALL, alive, grpc, listening, serve, shared_memory, tree

pytestmark = pytest.mark.xdist_group("lifecycle")


def test_a_taken_port_is_refused() -> None:
    with serve() as served, tempfile.TemporaryFile() as log:
        other = TritonServer(REPOSITORY, served.ports, bundled(), log)
        with other, pytest.raises(ServerError, match=f"--http-port: 127.0.0.1:{served.ports.http} can't be had"):
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
    with serve() as served, ThreadPoolExecutor(3) as pool:
        process, ports, client = served.process, served.ports, served.client
        pids = tree(process.pid)
        assert len(pids) >= 6, "the supervisor, the server and four workers"
        assert len(shared_memory(process.pid)) >= 6, "two tables, and a region for each worker"
        idle = socket.create_connection(("127.0.0.1", ports.http))  # kept alive, as a pool of connections keeps it
        idle.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: here\r\n\r\n")
        assert b"200 OK" in idle.recv(1000)
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
        begin = time.monotonic()
        assert process.wait(60) == 0
        assert time.monotonic() - begin < EXIT_TIMEOUT_S + 5, "an idle connection is nothing to wait for"
        idle.close()
    wait_for(lambda: not alive(pids), 10)
    assert shared_memory(process.pid) == []
    assert not any(listening(p) for p in (ports.http, ports.grpc, ports.metrics))


def test_a_killed_supervisor_takes_its_server_along() -> None:
    with serve("--page", f"--page-port={Ports.free().http}") as served:
        process = served.process
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
