"""The fused VAE against diffusers' in float32, both ways: with every kernel's plain reference, and launched.

Biases are large: who reads a convolution's result adds them, and one that is forgotten or added twice must show.
"""

import shutil
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fluxserve.engines.fused import vae
from fluxserve.engines.fused.build import BF16, Build, Precision
from fluxserve.errors import CheckpointError
from fluxserve.families.flux.models import FLUX2_KLEIN_4B
from fluxserve.families.flux.parts import FluxSpec
from fluxserve.families.registry import architectures
from fluxserve.folders.checkpoint import Checkpoint
from fluxserve.kernels.operations import LAUNCHED, PLAIN, Operations
from tests.support import random_flux

GPU = torch.cuda.is_available()
KERNELS = LAUNCHED if GPU else PLAIN
DEVICE = torch.device("cuda:0" if GPU else "cpu")
EXACT = Precision(torch.float32, torch.float32)
RELATIVE = 1e-4

pytestmark = pytest.mark.xdist_group("fused")

FLUX2 = AutoencoderKLFlux2
QUANT = {"use_quant_conv": True, "use_post_quant_conv": True}
BARE = dict.fromkeys(QUANT, False)
KINDS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "flux1": (AutoencoderKL, BARE),
    "flux1-quant": (AutoencoderKL, QUANT),
    "flux2": (FLUX2, QUANT),
    "flux2-bare": (FLUX2, BARE),
    "flux2-small-decoder": (FLUX2, {"decoder_block_out_channels": (8, 16, 32, 32), "batch_norm_eps": 0.01, **QUANT}),
}
LAUNCHED_TOO = KINDS if GPU else ("flux1", "flux2-small-decoder")
"""In Triton's interpreter each takes seconds; what kinds differ in launches nothing."""
CASES = {kind: (kind, PLAIN) for kind in KINDS} | {f"{kind}-launched": (kind, LAUNCHED) for kind in LAUNCHED_TOO}
FILE = "diffusion_pytorch_model.safetensors"


