"""A block pair of FLUX.2-dev at its real width, without a GPU: the served modules and the fused engine's arithmetic.

2.3 B parameters take 5 GB in BF16; for float32 each layer is widened while it is computed. Half a minute. On a GPU
test_fused_flux2_blocks.py judges the same pair as it does all others, FP8 included.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fluxserve.engines.torch_eager import TorchEngine, load_module
from fluxserve.families.flux import signatures
from fluxserve.families.flux.models import FLUX2_DEV
from fluxserve.families.registry import architectures
from fluxserve.folders.checkpoint import Checkpoint
from tests.conformance.test_fused import BF16, GPU, TEXT, inputs_of, relative, transformer, velocity
from tests.support import flux2_blocks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("fused"),
    pytest.mark.skipif(GPU, reason="there it is judged with its kernels"),
]

Velocities = dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    """5 GB, gone when these tests are through."""
    path = tmp_path_factory.mktemp("dev")
    yield flux2_blocks.write(path, FLUX2_DEV, 1, 1)
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def inputs(folder: Checkpoint) -> dict[str, Tensor]:
    return inputs_of(folder, (12, 8), references=[(8, 4)])


@pytest.fixture(scope="module")
def found(folder: Checkpoint, inputs: dict[str, Tensor]) -> Velocities:
    """float32 [1, tokens, 128] of diffusers in float32 and in bfloat16, and of torch_eager, also with less guidance."""
    module = load_module(folder, "transformer", "cpu", torch.bfloat16)
    engine = TorchEngine(signatures.transformer(folder.spec), architectures(folder.spec)["transformer"].wrapper(module))
    ours = velocity(engine, inputs)
    less = velocity(engine, {**inputs, "guidance": inputs["guidance"] / 2})
    names = ("hidden_states", "encoder_hidden_states")
    with torch.inference_mode():
        rounded = module(**inputs | {name: inputs[name].bfloat16() for name in names}, return_dict=False)[0]
        with widened(module):
            exact = module(**inputs, return_dict=False)[0]
    return {"exact": exact, "theirs": rounded.float(), "ours": ours, "less": less}


@contextmanager
def widened(module: nn.Module) -> Iterator[None]:
    """Have a bfloat16 module compute in float32, with the weights of one linear layer at a time in it."""
    linears = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    small = [p for p in module.parameters() if p.ndim == 1]
    for layer in linears:
        assert layer.bias is None
        layer.forward = lambda x, w=layer.weight: functional.linear(x.float(), w.float())  # type: ignore[method-assign]
    for parameter in small:
        parameter.data = parameter.data.float()
    yield
    for layer in linears:
        del layer.forward
    for parameter in small:
        parameter.data = parameter.data.bfloat16()


def test_it_is_as_wide_as_the_published_one(folder: Checkpoint) -> None:
    shape = folder.spec.transformer
    assert (shape.hidden_size, shape.mlp_width, shape.joint_attention_dim) == (6144, 18432, 15360)
    assert (shape.num_layers, shape.num_single_layers) == (1, 1)


def test_torch_eager_is_diffusers(found: Velocities) -> None:
    assert torch.equal(found["ours"], found["theirs"])
    error = relative(found["ours"], found["exact"])
    assert error < 0.01, "no more than BF16 rounds"
    assert relative(found["less"], found["exact"]) > 3 * error, "guidance counts"


def test_the_fused_engine_loses_no_more_than_eager_bf16(
    folder: Checkpoint, inputs: dict[str, Tensor], found: Velocities
) -> None:
    tokens = inputs["hidden_states"].shape[1]
    got = velocity(transformer(folder, BF16, None, (tokens, TEXT, 1)), inputs)
    assert relative(got, found["exact"]) <= 1.2 * relative(found["ours"], found["exact"])
