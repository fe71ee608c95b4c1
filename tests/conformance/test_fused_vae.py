"""The fused VAE against diffusers' in float32, both ways: with every kernel's plain reference, and launched.

Biases are large: who reads a convolution's result adds them, and one that is forgotten or added twice must show.
"""

from collections.abc import Iterator

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from fluxserve.checkpoint import Checkpoint
from fluxserve.engines.fused import vae
from fluxserve.engines.fused.weights import Precision
from fluxserve.kernels.operations import LAUNCHED, PLAIN, Operations
from tests.support import random_flux

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if GPU else "cpu")
EXACT = Precision(torch.float32, torch.float32)
RELATIVE = 1e-4

pytestmark = pytest.mark.xdist_group("fused")


@pytest.fixture(scope="module")
def theirs() -> AutoencoderKL:
    """Another draw than what every other test shares."""
    module = random_flux.make(seed=1).vae
    generator = torch.Generator().manual_seed(2)
    for name, parameter in module.named_parameters():
        if name.endswith(".bias"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return module


@pytest.fixture(scope="module")
def folder(theirs: AutoencoderKL, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("vae")
    theirs.save_pretrained(path / "vae")
    return Checkpoint(path, random_flux.make(seed=1).spec)


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.cpu().double() - expected.double()).norm() / expected.double().norm())


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(params=[PLAIN, LAUNCHED], ids=["plain", "launched"])
def run(request: pytest.FixtureRequest) -> Operations:
    operations: Operations = request.param
    return operations


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """TF32 has the mantissa of half precision."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # products have it off by default
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("size", [(2, 2), (6, 10)])
def test_decoder(theirs: AutoencoderKL, folder: Checkpoint, run: Operations, size: tuple[int, int]) -> None:
    latents = drawn(2, 16, *size)
    bound = vae.decoder(folder, DEVICE, EXACT, run).bind({"latents": tuple(latents.shape)})
    bound.inputs["latents"].copy_(latents)
    bound.run()
    assert relative(bound.outputs["pixels"], theirs.decode(latents).sample) < RELATIVE


@pytest.mark.parametrize("size", [(16, 16), (48, 80)])
def test_encoder(theirs: AutoencoderKL, folder: Checkpoint, run: Operations, size: tuple[int, int]) -> None:
    pixels = drawn(2, 3, *size)
    bound = vae.encoder(folder, DEVICE, EXACT, run).bind({"pixels": tuple(pixels.shape)})
    bound.inputs["pixels"].copy_(pixels)
    bound.run()
    expected = theirs.encode(pixels).latent_dist
    assert relative(bound.outputs["mean"], expected.mean) < RELATIVE
    assert relative(bound.outputs["std"], expected.std) < RELATIVE
