"""group_norm: statistics of a whole picture, merged from parts."""

import pytest
import torch

from fluxserve.kernels.image import moments
from fluxserve.kernels.image.group import group_norm, plain_group_norm
from tests.kernels.judge import INTERPRETED, RESULTS, random, relative, same

SIZES = [(1, 1), (5, 7), (24, 33)] if INTERPRETED else [(1, 1), (5, 7), (128, 128), (1024, 1024), (333, 1000)]
CHANNELS = [(64, 8), (48, 8)] if INTERPRETED else [(16, 8), (48, 8), (128, 32), (512, 32)]


def picture(channels: int, size: tuple[int, int], mean: float = 0.0) -> torch.Tensor:
    x = random(1, channels, *size) + mean
    return x.to(RESULTS[-2] if len(RESULTS) > 1 else torch.float32).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("channels", "groups"), CHANNELS)
@pytest.mark.parametrize("silu", [True, False])
def test_as_the_reference(size: tuple[int, int], channels: int, groups: int, silu: bool) -> None:
    x, weight, bias = picture(channels, size), random(channels, seed=1), random(channels, seed=2)
    got = group_norm(x, groups, weight, bias, 1e-6, silu)
    same(got, plain_group_norm(x.float(), groups, weight, bias, 1e-6, silu), x.dtype)
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_a_large_mean_costs_no_digits() -> None:
    """Mean of squares minus square of mean would: 1000² is 2^20 times the variance. PyTorch's is off by 100."""
    x = (random(1, 64, 20, 20) / 12 + 1000).contiguous(memory_format=torch.channels_last)
    one, zero = torch.ones(64, device=x.device), torch.zeros(64, device=x.device)
    exact = torch.nn.functional.group_norm(x.double(), 8).float()
    got = group_norm(x, 8, one, zero, 1e-6, False)
    assert relative(got, exact) < 2e-3


@pytest.mark.parametrize("mean", [0, 1000])
def test_parts_of_many_tiles(mean: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pixels a tile, 32 tiles a part; each part's first tile, from which its sums begin, is far from the rest."""
    monkeypatch.setattr(moments, "_TILE", 128)
    x = random(1, 64, 9, 31) / 12 + mean
    x.view(1, 64, -1)[:, :, :: moments.FEWEST] += 100
    x = x.contiguous(memory_format=torch.channels_last)
    one, zero = torch.ones(64, device=x.device), torch.zeros(64, device=x.device)
    got = group_norm(x, 8, one, zero, 1e-6, False)
    exact = torch.nn.functional.group_norm(x.double(), 8).float()
    assert relative(got, exact) < (1e-4 if mean else 2e-6)


def test_an_offset_is_added_first() -> None:
    x, weight, bias, offset = picture(64, (9, 13)), random(64, seed=1), random(64, seed=2), random(64, seed=3, spread=5)
    got = group_norm(x, 8, weight, bias, 1e-6, True, offset)
    same(got, plain_group_norm(x.float(), 8, weight, bias, 1e-6, True, offset), x.dtype)
    shifted = plain_group_norm(x.float() + offset[:, None, None], 8, weight, bias, 1e-6, True)
    assert relative(got, shifted) < 2**-8
