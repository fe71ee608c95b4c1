"""The command line: what it sends, what it writes and says, and how it exits."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fluxserve_client import InvalidRequest, MockTransport, Progress, State
from fluxserve_client.cli import main
from fluxserve_client.show import progress_display
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.client.fakes import FakeFlux, Wire

Run = Callable[..., int]


def picture(colour: tuple[int, int, int], format_: str = "png") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 16), colour).save(file, format_)
    return file.getvalue()


@pytest.fixture
def run(fake: FakeFlux, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: main(arguments, MockTransport(fake))


def inputs(fake: FakeFlux) -> dict[str, object]:
    [(_, tensors)] = fake.requests
    return {name: tensor[0] for name, tensor in tensors.items()}


def test_one_picture(fake: FakeFlux, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", "a fox", "-o", "fox.png") == 0
    assert Path("fox.png").read_bytes().startswith(b"\x89PNG")
    assert inputs(fake) == {"prompt": b"a fox", "output_format": b"png"}
    out = capsys.readouterr().out
    for part in ("fox.png", "16 × 32", "seed    5", "denoise 30 ms", "total 36 ms"):
        assert part in out


def test_several_images(fake: FakeFlux, run: Run) -> None:
    for name in ("a.png", "b.png"):
        Path(name).write_bytes(name.encode())
    assert run("generate", "a fox", "-o", "fox.png", "--image", "a.png", "--image", "b.png") == 0
    assert list(fake.requests[0][1]["image"]) == [b"a.png", b"b.png"]


def test_every_option(fake: FakeFlux, run: Run) -> None:
    fake.pictures = (picture((1, 2, 3), "webp"),)
    Path("in.png").write_bytes(b"\x89PNGin")
    options = "--height 64 --width 96 --steps 9 --guidance 3.5 --seed -1 --image in.png --strength 0.5 --embed-prompt"
    options += " --negative-prompt cat --true-cfg-scale 4.5"
    assert run("generate", "a fox", "-o", "fox.webp", *options.split(), "--quality", "80", "--request-id", "me") == 0
    assert fake.requests[0][0] == "me"
    assert inputs(fake) == {
        "prompt": b"a fox",
        "height": 64,
        "width": 96,
        "num_inference_steps": 9,
        "guidance_scale": 3.5,
        "seed": -1,
        "image": b"\x89PNGin",
        "strength": 0.5,
        "negative_prompt": b"cat",
        "true_cfg_scale": 4.5,
        "output_format": b"webp",
        "quality": 80,
        "embed_prompt": True,
    }


def test_several_make_a_sheet(fake: FakeFlux, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    fake.pictures = tuple(picture((60 * k, 0, 0)) for k in range(4))
    assert run("generate", "a fox", "-n", "4", "-o", "foxes.jpg", "--quality", "95") == 0
    sheet = Image.open("foxes.jpg")
    assert (sheet.size, sheet.format) == ((64, 32), "JPEG")
    assert abs(sheet.getpixel((48, 24))[0] - 180) < 8  # the fourth, bottom right
    assert inputs(fake)["output_format"] == b"png"  # quality is lost once, in the sheet
    assert "seed    5 6 7 8" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["foxes.png", "foxes.jpg", "foxes.webp"])
def test_a_sheet_says_what_its_pictures_said(fake: FakeFlux, run: Run, name: str) -> None:
    texts = PngInfo()
    texts.add_itxt("XML:com.adobe.xmp", "<x>a machine made it</x>")
    file = io.BytesIO()
    Image.new("RGB", (32, 16)).save(file, "png", pnginfo=texts)
    fake.pictures = (file.getvalue(),) * 2
    assert run("generate", "a fox", "-n", "2", "-o", name) == 0
    assert Image.open(name).info["xmp"] == b"<x>a machine made it</x>"


def test_several_apart(fake: FakeFlux, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    fake.pictures = (b"one", b"two")
    assert run("generate", "a fox", "-n", "2", "--separate", "-o", "fox.raw", "--json") == 0
    assert [Path(f"fox-{k}.raw").read_bytes() for k in (1, 2)] == [b"one", b"two"]
    told = json.loads(capsys.readouterr().out)
    assert told["files"] == ["fox-1.raw", "fox-2.raw"]
    assert told["seeds"] == [5, 6]
    assert told["timings_ms"]["total"] == 36


def test_a_prompt_from_standard_input(fake: FakeFlux, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a long\nprompt\n"))
    assert run("generate", "-") == 0
    assert inputs(fake)["prompt"] == b"a long\nprompt"


def test_progress_in_lines_and_quiet(fake: FakeFlux, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    fake.steps, fake.step_s = 4, 0.1
    assert run("generate", "a fox") == 0
    assert "running 2/4\n" in capsys.readouterr().err
    assert Path("fluxserve.png").exists(), "the file of whoever names none"
    assert run("generate", "a fox", "-q") == 0
    assert capsys.readouterr().err == ""


def test_progress_as_a_bar_on_a_terminal() -> None:
    terminal = io.StringIO()
    with progress_display(terminal, bar=True) as progress:
        assert progress is not None
        progress(Progress(State.RUNNING, 10, 20))
    shown = terminal.getvalue()
    assert "[###############...............] running 10/20, 0.0 s" in shown
    assert shown.endswith("\r\x1b[K")  # gone when the report comes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "a fox", "-o", "fox.gif"], "--output: got 'fox.gif', expected .png, .jpg or .webp"),
        (["generate", "a fox", "-o", "fox.raw", "-n", "2"], ".raw: no sheet of several"),
        (["generate", "a fox", "-o", "no/fox.png"], "there is no folder 'no'"),
        (["generate", "a fox", "--image", "none.png"], "none.png"),
        (["generate", "a fox", "--header", "nonsense"], "--header: got 'nonsense', expected KEY=VALUE"),
        (["generate", "a fox", "--request-id", "a\tb"], "request_id: got 'a"),
        (["generate", "a fox", "--request-id", "é" * 65], "request_id: got 'é"),
        (["generate", "a fox", "-o", "folder.png"], "'folder.png' is a folder"),
        (["generate", "a fox", "--image", "folder.png"], "Is a directory"),
        (["generate", "a fox", "--seed", str(2**70)], "seed: got"),
        (["generate", "a fox", "--timeout", "nan"], "timeout: got nan"),
        (["generate", "\udcff"], "prompt: not valid Unicode text"),
        (["cancel", ""], "request_id: got ''"),
        (["health", "--cert", "c.pem"], "cert, key: got one of them"),
    ],
)
def test_wrong_usage(
    fake: FakeFlux, run: Run, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    Path("folder.png").mkdir()
    assert run(*arguments) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert fake.requests == []


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--url", "ftp://x"], 2, "url: got scheme 'ftp'"),
        (["--url", "http://x:99999"], 2, "url: got 'http://x:99999'"),
        (["--url", "grpc://[::1"], 2, "url: got 'grpc://[::1'"),
        (["--url", "http://x", "--header", "a b=c"], 2, "headers: got 'a b'"),
        (["--url", "https://x", "--ca", "none.pem"], 2, "none.pem"),
        (["--url", "grpcs://x", "--ca", "none.pem"], 2, "none.pem"),
        (["--url", "http://x", "--keepalive", "10"], 2, "keepalive: got 10.0 over http"),
        (["--url", "grpc://127.0.0.1:1"], 1, "failed to connect"),
        (["--url", "http://127.0.0.1:1"], 1, "Cannot connect"),
    ],
)
def test_addresses_that_lead_nowhere(
    capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, message: str
) -> None:
    assert main(["health", *arguments]) == status
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["paint"], ["generate"], ["generate", "a fox", "--height", "tall"]])
def test_wrong_usage_that_argparse_finds(run: Run, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2


def test_what_the_server_refuses(fake: FakeFlux, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    fake.error = InvalidRequest("height: got 17; allowed: multiples of 16")
    assert run("generate", "a fox", "--height", "17") == 1
    assert capsys.readouterr().err == "fluxserve-client: error: height: got 17; allowed: multiples of 16\n"
    assert not Path("fluxserve.png").exists()


def test_a_message_is_one_line_without_control_characters(
    fake: FakeFlux, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.error = InvalidRequest("prompt:\n  got \x1b[2Jnothing\x00")
    assert run("generate", "a fox") == 1
    assert capsys.readouterr().err == "fluxserve-client: error: prompt: got \\x1b[2Jnothing\\x00\n"


def test_a_timeout(fake: FakeFlux, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    fake.steps, fake.step_s = 1000, 0.01
    assert run("generate", "a fox", "-q", "--timeout", "0.1", "--request-id", "x") == 1
    assert "no answer within 0.1 s" in capsys.readouterr().err
    assert fake.actions == [("x", "cancel")]


def test_status_cancel_health(fake: FakeFlux, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("status", "x") == 0
    assert run("cancel", "x") == 1
    assert run("health") == 0
    assert capsys.readouterr().out == "unknown\nno request x is in flight\nready\n"
    fake.control_error = InvalidRequest("broken")
    assert run("status", "x") == 1


def test_status_cancel_health_for_programs(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["status", "x"], ["cancel", "x"], ["health"]):
        run(*command, "--json")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        {"request_id": "x", "state": "unknown", "step": 0, "steps": 0},
        {"request_id": "x", "state": "unknown"},
        {"ready": True},
    ]


def test_not_ready(fake: FakeFlux, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["health"], MockTransport(fake, ready_models=[])) == 1
    assert capsys.readouterr().out == "not ready\n"


@pytest.mark.parametrize(
    ("protocol", "number", "status"),
    [
        ("grpc", signal.SIGINT, 130),
        ("http", signal.SIGINT, 130),
        ("http", signal.SIGTERM, 143),
        ("http", signal.SIGHUP, 129),
    ],
)
def test_signals(
    fake: FakeFlux, wire: Wire, tmp_path: Path, protocol: str, number: signal.Signals, status: int
) -> None:
    fake.steps, fake.step_s = 2000, 0.01
    command = [sys.executable, "-m", "fluxserve_client", "generate", "a fox", "--url", wire.url(protocol)]
    header = ["--header", "X-Team=foxes"]
    with subprocess.Popen(
        [*command, *header], cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        end = time.monotonic() + 20
        while not fake.table and time.monotonic() < end:
            time.sleep(0.01)
        [name] = fake.table
        process.send_signal(number)
        said = process.communicate(timeout=20)[1]
    assert process.returncode == status
    assert said.splitlines()[-1] == "fluxserve-client: stopped"
    assert "Traceback" not in said
    assert (name, "cancel") in fake.actions
    assert fake.headers[0]["x-team"] == "foxes"
    assert list(tmp_path.iterdir()) == []


def shell(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line of sh in which $CLIENT is the program."""
    env = {**os.environ, "CLIENT": f"{sys.executable} -m fluxserve_client", **environment}
    return subprocess.run(
        ["/bin/sh", "-c", command], cwd=folder, env=env, capture_output=True, text=True, errors="replace"
    )


