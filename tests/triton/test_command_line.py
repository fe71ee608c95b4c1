"""Both command lines against a running server: shells, proxies and ports as people have them."""

import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from fluxserve.cli.main import main
from fluxserve.supervisor import TritonServer

pytestmark = pytest.mark.xdist_group("triton")

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    former = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, former)


def urls(server: TritonServer) -> dict[str, str]:
    return {"grpc": f"grpc://{server.grpc_url}", "http": f"http://{server.http_url}"}


def shell(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "client" / "src")]), **environment}
    return subprocess.run([sys.executable, "-m", *arguments], env=env, capture_output=True, timeout=120, check=False)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a" * 5000], "prompt: got 5000 bytes; allowed: 1 to 4096 bytes of UTF-8 text"),
        ([""], "prompt: got 0 bytes; allowed: 1 to 4096 bytes of UTF-8 text"),
        (["a fox", "--seed", "-2"], "seed: got -2; allowed: -1 (draw one) or 0 to 9223372036854775807"),
        (["a fox", "--seed", str(2**70)], f"seed: got {2**70}, expected -{2**63} to {2**63 - 1} (int64)"),
        (["\udcff"], "prompt: not valid Unicode text"),
    ],
)
def test_what_the_server_refuses_is_one_line(
    server: TritonServer, capsys: pytest.CaptureFixture[str], protocol: str, arguments: list[str], message: str
) -> None:
    assert main(["demo", "--server", urls(server)[protocol], "-o", "fox.png", *arguments]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"fluxserve: {message}") and said.count("\n") == 1
    assert not Path("fox.png").exists()


PROXIES = ("http_proxy", "https_proxy", "grpc_proxy", "ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy")


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_no_proxy_is_asked_for_this_machine(server: TritonServer, protocol: str) -> None:
    """A proxy that does not exist, with no exception for loopback."""
    nowhere = dict.fromkeys(PROXIES, "http://127.0.0.1:1") | {"no_proxy": "", "NO_PROXY": ""}
    for url in (urls(server)[protocol], urls(server)[protocol].replace("127.0.0.1", "localhost")):
        ended = shell("fluxserve", "demo", "a fox", "--server", url, "-o", "fox.png", **nowhere)
        assert (ended.returncode, ended.stderr) == (0, b"")
    assert Image.open("fox.png").size == (128, 128)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_of_any_encoding(server: TritonServer, encoding: str) -> None:
    url = urls(server)["grpc"]
    ended = shell("fluxserve", "demo", "ein 狐 …", "--server", url, "-o", "füchse.png", PYTHONIOENCODING=encoding)
    assert (ended.returncode, ended.stderr) == (0, b"")
    said = ended.stdout.decode(encoding)
    assert ("狐" if encoding == "utf-8" else "\\u72d0") in said
    arguments = ["generate", "ein 狐", "--url", url, "-o", "狐.png"]
    ended = shell("fluxserve_client", *arguments, PYTHONIOENCODING=encoding)
    assert ended.returncode == 0 and b"Traceback" not in ended.stderr
    assert ("128 x 128" if encoding == "ascii" else "128 × 128") in ended.stdout.decode(encoding)
    assert Path("狐.png").exists()


@pytest.mark.parametrize(
    ("protocol", "port", "question"),
    [
        ("grpc", "http", "is that the HTTP port, or one with TLS? Triton's port for gRPC is 8001"),
        ("http", "grpc", "is that the gRPC port, or one with TLS? Triton's port for HTTP is 8000"),
        ("grpc", "metrics", "is that the HTTP port"),
        ("grpcs", "grpc", "is that a port without TLS?"),
        ("https", "http", "is that a port without TLS?"),
        ("grpcs", "http", "is that a port without TLS?"),
        ("https", "grpc", "is that a port without TLS?"),
    ],
)
def test_the_other_port(
    server: TritonServer, capsys: pytest.CaptureFixture[str], protocol: str, port: str, question: str
) -> None:
    url = f"{protocol}://127.0.0.1:{getattr(server.ports, port)}"
    assert main(["serve", "--server", url]) == 1
    said = capsys.readouterr().err
    assert question in said and said.count("\n") == 1


def test_a_picture_is_drawn_though_nobody_reads(server: TritonServer) -> None:
    command = [sys.executable, "-m", "fluxserve", "demo", "a fox", "--server", urls(server)["grpc"], "-o", "fox.png"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "client" / "src")])}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (1, b"fluxserve: [Errno 32] Broken pipe\n")
    assert Image.open(io.BytesIO(Path("fox.png").read_bytes())).size == (128, 128)
