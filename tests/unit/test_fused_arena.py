"""The arena: where buffers lie, and what does not fit."""

import pytest
import torch

from fluxserve.engines.fused.arena import Arena, Buffer, size
from fluxserve.errors import OutOfMemory
from fluxserve.kernels.fp8 import E4M3

CPU = torch.device("cpu")
LAYOUT = {"a": Buffer((3, 5), torch.float32), "b": Buffer((7,), E4M3), "c": Buffer((2, 2, 2), torch.bfloat16)}


def test_buffers_are_aligned_and_apart() -> None:
    cut = Arena(size(LAYOUT), CPU).cut(LAYOUT)
    for value, (name, buffer) in enumerate(LAYOUT.items(), start=1):
        assert cut[name].shape == buffer.shape
        assert cut[name].dtype == buffer.dtype
        cut[name].copy_(torch.full(buffer.shape, float(value)))
    assert [float(cut[name].float().mean()) for name in LAYOUT] == [1.0, 2.0, 3.0]
    addresses = [cut[name].data_ptr() - cut["a"].data_ptr() for name in LAYOUT]
    assert addresses == [0, 256, 512]


def test_layouts_share_the_memory() -> None:
    arena = Arena(size(LAYOUT), CPU)
    assert arena.cut(LAYOUT)["a"].data_ptr() == arena.cut({"z": LAYOUT["c"]})["z"].data_ptr()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(OutOfMemory, match=r"activations: needs 768 bytes .* allowed: 767, sized for the largest"):
        Arena(size(LAYOUT) - 1, CPU).cut(LAYOUT)
