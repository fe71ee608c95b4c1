"""modulation: INT8 weights, a row per step and image."""

import pytest
import torch

from fluxserve.kernels.fp8 import quantise_rows
from fluxserve.kernels.gemm.adaln import modulation, plain_modulation, quantise_channels
from tests.kernels.judge import DEVICE, INTERPRETED, poisoned, random, relative, same


@pytest.mark.parametrize("rows", [1, 17, 32])
@pytest.mark.parametrize(("columns", "inner"), [(70, 96), (128, 256)] if INTERPRETED else [(70, 96), (36864, 3072)])
def test_as_the_reference(rows: int, columns: int, inner: int) -> None:
    dtype = torch.float32 if INTERPRETED else torch.bfloat16
    x, bias = random(rows, inner, dtype=dtype), random(columns, seed=1)
    weight, scale = quantise_channels(random(columns, inner, seed=2, spread=inner**-0.5))
    got, expected = poisoned(rows, columns, dtype=torch.float32), torch.empty(rows, columns, device=DEVICE)
    modulation(x, weight, scale, bias, got)
    plain_modulation(x, weight, scale, bias, expected)
    same(got, expected, torch.float32, before=1e-5)


def test_a_channel_of_zeros_and_the_largest_weight() -> None:
    weight = random(4, 256)
    weight[2] = 0
    held, scale = quantise_channels(weight)
    assert held.abs().amax(dim=1).tolist() == [127, 127, 0, 127]
    assert torch.isfinite(held * scale[:, None]).all()


def test_rounds_finer_than_e4m3() -> None:
    """Why the weights are whole numbers: normal ones lose a third as much."""
    weight = torch.randn(64, 3072, generator=torch.Generator().manual_seed(0))
    held, scale = quantise_channels(weight)
    fp8, fp8_scale = quantise_rows(weight)
    error = relative(held * scale[:, None], weight)
    assert error < 0.4 * relative(fp8.float() * fp8_scale[:, None], weight)
