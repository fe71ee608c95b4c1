"""Starting where people are: any path, any address, no reader; and a reason where it can't be."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest
from fluxserve_client import Client

from fluxserve.cli import main as cli
from fluxserve.serving.processes import ProcessTable
from fluxserve.settings import default_checkpoint
from fluxserve.supervisor import Ports
from tests.triton.conftest import READY_S, REPOSITORY, ROOT, PlainClient, plain, wait_for
from tests.triton.supervised import SMALL, grpc, tree

pytestmark = pytest.mark.xdist_group("lifecycle")

ODD = "Ä 狐 $HOME \"x\" 'y'\nz;#"
"""A folder's name: blanks, what shells split or replace, letters beyond ASCII, a new line."""


@dataclass
class Started:
    process: "subprocess.Popen[bytes]"
    ports: Ports
    errors: Path

    @property
    def client(self) -> PlainClient:
        return grpc(self.ports)

    def said(self, words: str) -> bool:
        return words in self.errors.read_text(errors="replace")


@contextlib.contextmanager
def fluxserve(
    errors: Path, *options: str, output: int | IO[bytes] = subprocess.DEVNULL, cwd: Path = ROOT, **environment: str
) -> Iterator[Started]:
    """`fluxserve serve`, its server's log and errors in a file; killed at the end if it still runs."""
    ports = Ports.free()
    numbers = [f"--{name}-port={getattr(ports, name)}" for name in ("http", "grpc", "metrics")]
    command = [sys.executable, "-P", "-m", "fluxserve", "serve", *numbers, *options]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "client" / "src")]), **environment}
    with errors.open("wb") as log:
        process = subprocess.Popen(command, cwd=cwd, env=env, stdout=output, stderr=log, start_new_session=True)
    try:
        yield Started(process, ports, errors)
    finally:
        process.kill()
        process.wait()


def ready(started: Started) -> None:
    url = f"http://127.0.0.1:{started.ports.http}/v2/health/ready"

    def is_ready() -> bool:
        time.sleep(0.2)
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
        return False

    wait_for(lambda: started.process.poll() is not None or is_ready(), READY_S)
    assert started.process.poll() is None, started.errors.read_text(errors="replace")
    time.sleep(2)  # the supervisor looks after it has answered us; a signal before that ends a start


def test_every_path_may_have_any_letters(tmp_path: Path) -> None:
    """The checkpoint, the repository beside what else lies in one, the working and the temporary folder, the cache, the
    home, and the interpreter's own. In the working folder lies what must not be taken for a library."""
    home = tmp_path / ODD
    home.mkdir()
    shutil.copytree(default_checkpoint(), home / "model")
    repository = shutil.copytree(REPOSITORY, home / "repository")
    for name in (
        "lost+found",
        ".git",
        ".ipynb_checkpoints",
        "..2026_11_30",
        "flux/.ipynb_checkpoints",
        "generate/.git",
    ):
        (repository / name).mkdir()
    (repository / "..data").symlink_to("..2026_11_30")
    (repository / "prepare").rename(repository / "..data" / "prepare")  # as Kubernetes mounts a volume
    (repository / "prepare").symlink_to("..data/prepare")
    (repository / "gone").symlink_to("nowhere")
    (repository / "README.md").touch()
    for module in ("json", "fluxserve", "torch"):
        (home / f"{module}.py").write_text("raise SystemExit('a stray file was imported')")
    (home / "venv").symlink_to(sys.prefix)
    places = dict.fromkeys(("TMPDIR", "HOME", "XDG_CACHE_HOME"), str(home))
    options = ["--repository", "repository", "--checkpoint", "model"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(home / "venv" / "bin" / "python"))
        with fluxserve(tmp_path / "log", *options, cwd=home, LC_ALL="C", **places) as started:
            ready(started)
            assert started.client.draw(**SMALL)["images"].shape == (1,)
            maps = [Path(f"/proc/{pid}/environ").read_bytes() for pid in tree(started.process.pid)]
            assert any(os.fsencode(home / "model") in environ for environ in maps)


