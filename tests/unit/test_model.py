"""The library's front door: what `from fluxserve import Model, Settings` gives."""

import hashlib
import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import fluxserve
from fluxserve import Model, Settings
from fluxserve.errors import CheckpointError, InvalidRequest
from tests.support import threads

PICTURE = np.random.default_rng(3).integers(0, 256, (96, 160, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.open(device="cpu")


def test_it_draws(model: Model) -> None:
    two, one = (model.request("a fox", seed=seed, num_images=n, num_inference_steps=2) for seed, n in ((3, 2), (4, 1)))
    first, second = model.draw(two, one)
    assert first.images.shape == (2, 128, 128, 3) and second.images.shape == (1, 128, 128, 3)
    assert np.array_equal(first.images[1], second.images[0]), "image k is drawn from seed + k"


def test_it_redraws(model: Model) -> None:
    file = io.BytesIO()
    Image.fromarray(PICTURE).save(file, "PNG")
    request = model.request("a cat", [file.getvalue()], strength=0.5, num_inference_steps=4, output_format="jpeg")
    assert (request.height, request.width, request.output_format) == (96, 160, "jpeg")
    (drawing,) = model.draw(request)
    assert drawing.images.shape == (1, 96, 160, 3)


def test_a_bad_request(model: Model) -> None:
    with pytest.raises(InvalidRequest, match="height: got 17; allowed: a multiple of 16 from 64 to 512"):
        model.request("a fox", height=17)


def test_a_bad_folder() -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        Model.open(Settings(checkpoint="none"))


def test_it_frees_its_weights() -> None:
    with Model.open(device="cpu") as model:
        pass
    with pytest.raises(AssertionError, match="close"):
        model.draw(model.request("a fox", num_inference_steps=1))


def test_the_same_seed_gives_the_same_bytes(model: Model) -> None:
    """Of the tiny model, on one thread: libraries split sums by threads."""
    with threads.one():
        drawn = [model.draw(model.request("a red apple", seed=7, num_inference_steps=3))[0].images for _ in range(2)]
    assert len({hashlib.sha256(images.tobytes()).hexdigest() for images in drawn}) == 1


def test_the_package_brings_no_torch_by_itself() -> None:
    """The supervisor imports it, and starts in a tenth of a second."""
    code = "import fluxserve, sys; assert fluxserve.Settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_names_that_are_not_there() -> None:
    with pytest.raises(AttributeError, match="Modle"):
        _ = fluxserve.Modle  # type: ignore[attr-defined]
