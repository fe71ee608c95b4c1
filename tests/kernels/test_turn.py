"""turn: RMSNorm and RoPE of heads, in place."""

import pytest
import torch

from fluxserve.kernels.attention.qk_rope import plain_turn, turn
from tests.kernels.judge import DEVICE, INTERPRETED, poisoned, random, same

RESULTS = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16]
SHAPES = [(32, 8, 128), (4, 2, 16), (5, 3, 32)]


@pytest.mark.parametrize(("queries", "keys", "head_dim"), SHAPES)
@pytest.mark.parametrize("rows", [1, 17])
@pytest.mark.parametrize("dtype", RESULTS)
def test_as_the_reference(queries: int, keys: int, head_dim: int, rows: int, dtype: torch.dtype) -> None:
    """In rows that go on beyond the heads, as they do where values lie behind them."""
    width = (queries + keys) * head_dim
    given, weights = random(rows, width, spread=3, dtype=dtype), random(2, head_dim, seed=5)
    angles = random(rows, head_dim // 2, seed=7)
    whole = poisoned(rows, 2 * width, dtype=dtype)
    x = whole[:, :width]
    x.copy_(given)
    expected = given.float()
    turn(x, queries, weights, 1e-6, angles.cos(), angles.sin())
    plain_turn(expected, queries, weights, 1e-6, angles.cos(), angles.sin())
    same(x, expected, dtype)
    assert whole[:, width:].isnan().all(), "what lies behind the heads was written"


def test_by_hand() -> None:
    """A query (3, 4) and a key (4, 3), turned by a right angle: their mean squares are 12.5."""
    x = torch.tensor([[3.0, 4.0, 4.0, 3.0]], device=DEVICE)
    weights = torch.tensor([[1.0, 2.0], [3.0, 1.0]], device=DEVICE)
    cos, sin = torch.zeros(1, 1, device=DEVICE), torch.ones(1, 1, device=DEVICE)
    expected = torch.tensor([[-8.0, 3.0, -3.0, 12.0]]) / 12.5**0.5
    for call in (turn, plain_turn):
        turned = x.clone()
        call(turned, 1, weights, 0.0, cos, sin)
        assert torch.allclose(turned.cpu(), expected, atol=1e-5)


def test_a_row_of_zeros_stays() -> None:
    x = torch.zeros(2, 48, device=DEVICE)
    angles = random(2, 8)
    turn(x, 2, random(2, 16), 1e-6, angles.cos(), angles.sin())
    assert (x == 0).all()
