"""The examples run, against the fake server on its own ports."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
from fluxserve_client import AsyncClient, Unavailable

from tests.client.fakes import FakeFlux, Wire
from tests.support import programs

EXAMPLES = Path(__file__).parents[2] / "client" / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_plain(
    fake: FakeFlux,
    wire: Wire,
    protocol: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    example = load(f"plain_{protocol}")
    real = example.triton.InferenceServerClient
    address = wire.url(protocol).removeprefix(f"{protocol}://")
    monkeypatch.setattr(example.triton, "InferenceServerClient", lambda url, **options: real(address, **options))
    example.main("a fox", tmp_path / "fox.png")
    assert (tmp_path / "fox.png").read_bytes() == fake.answer({})["images"][0]
    assert "32 × 16, seed 7" in capsys.readouterr().out


async def test_async_many(fake: FakeFlux, wire: Wire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("async_many")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(example, "AsyncClient", lambda url: AsyncClient(wire.url("grpc")))
    await example.main(["a fox", "an owl", "a bear", "a cat", "a dog"])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a-bear.png",
        "a-cat.png",
        "a-dog.png",
        "a-fox.png",
        "an-owl.png",
    ]


def curl(wire: Wire, prompt: str, target: Path) -> subprocess.CompletedProcess[str]:
    for program in ("curl", "jq"):
        programs.needed(program)
    command = ["sh", str(EXAMPLES / "curl.sh"), prompt, str(target)]
    environment = {**os.environ, "URL": wire.url("http")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)


def test_curl(fake: FakeFlux, wire: Wire, tmp_path: Path) -> None:
    ended = curl(wire, 'a "fox"', tmp_path / "fox.png")
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "fox.png").read_bytes() == fake.answer({})["images"][0]
    assert {'{"seeds":[7]}', '{"image_size":[16,32]}'} < set(ended.stdout.splitlines())
    assert fake.requests[0][1]["prompt"][0] == b'a "fox"'


def test_curl_and_an_error(fake: FakeFlux, wire: Wire, tmp_path: Path) -> None:
    fake.error = Unavailable("Exceeds maximum queue size", status="UNAVAILABLE")
    ended = curl(wire, "a fox", tmp_path / "fox.png")
    assert ended.returncode == 1
    assert "HTTP 503" in ended.stderr
    assert not (tmp_path / "fox.png").exists()
