"""softmax and wide_attention: float32 scores, a few rows at a time."""

import pytest
import torch

from fluxserve.kernels.attention import single_head as kernels
from fluxserve.kernels.attention.row_softmax import plain_softmax, softmax
from tests.kernels.judge import DEVICE, INTERPRETED, poisoned, random, relative, same

DTYPE = torch.float32 if INTERPRETED else torch.bfloat16
COLUMNS = [1, 5, 4096, 4097, 9001] if INTERPRETED else [1, 5, 4096, 4100, 16384, 65536]


@pytest.mark.parametrize("columns", COLUMNS)
def test_softmax_as_the_reference(columns: int) -> None:
    rows = 3 if INTERPRETED else 300
    scores, weights = random(rows, columns, spread=5), poisoned(rows, columns, dtype=DTYPE)
    expected = torch.empty(rows, columns, device=DEVICE)
    plain_softmax(scores, 0.125, expected)
    softmax(scores, 0.125, weights)
    same(weights, expected, DTYPE)
    assert torch.allclose(
        weights.float().sum(dim=1), torch.ones(rows, device=DEVICE), rtol=0, atol=max(torch.finfo(DTYPE).eps, 2**-22)
    )


@pytest.mark.parametrize("level", [-3e5, 3e5])
def test_softmax_of_scores_far_from_zero(level: float) -> None:
    """exp of them is 0 or infinite; what counts is how far they are from the largest."""
    scores = (random(4, 5000) + level).contiguous()
    weights = poisoned(4, 5000, dtype=torch.float32)
    softmax(scores, 1.0, weights)
    assert relative(weights, torch.softmax(scores.double(), dim=1)) < 1e-5


@pytest.mark.parametrize("rows", [1, 77, 300] if INTERPRETED else [1, 77, 1024, 4100, 16384])
@pytest.mark.parametrize("width", [48, 512])
def test_attention_as_the_reference(rows: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, the last of them not full; q, k and v beside each other, as one product leaves them."""
    monkeypatch.setattr(kernels, "SCORES_BYTES", 4 * rows * 128)
    q, k, v = random(rows, 3 * width, dtype=DTYPE, spread=2).chunk(3, dim=1)
    out, expected = poisoned(rows, width, dtype=DTYPE), torch.empty(rows, width, device=DEVICE)
    kernels.plain_wide_attention(q, k, v, expected)
    kernels.wide_attention(q, k, v, out)
    same(out, expected, DTYPE, 1e-6 if INTERPRETED else 2**-8)  # weights are rounded too


@pytest.mark.parametrize("rows", [1, 64, 4096, 16384, 65536])
def test_scores_take_the_same_memory_at_any_size(rows: int) -> None:
    assert 4 * rows * kernels.rows_at_a_time(rows) <= kernels.SCORES_BYTES
    assert kernels.rows_at_a_time(rows) >= min(rows, 256)
