"""The tiny model served from exported ONNX, in float32 and in simulated FP8, through Triton and both protocols."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fluxserve.errors import ServerError
from fluxserve.supervisor import Ports, TritonServer
from fluxserve.supervisor.installation import bundled
from tests.support.exports import Exports
from tests.triton.conftest import READY_S, REPOSITORY, PlainClient, drawn_by, pixels, plain, serving

pytestmark = pytest.mark.xdist_group("export")


@pytest.fixture(scope="module", params=["fp32", "fp8"])
def artifact(request: pytest.FixtureRequest, export: Exports) -> Path:
    made = export("onnxruntime", request.param)
    assert made.status == 0, made.said
    return made.path


@pytest.fixture(scope="module")
def served(artifact: Path) -> Iterator[TritonServer]:
    with serving(artifact=str(artifact)) as server:
        yield server


@pytest.fixture(params=["grpc", "http"])
def client(request: pytest.FixtureRequest, served: TritonServer) -> PlainClient:
    return plain(served, request.param)


def test_what_the_engine_draws_comes_out(client: PlainClient, artifact: Path) -> None:
    fields = {"prompt": "a fox on a blue background", "seed": 11, "height": 112, "width": 144}
    (image,) = client.draw(**fields)["images"]
    assert np.abs(pixels(image).astype(int) - drawn_by({"artifact": str(artifact)}, fields)).max() <= 1


def test_it_is_the_picture_of_the_checkpoint(client: PlainClient, artifact: Path) -> None:
    fields = {"prompt": "a red apple on a white background", "seed": 2}
    (image,) = client.draw(**fields)["images"]
    expected = drawn_by({}, fields)
    error = np.mean((pixels(image).astype(float) - expected) ** 2)
    least = 45 if "fp32" in artifact.name else 25
    assert 10 * np.log10(255**2 / max(error, 1e-9)) > least


def test_a_size_beyond_the_profile_is_the_callers_error(client: PlainClient) -> None:
    status, message = client.refused(lambda: client.draw(height=272, width=128))
    assert status == "INVALID_ARGUMENT"
    assert "height: got 272" in message and "256" in message
    assert client.draw(height=256, width=256)["images"], "the largest is drawn, and the server goes on"


@pytest.mark.parametrize("damaged", ["transformer/any/model.onnx.data", "checkpoint/vae/config.json", "manifest.json"])
def test_a_damaged_artifact_fails_at_load_and_says_why(export: Exports, tmp_path: Path, damaged: str) -> None:
    folder = Path(shutil.copytree(export("onnxruntime", "fp32").path, tmp_path / "damaged"))
    content = bytearray((folder / damaged).read_bytes())
    if damaged == "manifest.json":
        del content[len(content) // 2 :]
    else:
        content[len(content) // 2] ^= 1
    (folder / damaged).write_bytes(content)
    log, options = tmp_path / "log", {"artifact": str(folder)}
    with log.open("wb") as out, TritonServer(REPOSITORY, Ports.free(), bundled(), out, options) as server:
        server.start()
        with pytest.raises(ServerError, match="before it was ready"):
            server.wait_ready(READY_S)
    said = log.read_text(errors="replace")
    assert f"{folder / damaged}: " in said
    assert damaged == "manifest.json" or "It is not the file that was exported" in said
