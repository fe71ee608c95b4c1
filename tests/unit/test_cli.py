"""The ways to start the program from a shell."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fluxserve_client import errors as client_errors

from fluxserve import __version__
from fluxserve.cli import main as cli
from fluxserve.cli.main import console
from tests.client.fakes import FakeFlux, Wire

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("module", ["fluxserve", "fluxserve.cli.main"])
def test_a_module_is_the_program(module: str) -> None:
    def started(argument: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", module, argument]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert started("--version").stdout.strip() == __version__
    refused = started("paint")
    assert refused.returncode == 2 and "invalid choice: 'paint'" in refused.stderr


@pytest.fixture
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("x")
    former = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, former)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "a" * 5000, "--server", "http://127.0.0.1:1"], "Cannot connect to host 127.0.0.1:1"),
        (["demo", "a fox", "--server", "grpc://127.0.0.1:1"], "failed to connect to all addresses"),
        (["demo", "a fox", "--server", "ftp://x"], "url: got scheme 'ftp'"),
        (["demo", "a fox", "--server", "http://x:99999"], "url: got 'http://x:99999'"),
        (["demo", "a fox", "--server", "none"], "none: no such file; expected a tritonserver binary"),
        (["demo", "a fox", "--repository", "none"], "none: no such folder; expected a model repository"),
        (["serve", "--server", "http://127.0.0.1:1"], "Cannot connect to host 127.0.0.1:1"),
        (["serve", "--server", "ftp://x"], "url: got scheme 'ftp'"),
        (["serve", "--server", "grpc://[::1"], "url: got 'grpc://[::1'"),
        (["serve", "--server", "none"], "none: no such file"),
        (["generate", "a" * 5000], "prompt: got 5000 bytes; allowed: 1 to 4096 bytes of UTF-8 text"),
        (["generate", "\udcff"], "prompt: got bytes that are not UTF-8 (at byte 0)"),
        (["generate", "a fox", "--height", "17"], "height: got 17"),
        (["generate", "a fox", "--seed", str(2**70)], "seed: got"),
        (["generate", "a fox", "--guidance-scale", "nan"], "guidance_scale: got nan"),
        (["generate", "a fox", "--checkpoint", "none"], "none: no such folder"),
        (["generate", "a fox", "--checkpoint", "n\x1bone"], "n\\x1bone: no such folder"),
        (["generate", "a fox", "--artifact", "file"], "file/manifest.json: unreadable"),
        (["generate", "a fox", "--engine", "nonsense"], "engine: got 'nonsense'"),
        (["repository", "file"], "file: got a path that can't be made"),
        (["repository", "new", "--checkpoint", "none"], "none: no such folder"),
        (["export", "none", "--out", "o"], "none: no such folder"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value)[:40],
)
@pytest.mark.usefixtures("_in_a_folder")
def test_an_error_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert cli.main(arguments) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1, said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "a fox", "-o", "folder.png"], "folder.png: is a folder"),
        (["generate", "a fox", "-o", "folder.png"], "folder.png: is a folder"),
        (["generate", "a fox", "-o", "none/fox.png"], "none: no such folder"),
        (["generate", "a fox", "-o", "fox.gif"], "got 'fox.gif'"),
        (["generate", "a fox", "--seed", "x"], "invalid int value: 'x'"),
        (["generate", "a fox", "--model", "x"], "invalid choice: 'x'"),
        (["repository", "new", "--gpus", "-1"], "got '-1'"),
        (["repository", "new", "--gpus", "x"], "got 'x'"),
        (["export"], "required"),
        ([], "required"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
@pytest.mark.usefixtures("_in_a_folder")
def test_wrong_usage(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("_in_a_folder")
def test_doctor_asks_a_server_that_runs_already(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--server", "http://127.0.0.1:1"]) == 1
    assert "FAIL  tritonserver: Cannot connect to host 127.0.0.1:1" in capsys.readouterr().out


SERVER_ERRORS = [
    ("INVALID_ARGUMENT", "prompt: got 0 bytes", "InvalidRequest"),
    ("ALREADY_EXISTS", "request_id: 'a' is in use", "RequestIdInUse"),
    ("UNAUTHENTICATED", "who are you", "AccessDenied"),
    ("UNAVAILABLE", "server: it is shutting down", "Unavailable"),
    ("UNAVAILABLE", "queue: 64 requests are waiting", "QueueFull"),
    ("CANCELLED", "cancelled at step 3", "Cancelled"),
    ("DEADLINE_EXCEEDED", "too late", "DeadlineExceeded"),
    ("INTERNAL", "a fault", "ServerError"),
]


@pytest.mark.usefixtures("_in_a_folder")
@pytest.mark.parametrize("prompt", ["a fox", ""])
def test_every_error_of_the_client_is_one_line(prompt: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The client's errors have a root of their own, under names that are also ours: none may pass as a traceback."""
    fake, raised = FakeFlux(), []
    with Wire(fake) as wire:
        for status, message, _ in SERVER_ERRORS:
            fake.error = client_errors.from_status(f"StatusCode.{status}", message)
            raised.append(type(fake.error).__name__)
            assert cli.main(["demo", prompt, "--server", wire.url("grpc")]) == 1
            assert capsys.readouterr().err == f"fluxserve: {message}\n"
    assert raised == [name for *_, name in SERVER_ERRORS]


