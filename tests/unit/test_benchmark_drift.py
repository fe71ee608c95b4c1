"""benchmarks.drift: the arithmetic that FP8 had before values lost their mean."""

import pytest
import torch

from benchmarks.drift import leaving_the_mean_in, with_the_means_range
from export.fp8 import simulated
from fluxserve import checkpoint, settings
from fluxserve.engines import signatures
from fluxserve.engines.torch_eager import TorchEngine, architectures, load_module
from tests.conformance.test_fused import DEVICE, FP8, KERNELS, TEXT, Judge, relative, transformer, velocity

pytestmark = pytest.mark.xdist_group("fused")


def test_the_mean_is_left_in() -> None:
    """Its error is that of plain FP8 arithmetic on v as it is; nothing is counted; and it is another arithmetic."""
    judge = Judge(checkpoint.read(settings.default_checkpoint()), (16, 24))
    scales = with_the_means_range(judge.scales)
    assert all(scales.centred[name] == v for name, (_, _, v) in scales.attention.items())
    engine = transformer(judge.folder, FP8, scales, (4096, TEXT, 1), leaving_the_mean_in(KERNELS))
    before = velocity(engine, judge.inputs)
    module = load_module(judge.folder, "transformer", str(DEVICE), torch.float32)
    wrapped = architectures(judge.folder.spec)["transformer"].wrapper(module)
    with simulated("transformer", module, judge.scales):
        plain = velocity(TorchEngine(signatures.transformer(judge.folder.spec), wrapped), judge.inputs)
    error = relative(before, judge.expected)
    assert error <= 1.1 * relative(plain, judge.expected)
    assert engine.saturated() == {}
    assert not torch.equal(before, velocity(judge.open(FP8), judge.inputs))
