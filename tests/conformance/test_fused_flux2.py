"""FLUX.2 with what the fused engine has of it, its text encoder and its VAE, around diffusers' transformer.

Each is judged beside them; here whole pictures are: that they fit together, and the loop what they give and take.
"""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from fluxserve.engines.fused import vae
from fluxserve.engines.fused.qwen3 import FusedQwen3
from fluxserve.engines.fused.weights import Precision
from fluxserve.engines.open import open_components
from fluxserve.kernels.operations import PLAIN
from fluxserve.pipeline import Pipeline
from tests.conformance.test_flux2 import PROMPT, job_of, their_run
from tests.support import parity, random_flux2
from tests.support.random_flux2 import TOKENS, RandomFlux2

CPU = torch.device("cpu")
EXACT = Precision(torch.float32, torch.float32)

pytestmark = pytest.mark.xdist_group("klein")


def opened(flux: RandomFlux2, tokens: int = TOKENS) -> Pipeline:
    folder = flux.checkpoint(tokens)
    components = replace(
        open_components("torch_eager", folder, "cpu", "float32"),
        text={"qwen3": FusedQwen3(folder, CPU, EXACT, PLAIN)},
        vae_decoder=vae.decoder(folder, CPU, EXACT, PLAIN),
        vae_encoder=vae.encoder(folder, CPU, EXACT, PLAIN),
    )
    return Pipeline(folder.spec, components, max_rows=1)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("prompt", [PROMPT, "a", "a fox " * 60, "a<|endoftext|>fox<|im_end|>\n<think>"])
def test_text_to_image(tied: bool, prompt: str) -> None:
    klein = random_flux2.klein(tied)
    job = job_of(klein, (64, 96), 4, [7, 8], prompt)
    parity.agree(opened(klein), job, *their_run(klein, job, 4, prompt))


def test_at_its_full_length_of_text() -> None:
    klein = random_flux2.klein()
    job = job_of(klein, tokens=512)
    parity.agree(opened(klein, 512), job, *their_run(klein, job, 4, tokens=512))


@pytest.mark.parametrize("sizes", [[(64, 80)], [(64, 96), (80, 96), (96, 64)]])
def test_editing(sizes: Sequence[tuple[int, int]]) -> None:
    klein, images = random_flux2.klein(), random_flux2.pictures(*sizes)
    job = job_of(klein, (80, 64), 4, [5], images=images)
    parity.agree(opened(klein), job, *their_run(klein, job, 4, images=images, size=(80, 64)))
