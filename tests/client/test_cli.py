"""The command line: what it sends, what it writes and says, and how it exits."""

from __future__ import annotations

import io
import json
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
    options = "--height 64 --width 96 --steps 9 --guidance 3.5 --seed -1 --image in.png --strength 0.5"
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
        "output_format": b"webp",
        "quality": 80,
    }


def test_several_make_a_sheet(fake: FakeFlux, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    fake.pictures = tuple(picture((60 * k, 0, 0)) for k in range(4))
    assert run("generate", "a fox", "-n", "4", "-o", "foxes.jpg", "--quality", "95") == 0
    sheet = Image.open("foxes.jpg")
    assert (sheet.size, sheet.format) == ((64, 32), "JPEG")
    assert abs(sheet.getpixel((48, 24))[0] - 180) < 8  # the fourth, bottom right
    assert inputs(fake)["output_format"] == b"png"  # quality is lost once, in the sheet
    assert "seed    5 6 7 8" in capsys.readouterr().out


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
    assert run("generate", "a fox", "-q") == 0
    assert capsys.readouterr().err == ""


def test_progress_as_a_bar_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    with progress_display(terminal, quiet=False) as progress:
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
        (["generate", "a fox", "--request-id", "a b"], "request_id: got 'a b'"),
        (["health", "--cert", "c.pem"], "cert, key: got one of them"),
    ],
)
def test_wrong_usage(
    fake: FakeFlux, run: Run, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err
    assert fake.requests == []


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


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_ctrl_c(fake: FakeFlux, wire: Wire, tmp_path: Path, protocol: str) -> None:
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
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=20)[1]
    assert process.returncode == 130
    assert said.splitlines()[-1] == "fluxserve-client: stopped"
    assert (name, "cancel") in fake.actions
    assert fake.headers[0]["x-team"] == "foxes"
    assert list(tmp_path.iterdir()) == []
