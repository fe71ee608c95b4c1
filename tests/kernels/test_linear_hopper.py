"""The CUDA contender of the benchmarks: what it is launched with anywhere, what it computes on a GPU."""

import pytest
import torch

from benchmarks import linear_hopper as hopper
from fluxserve.kernels import linear as kernels
from fluxserve.kernels.fp8 import E4M3
from tests.kernels.judge import DEVICE, INTERPRETED, of_product, poisoned, random, same
from tests.kernels.test_linear import HEAD, heads_of, operands


def test_each_thread_has_neighbours() -> None:
    """By wgmma's table of accumulators: number i of lane l is of column i / 4 · 8 + l % 4 · 2 + i % 2."""
    order = hopper.neighbours()
    assert sorted(order.tolist()) == list(range(32))
    for q in range(4):
        held = [int(order[j * 8 + q * 2 + b]) for j in range(4) for b in range(2)]
        assert held == list(range(8 * q, 8 * q + 8))


def test_weights_are_permuted_and_nothing_else() -> None:
    _, _, w = operands(1, 512, 96, E4M3)
    made = hopper.permuted(w)
    order = hopper.neighbours()
    assert torch.equal(made.weight[1, 32:64].float(), w.weight[1, 32:64].float()[order])
    assert made.scale is w.scale and made.bias is w.bias
    with pytest.raises(ValueError, match="columns: got 384; expected a multiple of 256"):
        hopper.permuted(operands(1, 384, 96, E4M3)[2])


@pytest.mark.skipif(INTERPRETED, reason="needs a Hopper GPU")
@pytest.mark.parametrize("rows", [1, 17, 257, 4608, 9217])
@pytest.mark.parametrize(("columns", "inner"), [(768, 256), (3072, 15360), (9216, 3072)])
@pytest.mark.parametrize("ending", hopper.ENDINGS)
def test_as_the_reference(rows: int, columns: int, inner: int, ending: str) -> None:
    x, x_scale, w = operands(rows, columns, inner, E4M3)
    split, gate, heads, own = rows // 9, random(2, columns, seed=6), heads_of(rows, 2), hopper.permuted(w)
    assert heads.factors.shape[-1] == HEAD
    bf16 = ending in ("none", "add")
    before = random(rows, columns, seed=7).to(torch.bfloat16)
    got = before.clone() if ending == "add" else poisoned(rows, columns, dtype=torch.bfloat16 if bf16 else E4M3)
    expected = before.float()
    if ending == "none":
        kernels.plain_linear(x, x_scale, w, split, expected)
    elif ending == "gelu":
        kernels.plain_linear_gelu(x, x_scale, w, split, 20.0, expected)
    elif ending == "add":
        kernels.plain_linear_add(x, x_scale, w, split, gate, expected)
    else:
        kernels.plain_linear_heads(x, x_scale, w, split, heads, expected)
    hopper.launch(ending, x, x_scale, own, split, got, gate, heads, 20.0)
    torch.cuda.synchronize()
    same(got, expected if bf16 else expected.clamp(-448, 448), got.dtype, of_product(E4M3) + 2**-10)
    assert DEVICE == "cuda"
