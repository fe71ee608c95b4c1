"""The client and the server say the same about every tensor: both contracts, side by side."""

from __future__ import annotations

import numpy as np
import pytest
from fluxserve_client.contract import Request, control_tensors, preview_tensors
from tritonclient.utils import np_to_triton_dtype

from fluxserve import contract as server
from tests.client.fakes import FakeFlux


def described(tensors: dict[str, np.ndarray]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (np_to_triton_dtype(tensor.dtype), tensor.shape) for name, tensor in tensors.items()}


def test_the_inputs_of_flux() -> None:
    everything = Request(
        prompt="",
        height=1,
        width=1,
        num_inference_steps=1,
        guidance_scale=1,
        negative_prompt="",
        true_cfg_scale=1,
        seed=1,
        num_images=1,
        image=b"",
        strength=1,
        output_format="png",
        quality=1,
        embed_prompt=True,
    )
    for_json = {"encoding"}  # the client's answers are binary over both protocols
    inputs = [t for t in server.FLUX.inputs if t.name not in for_json]
    expected = {t.name: (t.dtype, tuple(max(dim, 1) for dim in t.dims)) for t in inputs}
    assert described(everything.tensors()) == expected
    several = described(Request(prompt="", image=[b"1", b"2", b"3"]).tensors())
    assert several["image"] == ("BYTES", (3,)), "the only input that may have several"
    assert [t.name for t in server.FLUX.inputs if t.dims != (1,)] == ["image"]
    assert list(Request(prompt="").tensors()) == ["prompt"]


def test_the_inputs_of_control() -> None:
    known = {t.name: (t.dtype, t.dims) for t in server.CONTROL.inputs}
    needed = {t.name for t in server.CONTROL.inputs if not t.optional}
    status, preview = described(control_tensors("a", "status")), described(preview_tensors("a", "glimpse", 3))
    assert set(status) == needed < set(preview)
    assert status.items() <= known.items() and preview.items() <= known.items()


@pytest.mark.parametrize("model", [server.FLUX, server.CONTROL], ids=lambda model: model.name)
def test_the_fake_server_answers_as_the_real_one(fake: FakeFlux, model: server.ModelContract) -> None:
    answer = fake.answer({}) if model is server.FLUX else fake.control(control_tensors("a", "status"))
    expected = {t.name: (t.dtype, tuple(max(dim, 1) for dim in t.dims)) for t in model.outputs}
    assert described(dict(answer)) == expected
