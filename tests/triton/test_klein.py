"""A FLUX.2-klein of random weights served through Triton and both protocols, as FLUX.1 is."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fluxserve.installation import bundled
from fluxserve.server import Ports, TritonServer
from tests.support import random_klein
from tests.triton.conftest import REPOSITORY, PlainClient, drawn_by, pixels, plain

pytestmark = pytest.mark.xdist_group("klein")

READY_S = 120.0
FIELDS: dict[str, object] = {"prompt": "a fox on a blue background", "seed": 11, "height": 112, "width": 144}


@pytest.fixture(scope="module")
def folder() -> Path:
    return random_klein.make().folder


@pytest.fixture(scope="module")
def served(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    log = tmp_path_factory.mktemp("log") / "triton"
    options = {"checkpoint": str(folder)}
    with log.open("wb") as out, TritonServer(REPOSITORY, Ports.free(), bundled(), out, options) as running:
        running.start()
        running.wait_ready(READY_S)
        yield running


@pytest.fixture(params=["grpc", "http"])
def client(request: pytest.FixtureRequest, served: TritonServer) -> PlainClient:
    return plain(served, request.param)


def test_a_prompt_becomes_a_picture(client: PlainClient, folder: Path) -> None:
    answer = client.draw(**FIELDS, num_images=2)
    assert answer["seeds"].tolist() == [11, 12]
    first, second = map(pixels, answer["images"])
    assert np.abs(first.astype(int) - drawn_by({"checkpoint": str(folder)}, FIELDS)).max() <= 1
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("guidance_scale", 3.5, "nothing, or 1 for none: custom is distilled to be drawn without"),
        ("num_inference_steps", 50, "1 to 8"),
        ("strength", 0.5, "only beside an image"),
    ],
)
def test_what_makes_no_sense_for_the_model(client: PlainClient, field: str, value: float, allowed: str) -> None:
    status, message = client.refused(lambda: client.draw(**FIELDS, **{field: value}))
    assert status == "INVALID_ARGUMENT"
    assert f"{field}: got {value}; allowed: {allowed}" in message
