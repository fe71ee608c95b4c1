"""add: two branches and a bias, at their size or at twice it."""

import pytest
import torch
from torch import Tensor

from fluxserve.kernels.image import residual as kernels
from fluxserve.kernels.image.group import group_norm, plain_group_norm
from tests.kernels.judge import DEVICE, INTERPRETED, random, same

DTYPE = torch.float32 if INTERPRETED else torch.bfloat16
SIZES = [(1, 1), (5, 7), (33, 40)] if INTERPRETED else [(1, 1), (5, 7), (333, 500), (1024, 1024)]

pytestmark = [pytest.mark.parametrize("size", SIZES), pytest.mark.parametrize("channels", [48, 128])]


def branches(channels: int, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    x, y = (random(1, channels, *size, seed=i).to(DTYPE) for i in (1, 2))
    x, y = (t.contiguous(memory_format=torch.channels_last) for t in (x, y))
    return x, y, random(channels, seed=3)


def test_add_as_the_reference(size: tuple[int, int], channels: int) -> None:
    x, y, bias = branches(channels, size)
    expected = x.float()
    kernels.plain_add(expected, y, bias, 8)
    kernels.add(x, y, bias, 8)
    same(x, expected, DTYPE)


def test_statistics_are_those_of_what_was_written(size: tuple[int, int], channels: int) -> None:
    x, y, bias = branches(channels, size)
    weight, shift = random(channels, seed=4), random(channels, seed=5)
    taken = kernels.add(x, y, bias, 8)
    got = group_norm(x, 8, weight, shift, 1e-6, False, None, taken)
    same(got, plain_group_norm(x.float(), 8, weight, shift, 1e-6, False), DTYPE)


def test_upsampled_as_the_reference(size: tuple[int, int], channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, bias = branches(channels, size)
    before, empty = x.clone(), torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **like: empty(*shape, **like).fill_(float("nan")))
    got = kernels.add_upsampled(x, y, bias)
    monkeypatch.undo()
    assert got.is_contiguous(memory_format=torch.channels_last)
    same(got, kernels.plain_add_upsampled(x.float(), y, bias), DTYPE)
    twice = torch.nn.functional.interpolate(x.float() + y.float() + bias[:, None, None], scale_factor=2.0)
    same(got, twice, DTYPE)
    assert torch.equal(x, before)
    assert got.device.type == DEVICE
