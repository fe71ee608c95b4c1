"""From the words on: the tiny model in our pipeline and in diffusers' FluxPipeline, loaded from the folder as it is."""

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

from fluxserve import settings, source
from fluxserve.families import registry
from fluxserve.folders import checkpoint
from fluxserve.pipeline import Pipeline
from fluxserve.text import Tokenizers
from tests.support.exports import Exports

FOLDER = settings.default_checkpoint()

pytestmark = pytest.mark.xdist_group("export")


@pytest.fixture(scope="module")
def theirs() -> FluxPipeline:
    pipe = FluxPipeline.from_pretrained(FOLDER, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", params=["torch_eager", "onnxruntime"])
def ours(request: pytest.FixtureRequest, export: Exports) -> Pipeline:
    given = {}
    if request.param == "onnxruntime":
        given = {"artifact": {"string_value": str(export("onnxruntime", "fp32").path)}}
    found = source.find(settings.load(given))
    return Pipeline(found.spec, found.open_components("cpu", "float32"))


@pytest.mark.parametrize(
    "prompt", ["a fox on a blue background", "A Red APPLE!", "übermäßig 🦊 zyzzyva", "a fox " * 60]
)
def test_a_prompt_becomes_the_same_picture(theirs: FluxPipeline, ours: Pipeline, prompt: str) -> None:
    fields = {"prompt": prompt.encode(), "seed": 8, "num_inference_steps": 6}
    (drawing,) = ours.draw([registry.plan(fields, ours.spec, Tokenizers(checkpoint.read(FOLDER)))])
    assert drawing is not None
    (expected,) = theirs(
        prompt,
        height=128,
        width=128,
        num_inference_steps=6,
        guidance_scale=ours.spec.defaults.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(8),
        max_sequence_length=ours.spec.text.sequence.tokens,
        output_type="np",
    ).images
    assert np.abs(drawing.images[0] / 255.0 - expected).max() <= 0.5 / 255 + 1e-4
