"""add: two branches and a bias."""

import pytest
import torch

from fluxserve.kernels.add import add, plain_add
from tests.kernels.judge import INTERPRETED, random, same


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (33, 40)] if INTERPRETED else [(1, 1), (5, 7), (1024, 1024)])
@pytest.mark.parametrize("channels", [48, 128])
def test_as_the_reference(size: tuple[int, int], channels: int) -> None:
    dtype = torch.float32 if INTERPRETED else torch.bfloat16
    x, y = (random(1, channels, *size, seed=i).to(dtype) for i in (1, 2))
    x, y = (t.contiguous(memory_format=torch.channels_last) for t in (x, y))
    bias, expected = random(channels, seed=3), x.float()
    plain_add(expected, y, bias)
    got = add(x, y, bias)
    assert got is x
    same(got, expected, dtype)
