"""The fused VAE against diffusers' in float32, both ways: with every kernel's plain reference, and launched.

Biases are large: who reads a convolution's result adds them, and one that is forgotten or added twice must show.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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
    """FLUX.1's proportions: every level half as deep as the one below it, but the last."""
    torch.manual_seed(1)
    module = AutoencoderKL(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        layers_per_block=2,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    module.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in module.named_parameters():
        if name.endswith(".bias"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return module


@pytest.fixture(scope="module")
def folder(theirs: AutoencoderKL, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("vae")
    theirs.save_pretrained(path / "vae")
    return Checkpoint(path, random_flux.make().spec)


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got.cpu().double() - expected.double()).norm() / expected.double().norm())


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


class Live(TorchDispatchMode):
    """Counts the bytes that are held by whatever is made inside, and the most that were held at once."""

    def __init__(self) -> None:
        super().__init__()
        self._holders: Counter[int] = Counter()
        self.bytes = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(value, Tensor):
                self._hold(value)
        return made

    def _hold(self, value: Tensor) -> None:
        storage = value.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        self.bytes += 0 if self._holders[address] else size
        self._holders[address] += 1
        self.most = max(self.most, self.bytes)
        weakref.finalize(value, self._release, address, size)

    def _release(self, address: int, size: int) -> None:
        self._holders[address] -= 1
        self.bytes -= 0 if self._holders[address] else size


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


@pytest.mark.parametrize("size", [(2, 2), (4, 6)])
def test_decoder(theirs: AutoencoderKL, folder: Checkpoint, run: Operations, size: tuple[int, int]) -> None:
    latents = drawn(2, 16, *size)
    bound = vae.decoder(folder, DEVICE, EXACT, run).bind({"latents": tuple(latents.shape)})
    bound.inputs["latents"].copy_(latents)
    bound.run()
    assert relative(bound.outputs["pixels"], theirs.decode(latents).sample) < RELATIVE


@pytest.mark.parametrize("size", [(16, 16), (32, 48)])
def test_encoder(theirs: AutoencoderKL, folder: Checkpoint, run: Operations, size: tuple[int, int]) -> None:
    pixels = drawn(2, 3, *size)
    bound = vae.encoder(folder, DEVICE, EXACT, run).bind({"pixels": tuple(pixels.shape)})
    bound.inputs["pixels"].copy_(pixels)
    bound.run()
    expected = theirs.encode(pixels).latent_dist
    assert relative(bound.outputs["mean"], expected.mean) < RELATIVE
    assert relative(bound.outputs["std"], expected.std) < RELATIVE


@pytest.mark.parametrize("way", ["decoder", "encoder"])
def test_peak_is_what_a_picture_takes_at_most(folder: Checkpoint, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for cuDNN's workspaces; and not twice as much."""
    monkeypatch.setattr(vae, "_BESIDES", 0)
    side = 64
    limits = replace(folder.spec.limits, max_pixels=side * side)
    limited = Checkpoint(folder.path, replace(folder.spec, limits=limits))
    sizes = {"decoder": {"latents": (1, 16, side // 8, side // 8)}, "encoder": {"pixels": (1, 3, side, side)}}
    bound = getattr(vae, way)(limited, DEVICE, EXACT, LAUNCHED).bind(sizes[way])
    with Live() as live:
        bound.run()
    assert vae.peak(limited, torch.float32) >= live.most
    assert way == "encoder" or vae.peak(limited, torch.float32) < 2 * live.most