def test_a_reason_with_any_letters(tmp_path: Path) -> None:
    with fluxserve(tmp_path / "log", "--checkpoint", str(tmp_path / "Ä\n狐")) as started:
        assert started.process.wait(READY_S) == 1
    last = started.errors.read_text().splitlines()[-1]
    said = "fluxserve: tritonserver ended with status 1 before it was ready: prepare, generate: CheckpointError: "
    assert last.startswith(said) and "狐: no such folder; expected a diffusers-format checkpoint" in last


def test_a_repository_keeps_a_path_of_any_letters(tmp_path: Path) -> None:
    """Written into a config.pbtxt, whose text arrives decoded where a variable's does not."""
    model = Path(shutil.copytree(default_checkpoint(), tmp_path / ODD))
    assert cli.main(["repository", str(tmp_path / "repository"), "--checkpoint", str(model)]) == 0
    with fluxserve(tmp_path / "log", "--repository", str(tmp_path / "repository")) as started:
        ready(started)
        assert started.client.draw(**SMALL)["images"].shape == (1,)


def last_line(tmp_path: Path, *options: str) -> str:
    with fluxserve(tmp_path / "log", *options) as started:
        assert started.process.wait(READY_S) == 1
    return started.errors.read_text().splitlines()[-1].removeprefix("fluxserve: ")


def test_the_last_line_says_why_a_start_failed(tmp_path: Path) -> None:
    ended = "tritonserver ended with status 1 before it was ready: "
    assert last_line(tmp_path, "--triton-arg=--nonsense") == f"{ended}tritonserver: unrecognized option '--nonsense'"
    assert last_line(tmp_path, "--triton-arg=--log-verbose=x").startswith(f"{ended}Invalid option value. Got x")
    broken = shutil.copytree(REPOSITORY, tmp_path / "repository")
    model = Path(broken) / "control" / "1" / "model.py"
    model.write_text("import no_such_library\n" + model.read_text())
    why = "control: ModuleNotFoundError: No module named 'no_such_library'"
    assert last_line(tmp_path, "--repository", str(broken)) == f"{ended}{why}"


def filled() -> tuple[int, int]:
    """A pipe that takes no more: its reader has stopped, as a terminal does at Ctrl-S."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, bytes(4096))
    os.set_blocking(writing, True)
    return reading, writing


@pytest.mark.parametrize("way", ["gone", "stuck"])
def test_a_worker_is_replaced_though_nobody_reads(way: str) -> None:
    """Standard output and error: a pipe without a reader, or one whose reader has stopped."""
    reading, writing = filled() if way == "stuck" else os.pipe()
    if way == "gone":
        os.close(reading)
    ports = Ports.free()
    numbers = [f"--{name}-port={getattr(ports, name)}" for name in ("http", "grpc", "metrics")]
    command = [sys.executable, "-m", "fluxserve", "serve", *numbers]
    process = subprocess.Popen(command, cwd=ROOT, stdout=writing, stderr=writing)
    try:
        started = Started(process, ports, Path(os.devnull))
        ready(started)
        (table,) = Path("/dev/shm").glob(f"fluxserve-{process.pid}-*-inflight")
        workers = ProcessTable.beside(table)
        (worker,) = workers.pids("generate")
        os.kill(worker, signal.SIGKILL)
        wait_for(lambda: workers.pids("generate") not in ([], [worker]), READY_S)
        ready(started)
        assert started.client.draw(**SMALL)["images"].shape == (1,)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        for end in (writing,) if way == "gone" else (reading, writing):
            os.close(end)


def test_a_closed_terminal_drains(tmp_path: Path) -> None:
    """SIGHUP is heard as SIGTERM is. On an address by its name."""
    with fluxserve(tmp_path / "log", "--address", "localhost") as started:
        ready(started)
        started.process.send_signal(signal.SIGHUP)
        assert started.process.wait(30) == 0


def test_pings_end_no_request(server) -> None:  # type: ignore[no-untyped-def]
    """Triton's own bound is one ping in five minutes, and the third within it closes the connection."""
    long = {"height": 512, "width": 512, "num_inference_steps": 70}
    with Client(f"grpc://{server.grpc_url}", keepalive=1.0) as client:
        assert len(client.generate("a red apple", **long).image) > 1000
    assert plain(server, "grpc").draw(**SMALL)["images"].shape == (1,)
