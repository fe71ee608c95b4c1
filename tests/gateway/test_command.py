"""The command, as a process: keys, TLS, a proxy's headers, what it refuses to start with, and how it ends."""

from __future__ import annotations

import fcntl
import io
import json
import logging
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fluxserve_gateway.cli import main
from fluxserve_gateway.log import Lines
from fluxserve_gateway.serve import Listening, fleet_of

from tests.client.fakes import FakeFlux, Wire
from tests.gateway.serving import Gateway, wait_for

COMMAND = (sys.executable, "-m", "fluxserve_gateway")


def run(*arguments: object) -> tuple[int, str, str]:
    """Status and output of the command, in this process."""
    out, error = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(error):
        try:
            code = main(list(map(str, arguments)))
        except SystemExit as ended:  # argparse's
            code = int(ended.code or 0)
    return code, out.getvalue(), error.getvalue()


class Process:
    """`fluxserve-gateway serve` on a free port, with the lines that it printed."""

    def __init__(self, process: subprocess.Popen[str], port: int, scheme: str) -> None:
        self.process, self.url = process, f"{scheme}://localhost:{port}"
        self.lines: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        if self.process.stdout is None:  # a test's own
            return
        self.lines += (json.loads(line) for line in self.process.stdout)

    def end(self, signal_number: int = signal.SIGTERM) -> int:
        self.process.send_signal(signal_number)
        code = self.process.wait(15)
        self._reader.join(5)
        return code


@contextmanager
def serving(*arguments: object, scheme: str = "http", log: int = subprocess.PIPE) -> Iterator[Process]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [*COMMAND, "serve", "--port", str(port), *map(str, arguments)]
    with subprocess.Popen(words, stdout=log, text=True) as process:
        found = Process(process, port, scheme)
        try:
            wait_for(lambda: process.poll() is not None or _open(port), 60)
            yield found
        finally:
            process.kill()


def _open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_keys_serve_and_sigterm(fake: FakeFlux, tmp_path: Path) -> None:
    keys = ("keys", "--keys", tmp_path / "folder" / "keys")
    code, out, _ = run(*keys, "create", "alice", "--at-a-time", 3)
    key_id, secret = out.split()
    assert code == 0
    header = {"authorization": f"Bearer {secret}"}
    fake.steps, fake.step_s = 10, 0.05
    with Wire(fake) as wire, serving("--server", f"m={wire.url('grpc')}", "--keys", keys[2]) as gateway:
        answers: list[httpx2.Response] = []
        call = threading.Thread(
            target=lambda: answers.append(
                httpx2.post(f"{gateway.url}/v1/images/generations", json={"prompt": "a"}, headers=header, timeout=20)
            )
        )
        call.start()
        wait_for(lambda: fake.table)
        assert gateway.end() == 0  # what runs is finished first
        call.join()
    assert answers[0].status_code == 200
    (line,) = [line for line in gateway.lines if "request_id" in line]
    assert (line["key"], line["status"], line["caller"]) == (key_id, 200, "127.0.0.1")
    assert all("time" in line for line in gateway.lines)
    assert run(*keys, "revoke", key_id)[0] == 0
    assert run(*keys, "list")[1].split("\t")[:4:2] == [key_id, "revoked"]
    code, _, error = run(*keys, "revoke", key_id)
    assert (code, error.count("\n")) == (1, 1)


def test_tls_and_a_proxy_that_is_believed(fake: FakeFlux, certificate: tuple[Path, Path]) -> None:
    chain, key = certificate
    options = ("--no-auth", "--tls-cert", chain, "--tls-key", key, "--proxy", "127.0.0.1")
    with Wire(fake) as wire, serving("--server", f"m={wire.url('http')}", *options, scheme="https") as gateway:
        trust = ssl.create_default_context(cafile=chain)
        answer = httpx2.get(f"{gateway.url}/v1/models", verify=trust, headers={"x-forwarded-for": "192.0.2.7"})
        assert answer.status_code == 200
        assert "strict-transport-security" in answer.headers
        assert "server" not in answer.headers
        assert gateway.end(signal.SIGINT) == 0
    assert [line["caller"] for line in gateway.lines if "request_id" in line] == ["192.0.2.7"]


def test_a_proxy_that_was_not_named_is_not_believed(fake: FakeFlux) -> None:
    with Wire(fake) as wire, serving("--server", f"m={wire.url('grpc')}", "--no-auth") as gateway:
        httpx2.get(f"{gateway.url}/v1/models", headers={"x-forwarded-for": "192.0.2.7"})
        gateway.end()
    assert [line["caller"] for line in gateway.lines if "request_id" in line] == ["127.0.0.1"]


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--no-auth", "--host", "0.0.0.0", "--server", "m=localhost"], 2, "loopback"),
        (["--no-auth", "--host", "::", "--server", "m=localhost"], 2, "loopback"),
        (["--no-auth"], 2, "MODEL=URL"),
        (["--no-auth", "--server", "localhost"], 2, "MODEL=URL"),
        (["--no-auth", "--server", "m=ftp://a"], 2, "scheme"),
        (["--no-auth", "--server", "m=a", "--tls-cert", "a.pem"], 2, "both or neither"),
        (["--no-auth", "--server", "m=a", "--proxy", "*"], 2, "IPv4 or IPv6"),
        (["--server", "m=a", "--keys", "/nonexistent/keys"], 1, "keys create"),
        (["--no-auth", "--server", "m=a", "--timeout", "0"], 2, "1 or more"),
        (
            ["--no-auth", "--server", "m=a", "--trace", "localhost:4318"],
            2,
            "trace: got 'localhost:4318'; expected an OTLP",
        ),
        (["--no-auth", "--server", "m=a", "--port", "65536"], 2, "port: got 65536; allowed: 0 to 65535"),
        (["--no-auth", "--server", "m=a", "--port", "-1"], 2, "port: got -1"),
        (["--server", "m=a", "--keys", "/\x1b/狐"], 1, "keys: /\\x1b/狐"),
    ],
)
def test_what_it_does_not_start_with(words: list[str], status: int, said: str) -> None:
    code, out, error = run("serve", "--port", "0", *words)
    assert (code, out) == (status, "")
    assert said in error
    assert "Traceback" not in error


