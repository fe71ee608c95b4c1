"""A PixArt-Σ of random weights served through Triton and both protocols."""

from collections.abc import Iterator

import numpy as np
import pytest

from fluxserve.supervisor import TritonServer
from tests.support import random_pixart
from tests.triton.conftest import drawn_by, pixels, plain, serving

pytestmark = pytest.mark.xdist_group("pixart")

FIELDS: dict[str, object] = {"prompt": "a fox on a blue background", "seed": 11, "height": 64, "width": 96}
REFUSED = (
    ("strength", 0.5, "nothing: custom does not take it"),
    ("guidance_scale", 0.5, "a finite number from 1 to 30"),
    ("num_inference_steps", 101, "1 to 100"),
)


@pytest.fixture(scope="module")
def served() -> Iterator[TritonServer]:
    with serving(checkpoint=str(random_pixart.make().folder)) as server:
        yield server


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_prompt_becomes_a_picture(served: TritonServer, protocol: str) -> None:
    """With guidance and without, as in this process; and what the model does not take is refused by name."""
    client, given = plain(served, protocol), {"checkpoint": str(random_pixart.make().folder)}
    drawn = []
    for fields in (FIELDS, {**FIELDS, "guidance_scale": 1.0, "num_inference_steps": 3}):
        answer = client.draw(**fields, num_images=2)
        assert answer["seeds"].tolist() == [11, 12]
        first, second = map(pixels, answer["images"])
        assert np.abs(first.astype(int) - drawn_by(given, fields)).max() <= 1
        assert not np.array_equal(first, second)
        drawn.append(first)
    assert not np.array_equal(*drawn)
    for field, value, allowed in REFUSED:
        status, message = client.refused(lambda field=field, value=value: client.draw(**{**FIELDS, field: value}))
        assert status == "INVALID_ARGUMENT"
        assert f"{field}: got {value}; allowed: {allowed}" in message
