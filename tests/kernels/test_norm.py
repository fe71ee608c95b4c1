"""norm: LayerNorm, modulate, quantise. The kernel on a GPU; elsewhere its reference, by what it must be like."""

import pytest
import torch

from fluxserve.kernels.fp8 import E4M3, E4M3_MAX, SMALLEST_AMAX
from fluxserve.kernels.norm import modulated as kernels
from fluxserve.kernels.norm.modulated import plain_norm
from tests.kernels.judge import DEVICE, INTERPRETED, poisoned, random, same

norm = plain_norm if INTERPRETED else kernels.norm
on_a_gpu = pytest.mark.skipif(INTERPRETED, reason="needs a Hopper GPU")


def residual(rows: int, width: int) -> torch.Tensor:
    return random(rows, width, dtype=torch.bfloat16, spread=3)


def modulation(streams: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return random(streams, width, seed=1), random(streams, width, seed=2, spread=0.3)


@on_a_gpu
@pytest.mark.parametrize("rows", [1, 17, 4608, 9217])
@pytest.mark.parametrize("width", [8, 200, 256, 3072, 4096, 6144])
@pytest.mark.parametrize("dtype", [E4M3, torch.bfloat16])
def test_as_the_reference(rows: int, width: int, dtype: torch.dtype) -> None:
    x, split = residual(rows, width), rows // 3
    shift, scale = modulation(2, width)
    data, row_scale = poisoned(rows, width, dtype=dtype), poisoned(rows, dtype=torch.float32)
    expected = torch.empty(rows, width, device=x.device)
    plain_norm(x, shift, scale, split, expected, None)

    norm(x, shift, scale, split, data, row_scale if dtype == E4M3 else None)

    if dtype == E4M3:
        expected = expected / row_scale[:, None]
    same(data, expected, dtype)


@on_a_gpu
def test_the_same_bits_every_time() -> None:
    x, (shift, scale) = residual(4608, 3072), modulation(2, 3072)
    results = [(poisoned(4608, 3072, dtype=E4M3), poisoned(4608, dtype=torch.float32)) for _ in range(20)]
    for data, row_scale in results:
        norm(x, shift, scale, 512, data, row_scale)
    (first, of_rows), *others = results
    assert all(torch.equal(first.float(), data.float()) and torch.equal(of_rows, other) for data, other in others)


def test_one_stream_takes_its_only_modulation() -> None:
    x, (shift, scale) = residual(5, 256), modulation(1, 256)
    got = poisoned(5, 256, dtype=torch.bfloat16)
    norm(x, shift, scale, 0, got, None)
    normed = torch.nn.functional.layer_norm(x.float(), (256,), eps=1e-6)
    same(got, normed * (1 + scale) + shift, torch.bfloat16)


def test_the_largest_of_each_row_becomes_the_largest_number() -> None:
    x, (shift, scale) = residual(9, 256), modulation(1, 256)
    x[4] = 0.0
    shift[:] = 0.0
    data, row_scale, plain = (
        poisoned(9, 256, dtype=E4M3),
        poisoned(9, dtype=torch.float32),
        torch.empty(9, 256).to(x.device),
    )
    norm(x, shift, scale, 0, data, row_scale)
    plain_norm(x, shift, scale, 0, plain, None)
    expected = plain.abs().amax(dim=1).clamp_min(SMALLEST_AMAX) / E4M3_MAX
    assert torch.allclose(row_scale, expected, rtol=1e-5)
    largest = data.float().abs().amax(dim=1)
    assert torch.equal(largest, torch.full_like(largest, E4M3_MAX).where(expected > SMALLEST_AMAX, 0.0))


@pytest.mark.parametrize("value", [0.0, 3.0, 1e15, -1e-30])
def test_rows_that_are_all_alike(value: float) -> None:
    """No variance: what is left is the shift; a row of zeros is zeros."""
    x = torch.full((3, 256), value, dtype=torch.bfloat16, device=DEVICE)
    shift, scale = torch.zeros(1, 256, device=x.device), random(1, 256)
    data, row_scale = poisoned(3, 256, dtype=E4M3), poisoned(3, dtype=torch.float32)
    norm(x, shift, scale, 0, data, row_scale)
    held = data.float() * row_scale[:, None]
    assert torch.isfinite(held).all()
    if value in (0.0, 3.0):
        assert held.abs().max() < 1e-6


def test_rows_and_columns_outside_are_left_alone() -> None:
    x, (shift, scale) = residual(6, 96)[:4], modulation(1, 96)
    data = poisoned(6, 96, dtype=torch.bfloat16, width=32)
    norm(x, shift, scale, 0, data[:4], None)
    assert torch.isfinite(data[:4]).all()
    assert torch.isnan(data[4:]).all()


def test_what_it_was_not_built_for_is_refused() -> None:
    x, (shift, scale) = residual(2, 256), modulation(1, 256)
    with pytest.raises(ValueError, match=r"norm: got torch\.float32 into"):
        kernels.norm(x.float(), shift, scale, 0, torch.empty_like(x), None)
    with pytest.raises(ValueError, match="norm: got 100 columns"):
        kernels.norm(x[:, :100], shift, scale, 0, torch.empty_like(x[:, :100]), None)