@pytest.mark.parametrize("bare", [True, False])
def test_the_authorities_hold_for_a_server_without_a_scheme(
    fake: FakeFlux, certificate: tuple[Path, Path], bare: bool
) -> None:
    with Wire(fake, certificate) as wire:
        url = wire.url("grpc").removeprefix("grpcs://") if bare else wire.url("http")
        with Gateway(fleet_of([f"m={url}"], certificate[0])) as gateway:
            assert gateway.post(json={"prompt": "a"}).status_code == 200
    with pytest.raises(ValueError, match=r"server-ca: got .* no server behind TLS"):
        fleet_of(["m=grpc://localhost:1", "m=HTTP://localhost:2"], certificate[0])


def shell(command: str) -> subprocess.CompletedProcess[str]:
    """Run a line of sh in which $GATEWAY is the command."""
    environment = {**os.environ, "GATEWAY": " ".join(COMMAND)}
    return subprocess.run(["/bin/sh", "-c", command], env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("redirection", ["<&- >&- 2>&-", ">/dev/full 2>&1"])
def test_streams_that_take_nothing(tmp_path: Path, redirection: str) -> None:
    keys = f"$GATEWAY keys --keys {tmp_path}/keys"
    ended = shell(f"{keys} create a {redirection}; {keys} list; echo $?")
    assert "Traceback" not in ended.stderr
    name, *status = ended.stdout.split("\t")[3].split()
    assert (name, status) == ("a", ["0"])  # the file of keys is one, whatever number it got


def test_a_reader_that_left(tmp_path: Path) -> None:
    run("keys", "--keys", tmp_path / "keys", "create", "a")
    ended = shell(f"{{ sleep 0.1; $GATEWAY keys --keys {tmp_path}/keys list; echo $? >&2; }} | true")
    assert ended.stderr == "fluxserve-gateway: [Errno 32] Broken pipe\n1\n"


def test_an_address_in_use(fake: FakeFlux) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = shell(f"$GATEWAY serve --no-auth --server m=grpc://localhost:1 --port {port}")
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert f"port {port}; the log says why" in ended.stderr
    assert "address already in use" in ended.stdout


def test_a_log_that_nobody_reads_stops_nobody(fake: FakeFlux) -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    try:
        with Wire(fake) as wire, serving("--server", f"m={wire.url('grpc')}", "--no-auth", log=writer) as gateway:
            with httpx2.Client(base_url=gateway.url, timeout=10) as client:
                for _ in range(40):  # lines of 200 bytes
                    assert client.get("/v1/models").status_code == 200
            assert gateway.end() == 0
    finally:
        os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        assert len(pipe.read()) > 3000


def test_dropped_lines_are_counted() -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    lines = Lines(writer, most=5)
    for number in range(20):
        lines.handle(logging.makeLogRecord({"msg": f"{number} {'a' * 1000}"}))
        time.sleep(0.01)  # the thread takes what the pipe takes
    os.set_blocking(reader, False)
    wait_for(lambda: lines._waiting.full())
    got = b""
    with os.fdopen(reader, "rb", buffering=0) as pipe:

        def drained() -> bool:
            nonlocal got
            got += pipe.read() or b""
            return lines._waiting.empty()

        wait_for(drained)
        lines.handle(logging.makeLogRecord({"msg": "last"}))
        lines.close()
        got += pipe.read() or b""
    os.close(writer)
    said = [json.loads(line)["message"].split() for line in got.decode().splitlines()]
    kept = [words[0] for words in said if words[0].isdecimal()]
    (dropped,) = [int(words[-1]) for words in said if words[0] == "lines"]
    assert dropped > 5
    assert len(kept) + dropped == 20
    assert said[-1] == ["last"]


def test_one_server_of_two_names_is_one() -> None:
    fleet = fleet_of(["a=grpc://h:1", "b=grpc://h:1", "a=grpc://h:2", "a=grpc://h:1"])
    assert [server.url for server in fleet.servers] == ["grpc://h:1", "grpc://h:2"]
    assert {name: len(servers) for name, servers in fleet.models.items()} == {"a": 2, "b": 1}


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("10.0.0.1", False), ("example.com", False)],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert Listening(host).is_loopback == loopback


def test_it_needs_neither_torch_nor_the_server() -> None:
    code = "import sys, fluxserve_gateway.cli; sys.exit(str({'torch', 'fluxserve'} & set(sys.modules) or ''))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=60)
    assert re.fullmatch(r"\s*", ended.stderr), ended.stderr