def test_the_errors_above_are_all_of_the_clients() -> None:
    """But one: `ConnectionFailed`, for which nothing answers."""
    named = {name for name, kind in vars(client_errors).items() if isinstance(kind, type)}
    kinds = {name for name in named if issubclass(getattr(client_errors, name), Exception)}
    assert kinds - {"FluxserveError", "ConnectionFailed"} == {name for *_, name in SERVER_ERRORS}
    assert all(issubclass(getattr(client_errors, name), client_errors.FluxserveError) for name in kinds)


@pytest.mark.usefixtures("_in_a_folder")
def test_without_the_client(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fluxserve_client", None)
    assert cli.main(["demo", "a fox", "--server", "http://127.0.0.1:1"]) == 1
    assert "fluxserve_client: not installed; expected the client" in capsys.readouterr().err


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line of sh in which $FLUXSERVE is the program."""
    env = {**os.environ, "FLUXSERVE": f"{sys.executable} -m fluxserve", **environment}
    run = subprocess.run(
        ["/bin/sh", "-c", command], cwd=ROOT, env=env, capture_output=True, text=True, errors="replace"
    )
    assert "Traceback" not in run.stderr
    return run


@pytest.mark.parametrize(
    ("command", "said"),
    [("doctor", "fluxserve: [Errno 32] Broken pipe\n1\n"), ("--help", "0\n")],
)
def test_a_reader_that_left(command: str, said: str) -> None:
    assert shell(f"{{ sleep 0.1; $FLUXSERVE {command}; echo $? >&2; }} | true").stderr.endswith(said)


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams(redirection: str) -> None:
    assert shell(f"$FLUXSERVE --version {redirection}").returncode == 0
    assert shell(f"$FLUXSERVE demo --server none {redirection}").returncode == 1


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_of_another_encoding(encoding: str) -> None:
    """A ticker's dots, and a path in an error."""
    ticks = "from fluxserve.console import *; prepare(); ticker = Ticker('waiting'); ticker(0); ticker.done(1.0)"
    ended = subprocess.run(
        [sys.executable, "-c", ticks], env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True, cwd=ROOT
    )
    assert (ended.returncode, ended.stdout) == (0, b"waiting ... 0 s\nwaiting: 1.0 s \n")
    refused = shell("$FLUXSERVE repository /狐/…", PYTHONIOENCODING=encoding)
    assert refused.returncode == 1
    assert refused.stderr.startswith("fluxserve: /\\u72d0/...: got a path that can't be made")


def test_what_a_terminal_would_obey_is_spelled_out() -> None:
    assert console.printable("a\nb\x1b[2J\udcff狐") == "a\nb\\x1b[2J\\udcff狐"


def test_ctrl_c_is_no_traceback(tmp_path: Path) -> None:
    binary = tmp_path / "tritonserver"
    binary.write_text("#!/bin/sh\nexec sleep 60\n")
    binary.chmod(0o755)
    command = [sys.executable, "-m", "fluxserve", "demo", "a fox", "--server", str(binary)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith("starting Triton")
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert (process.returncode, said) == (130, "")
