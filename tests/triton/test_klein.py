"""A FLUX.2-klein of random weights served through Triton and both protocols, as FLUX.1 is."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fluxserve.media.images import write_image
from fluxserve.supervisor import TritonServer
from tests.support import random_flux2
from tests.triton.conftest import PlainClient, drawn_by, pixels, plain, serving

pytestmark = pytest.mark.xdist_group("klein")

FIELDS: dict[str, object] = {"prompt": "a fox on a blue background", "seed": 11, "height": 112, "width": 144}


@pytest.fixture(scope="module")
def folder() -> Path:
    return random_flux2.klein().folder


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[TritonServer]:
    with serving(checkpoint=str(folder)) as server:
        yield server


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
        ("guidance_scale", 3.5, "1, or nothing: custom is distilled to be drawn without"),
        ("num_inference_steps", 50, "1 to 8"),
        ("strength", 0.5, "nothing: custom draws after its images and redraws none of them"),
        ("true_cfg_scale", 2.0, "nothing: custom does not take it, it is drawn in one pass a step"),
    ],
)
def test_what_makes_no_sense_for_the_model(client: PlainClient, field: str, value: float, allowed: str) -> None:
    status, message = client.refused(lambda: client.draw(**FIELDS, **{field: value}))
    assert status == "INVALID_ARGUMENT"
    assert f"{field}: got {value}; allowed: {allowed}" in message


def files(*images: np.ndarray) -> np.ndarray:
    return np.array([write_image(image, "png", 90) for image in images], dtype=np.object_)


def test_a_picture_is_drawn_after_images(client: PlainClient, folder: Path) -> None:
    """Over the wire as in this process; of the first one's size; and not as it is without, or in another order."""
    shown = files(*random_flux2.pictures((80, 112), (96, 64)))
    fields = {"prompt": FIELDS["prompt"], "seed": 11}
    answer = client.draw(**fields, image=shown)
    assert answer["image_size"].tolist() == [80, 112]
    (drawn,) = map(pixels, answer["images"])
    assert (
        np.abs(drawn.astype(int) - drawn_by({"checkpoint": str(folder)}, {**fields, "image": list(shown)})).max() <= 1
    )
    for other in ({"image": shown[::-1].copy()}, {"image": shown[:1].copy()}, {}):
        (differs,) = client.draw(**fields, **other, height=80, width=112)["images"]
        assert not np.array_equal(pixels(differs), drawn)


def test_requests_of_other_references_are_drawn_apart(client: PlainClient) -> None:
    """Triton may batch only what has equal shapes."""
    images = [files(*random_flux2.pictures(*sizes)) for sizes in ([(64, 64)], [(64, 80)], [(80, 64), (64, 64)])]
    fields = {"prompt": "a fox", "seed": 3, "height": 64, "width": 64}
    alone = [client.draw(**fields, image=shown)["images"][0] for shown in images]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda shown: client.draw(**fields, image=shown)["images"][0], images * 2))
    assert together == alone * 2


def test_too_many_images(client: PlainClient) -> None:
    five = files(*random_flux2.pictures(*[(64, 64)] * 5))
    status, message = client.refused(lambda: client.draw(**FIELDS, image=five))
    assert status == "INVALID_ARGUMENT"
    assert "image: got 5 images; allowed: 1 to 4 of them" in message