def module_of(kind: str) -> nn.Module:
    """FLUX's proportions: every level half as deep as the one below it, but the last."""
    torch.manual_seed(1)
    made, options = KINDS[kind]
    module = made(
        block_out_channels=(16, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=32 if made is FLUX2 else 16,
        layers_per_block=2,
        norm_num_groups=8,
        **options,
    )
    module.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in module.named_parameters():
        if name.endswith(".bias"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    if isinstance(module, FLUX2):
        module.bn.running_mean.normal_(generator=generator)
        module.bn.running_var.uniform_(0.05, 2, generator=generator)
    return module


class Judge:
    """One VAE by diffusers, the folder it was saved to, and what it computes of the loop's latents and of pixels."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.module = module_of(kind)
        self.module.save_pretrained(folder / "vae")  # type: ignore[operator]
        spec: FluxSpec = FLUX2_KLEIN_4B if isinstance(self.module, FLUX2) else random_flux.make().spec
        self.folder = Checkpoint(folder, spec)
        known = architectures(spec)
        self.decode = known["vae_decoder"].wrapper(self.module)
        self.encode = known["vae_encoder"].wrapper(self.module)

    def latents(self, *size: int) -> Tensor:
        return drawn(2, self.folder.spec.vae.latent_channels, *size)


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Judge]:
    made: dict[str, Judge] = {}

    def judge(kind: str) -> Judge:
        return made.setdefault(kind, made.get(kind) or Judge(kind, tmp_path_factory.mktemp(kind)))

    return judge


@pytest.fixture
def folder(judges: Callable[[str], Judge]) -> Checkpoint:
    return judges("flux1").folder


def opened(way: str, folder: Checkpoint, run: Operations = PLAIN, precision: Precision = EXACT) -> vae.FusedVae:
    engine: vae.FusedVae = getattr(vae, way)(folder, Build.of(folder.weights("vae"), DEVICE, precision, run))
    return engine


def decoded(folder: Checkpoint, latents: Tensor, run: Operations, precision: Precision = EXACT) -> Tensor:
    bound = opened("decoder", folder, run, precision).bind({"latents": tuple(latents.shape)})
    bound.inputs["latents"].copy_(latents)
    bound.run()
    return bound.outputs["pixels"].float()


def encoded(folder: Checkpoint, pixels: Tensor, run: Operations, precision: Precision = EXACT) -> tuple[Tensor, Tensor]:
    bound = opened("encoder", folder, run, precision).bind({"pixels": tuple(pixels.shape)})
    bound.inputs["pixels"].copy_(pixels)
    bound.run()
    return bound.outputs["mean"].float(), bound.outputs["std"].float()


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


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """TF32 has the mantissa of half precision."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # products have it off by default
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("size", [(2, 2), (4, 6)])
@pytest.mark.parametrize(("kind", "run"), CASES.values(), ids=CASES)
def test_decoder(judges: Callable[[str], Judge], kind: str, run: Operations, size: tuple[int, int]) -> None:
    judge = judges(kind)
    latents = judge.latents(*size)
    assert relative(decoded(judge.folder, latents, run), judge.decode(latents)) < RELATIVE


@pytest.mark.parametrize("size", [(16, 16), (32, 48)])
@pytest.mark.parametrize(("kind", "run"), CASES.values(), ids=CASES)
def test_encoder(judges: Callable[[str], Judge], kind: str, run: Operations, size: tuple[int, int]) -> None:
    judge, pixels = judges(kind), drawn(2, 3, *size)
    for got, expected in zip(encoded(judge.folder, pixels, run), judge.encode(pixels), strict=True):
        assert relative(got, expected) < RELATIVE


@pytest.mark.parametrize("kind", ["flux1", "flux2"])
def test_bf16_loses_no_more_than_eager_bf16(judges: Callable[[str], Judge], kind: str, tmp_path: Path) -> None:
    judge, eager = judges(kind), Judge(kind, tmp_path)
    eager.module.to(torch.bfloat16)
    latents, pixels = judge.latents(8, 12), drawn(2, 3, 32, 48)
    lost = relative(eager.decode(latents.bfloat16()), judge.decode(latents))
    assert relative(decoded(judge.folder, latents, KERNELS, BF16), judge.decode(latents)) <= 1.2 * lost
    expected = judge.encode(pixels)
    theirs, ours = eager.encode(pixels.bfloat16()), encoded(judge.folder, pixels, KERNELS, BF16)
    for got, other, value in zip(ours, theirs, expected, strict=True):
        assert relative(got, value) <= 1.2 * relative(other, value)


def drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda weights: weights.__delitem__(name)


def put(name: str, *shape: int) -> Callable[[dict[str, Tensor]], None]:
    return lambda weights: weights.__setitem__(name, torch.ones(shape))


@pytest.mark.parametrize(
    ("way", "change", "says"),
    [
        ("decoder", drop("post_quant_conv.bias"), r"missing 1 tensor of .*: post_quant_conv\.bias"),
        ("decoder", drop("bn.running_var"), r"missing 1 tensor of .*: bn\.running_var"),
        ("encoder", drop("quant_conv.weight"), r"missing 1 tensor of .*: quant_conv\.weight"),
        ("decoder", put("post_quant_conv.weight", 64, 32, 1, 1), r"got \(64, 32, 1, 1\); expected \(32, 32, 1, 1\)"),
        ("encoder", put("quant_conv.bias", 65), r"quant_conv.bias: got \(65,\); expected \(64,\)"),
        ("encoder", put("bn.running_mean", 32), r"bn.running_mean: got \(32,\); expected \(128,\)"),
        ("decoder", put("bn.weight", 128), r"does not read: bn\.weight"),
        ("encoder", put("bn.weight", 128), r"does not read: bn\.weight"),
    ],
)
def test_what_lies_beside_the_networks_is_all_there_and_all_used(
    judges: Callable[[str], Judge], tmp_path: Path, way: str, change: Callable[[dict[str, Tensor]], None], says: str
) -> None:
    whole = judges("flux2").folder
    shutil.copytree(whole.component("vae"), tmp_path / "vae")
    weights = load_file(tmp_path / "vae" / FILE)
    change(weights)
    save_file(weights, tmp_path / "vae" / FILE)
    with pytest.raises(CheckpointError, match=says):
        opened(way, Checkpoint(tmp_path, whole.spec))


def test_weights_that_the_configuration_denies_are_refused(judges: Callable[[str], Judge], tmp_path: Path) -> None:
    """Left out without a word, they would only change the picture."""
    shutil.copytree(judges("flux1-quant").folder.component("vae"), tmp_path / "vae")
    shutil.copy(judges("flux1").folder.component("vae") / "config.json", tmp_path / "vae")
    denying = Checkpoint(tmp_path, judges("flux1").folder.spec)
    for way in ("decoder", "encoder"):
        with pytest.raises(CheckpointError, match=r"does not read: post_quant_conv\.bias, "):
            opened(way, denying)


@pytest.mark.parametrize("way", ["decoder", "encoder"])
def test_peak_is_what_a_picture_takes_at_most(folder: Checkpoint, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for cuDNN's workspaces; and not twice as much."""
    monkeypatch.setattr(vae, "_BESIDES", 0)
    side = 64
    limits = replace(folder.spec.limits, max_pixels=side * side)
    limited = Checkpoint(folder.path, replace(folder.spec, limits=limits))
    sizes = {"decoder": {"latents": (1, 16, side // 8, side // 8)}, "encoder": {"pixels": (1, 3, side, side)}}
    bound = opened(way, limited, LAUNCHED).bind(sizes[way])
    with Live() as live:
        bound.run()
    assert vae.peak(limited, torch.float32) >= live.most
    assert way == "encoder" or vae.peak(limited, torch.float32) < 2 * live.most