@pytest.mark.parametrize(
    ("redirection", "status", "said"),
    [
        (">&-", 0, ""),
        ("2>&-", 0, ""),
        ("> /dev/full", 2, "fluxserve-client: error: [Errno 28] No space left on device\n"),
    ],
)
def test_streams_that_take_nothing(wire: Wire, tmp_path: Path, redirection: str, status: int, said: str) -> None:
    ended = shell(f"$CLIENT generate -q fox --url {wire.url('http')} {redirection}", tmp_path)
    assert (ended.returncode, ended.stderr) == (status, said)
    assert (tmp_path / "fluxserve.png").exists()


@pytest.mark.parametrize(
    ("command", "said"),
    [("health --url $URL", "fluxserve-client: error: [Errno 32] Broken pipe\n1\n"), ("--help", "0\n")],
)
def test_a_reader_that_left(wire: Wire, tmp_path: Path, command: str, said: str) -> None:
    ended = shell(f"{{ sleep 0.1; $CLIENT {command}; echo $? >&2; }} | true", tmp_path, URL=wire.url("http"))
    assert ended.stderr == said


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_of_another_encoding(wire: Wire, tmp_path: Path, encoding: str) -> None:
    ended = shell(f"$CLIENT generate 狐 -o 狐.png --url {wire.url('http')}", tmp_path, PYTHONIOENCODING=encoding)
    assert (ended.returncode, "Traceback" in ended.stderr) == (0, False)
    assert ended.stdout.startswith("\\u72d0.png\nsize    16 ")
    ended = shell(f"$CLIENT generate fox -o 狐.gif --url {wire.url('http')}", tmp_path, PYTHONIOENCODING=encoding)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "\\u72d0.gif" in ended.stderr


@pytest.mark.parametrize("locale", [{"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_a_locale_without_letters(fake: FakeFlux, wire: Wire, tmp_path: Path, locale: dict[str, str]) -> None:
    ended = shell(f"$CLIENT generate 'a fox' -o 狐.png --url {wire.url('http')}", tmp_path, **locale)
    assert (ended.returncode, "Traceback" in ended.stderr) == (0, False)
    assert (tmp_path / "狐.png").exists()


@pytest.mark.parametrize(("term", "bar"), [("xterm", True), ("dumb", False)])
def test_a_bar_only_where_a_terminal_can_clear_its_line(
    fake: FakeFlux, wire: Wire, tmp_path: Path, term: str, bar: bool
) -> None:
    fake.steps, fake.step_s = 4, 0.1
    seen, child = pty.openpty()
    command = [sys.executable, "-m", "fluxserve_client", "generate", "a fox", "--url", wire.url("http")]
    environment = {**os.environ, "TERM": term}
    subprocess.run(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=child, check=True)
    os.close(child)
    shown = os.read(seen, 100_000)
    os.close(seen)
    assert b"running" in shown
    assert (b"\x1b[K[" in shown) == bar
