"""The fused T5 and CLIP against transformers' in float32; Qwen3 has test_fused_qwen3.py.

In BF16 and FP8 with their kernels on a GPU; else with the plain references, which prove the arithmetic around them.
"""

import pytest
import torch
from torch import Tensor

from fluxserve.engine import Engine
from fluxserve.engines.fused.build import BF16, FP8, Build, Precision
from fluxserve.engines.fused.clip import FusedClip
from fluxserve.engines.fused.t5 import FusedT5
from fluxserve.engines.torch_eager import TorchEngine, load_module
from fluxserve.families.flux import signatures
from fluxserve.families.shared.modules import T5, Clip
from fluxserve.folders.checkpoint import Checkpoint
from fluxserve.kernels.operations import LAUNCHED, PLAIN, Operations
from tests.support import random_flux
from tests.support.parity import RELATIVE, relative
from tests.support.text import quantised, run

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if GPU else "cpu")
KERNELS = LAUNCHED if GPU else PLAIN
EXACT = Precision(torch.float32, torch.float32)
LENGTHS = {"t5": 24, "clip": 77}

pytestmark = pytest.mark.xdist_group("fused")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("text")
    flux = random_flux.make()
    flux.save(path)
    return Checkpoint(path, flux.spec)


def ids_of(name: str, rows: int = 2, tokens: int | None = None) -> dict[str, Tensor]:
    """Random words, each row with its end somewhere else: where CLIP is read."""
    drawn = torch.randint(
        0, random_flux.VOCABULARY - 2, (rows, tokens or LENGTHS[name]), generator=torch.Generator().manual_seed(3)
    )
    for row, ids in enumerate(drawn):
        ids[-1 - 5 * row :] = random_flux.VOCABULARY - 1
    return {"input_ids": drawn.to(DEVICE)}


def eager(folder: Checkpoint, name: str, dtype: torch.dtype = torch.float32) -> TorchEngine:
    signature, wrapper = {"t5": (signatures.t5, T5), "clip": (signatures.clip, Clip)}[name]
    return TorchEngine(signature(folder.spec), wrapper(load_module(folder, name, str(DEVICE), dtype)))


def fused(folder: Checkpoint, name: str, precision: Precision, operations: Operations | None = None) -> Engine:
    """In float32 plainly everywhere: on a GPU the kernels' products of it would be TF32's."""
    if name == "clip":
        return FusedClip(folder, Build.of(folder.weights("text_encoder"), DEVICE, precision, PLAIN))
    kernels = operations or (PLAIN if precision is EXACT else KERNELS)
    return FusedT5(folder, Build.of(folder.weights("text_encoder_2"), DEVICE, precision, kernels))


@pytest.mark.parametrize("tokens", [1, 17, None])
@pytest.mark.parametrize("name", LENGTHS)
def test_in_float32(folder: Checkpoint, name: str, tokens: int | None) -> None:
    inputs = ids_of(name, tokens=tokens)
    expected = run(eager(folder, name), inputs)
    assert relative(run(fused(folder, name, EXACT), inputs), expected) < RELATIVE
    assert relative(expected[:1], expected[1:]) > 0.01 or tokens == 1, "two rows alike would prove nothing"


@pytest.mark.skipif(GPU, reason="its products of float32 are TF32's; BF16 and FP8 are launched there")
def test_launched(folder: Checkpoint) -> None:
    """In Triton's interpreter."""
    inputs = ids_of("t5", rows=1)
    got = run(fused(folder, "t5", EXACT, LAUNCHED), inputs)
    assert relative(got, run(eager(folder, "t5"), inputs)) < RELATIVE


@pytest.mark.parametrize("name", LENGTHS)
def test_bf16_loses_no_more_than_eager_bf16(folder: Checkpoint, name: str) -> None:
    inputs = ids_of(name, rows=8)
    expected = run(eager(folder, name), inputs)
    theirs = relative(run(eager(folder, name, torch.bfloat16), inputs), expected)
    assert relative(run(fused(folder, name, BF16), inputs), expected) <= 1.2 * theirs


def test_fp8_loses_no_more_than_plain_fp8(folder: Checkpoint) -> None:
    """Of T5: CLIP is never in FP8."""
    module = load_module(folder, "t5", str(DEVICE), torch.float32)
    inputs, engine = ids_of("t5", rows=8), TorchEngine(signatures.t5(folder.spec), T5(module))
    expected = run(engine, inputs)
    ours = relative(run(fused(folder, "t5", FP8), inputs), expected)
    with torch.inference_mode(), quantised(module):
        theirs = relative(run(engine, inputs), expected)
    assert theirs > 0.01, "nothing was quantised"
    assert ours <= 1.1 * theirs


@pytest.mark.parametrize(("name", "precision"), [("t5", BF16), ("t5", FP8), ("clip", BF16)])
def test_a_bound_keeps_nothing_of_the_run_before(folder: Checkpoint, name: str, precision: Precision) -> None:
    """On a GPU the second run captures it, and the others replay that."""
    engine, first = fused(folder, name, precision), ids_of(name)
    second = {"input_ids": first["input_ids"].flip(0)}
    bound = engine.bind({"input_ids": tuple(first["input_ids"].shape)})
    for inputs in (first, second, first, second):
        bound.inputs["input_ids"].copy_(inputs["input_ids"])
        bound.run()
        (output,) = bound.outputs.values()
        assert torch.equal(output.float().cpu(), run(engine, inputs))
