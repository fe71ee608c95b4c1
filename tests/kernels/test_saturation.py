"""Values at E4M3's limit, counted where they are read anyway."""

from collections.abc import Callable

import pytest
import torch

from fluxserve.kernels.fp8 import E4M3
from fluxserve.kernels.gemm import hopper as hopper
from fluxserve.kernels.gemm import plain as plain
from fluxserve.kernels.gemm import portable as kernels
from fluxserve.kernels.gemm.layers import SAMPLE, Watched
from fluxserve.kernels.gemm.saturation import at_the_limit, count_saturated, plain_count_saturated
from tests.kernels.judge import DEVICE, INTERPRETED, random
from tests.kernels.test_linear import operands


def clipped(rows: int, columns: int) -> torch.Tensor:
    """Part of wider rows; a few dozen values at the limit, both signs, one NaN, neighbours just below."""
    x = random(rows, columns + 48, seed=2, spread=60.0).clamp(-416, 416)
    x.view(-1)[::31] = 448.0
    x.view(-1)[::47] = -448.0
    x[0, 5] = float("nan")
    return x.to(E4M3)[:, 16 : columns + 16]


def test_what_is_at_the_limit() -> None:
    x = torch.tensor([448.0, -448.0, 416.0, -416.0, 0.0, 2**-9, float("nan")]).to(E4M3)
    assert int(at_the_limit(x)) == 3


@pytest.mark.parametrize("way", [count_saturated, plain_count_saturated])
def test_a_sample_of_the_rows_is_counted(way: Callable[[Watched], None]) -> None:
    parts = [clipped(95, 1100), clipped(3, 64)]
    counts = torch.tensor([5, 0], dtype=torch.int64, device=DEVICE)
    way(Watched(parts, counts))
    values = [part.float()[::SAMPLE] for part in parts]
    expected = [int(((value.abs() == 448) | value.isnan()).sum()) for value in values]
    assert counts.tolist() == [5 + expected[0], expected[1]] and min(expected) > 0


@pytest.mark.parametrize("way", [kernels.linear_add, plain.plain_linear_add])
def test_counted_beside_a_projection(way: Callable[..., None]) -> None:
    x, x_scale, w = operands(40, 128, 64, E4M3)
    watched = Watched([clipped(40, 128)], torch.zeros(1, dtype=torch.int64, device=DEVICE))
    way(x, x_scale, w, 5, random(2, 128), torch.zeros(40, 128, device=DEVICE), None, watched)
    assert int(watched.counts[0]) == int(at_the_limit(watched.rows[0][::SAMPLE])) > 0


@pytest.mark.skipif(INTERPRETED, reason="needs a Hopper GPU")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("rows", [1, 300, 4608, 9217])
def test_spare_warps_count_as_the_reference(rows: int) -> None:
    d = 3072
    x, x_scale, w = operands(rows, d, d, E4M3)
    parts, residual = [clipped(rows, 3 * d), clipped(rows, 4 * d)], random(rows, d).to(torch.bfloat16)
    expected, before = residual.clone(), [int(at_the_limit(part[::SAMPLE])) for part in parts]
    watched, gate = Watched(parts, torch.zeros(2, dtype=torch.int64, device=DEVICE)), random(2, d)
    own = hopper.arranged(w)
    hopper.launch("add", x, x_scale, own, rows // 9, expected, gate=gate)
    hopper.launch("add", x, x_scale, own, rows // 9, residual, gate=gate, watched=watched)
    assert watched.counts.tolist() == before and min(before) > 0
    assert torch.equal(residual, expected), "counting changes nothing"
