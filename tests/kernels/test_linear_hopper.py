"""linear_hopper: what it is launched with anywhere, what it computes on a GPU."""

import pytest
import torch

from fluxserve.kernels import linear as kernels
from fluxserve.kernels import linear_hopper as hopper
from fluxserve.kernels.fp8 import E4M3
from tests.kernels.judge import DEVICE, INTERPRETED, of_product, poisoned, random, same
from tests.kernels.test_linear import HEAD, heads_of, operands


def test_each_thread_has_neighbours() -> None:
    """By wgmma's table of accumulators: number i of lane l is of column i / 4 · 8 + l % 4 · 2 + i % 2."""
    order = hopper.neighbours()
    assert sorted(order.tolist()) == list(range(4 * hopper.RUN))
    for q in range(4):
        held = [int(order[j * 8 + q * 2 + b]) for j in range(hopper.RUN // 2) for b in range(2)]
        assert held == list(range(hopper.RUN * q, hopper.RUN * q + hopper.RUN))


def test_weights_are_permuted_and_nothing_else() -> None:
    _, _, w = operands(1, 512, 96, E4M3)
    made = hopper.arranged(w)
    order = hopper.neighbours()
    assert torch.equal(made.weight[1, 64:96].float(), w.weight[1, 64:96].float()[order])
    assert made.scale is w.scale and made.bias is w.bias
    for other in (operands(1, 384, 96, E4M3)[2], operands(1, 512, 72, E4M3)[2], operands(1, 512, 96, torch.float32)[2]):
        assert hopper.arranged(other) is other, "the general kernel's"


@pytest.mark.parametrize("ending", hopper.ENDINGS[:4])
def test_what_it_was_not_built_for_is_refused(ending: str) -> None:
    x, _, plain = operands(4, 768, 128, E4M3)
    w = hopper.arranged(plain)
    bf16 = ending in ("none", "add")
    right, wrong = (torch.empty(4, 768, dtype=t, device=DEVICE) for t in (torch.bfloat16, E4M3)[:: 1 if bf16 else -1])
    with pytest.raises(ValueError, match="w: got"):
        hopper.launch(ending, x, None, plain, 0, right)
    with pytest.raises(ValueError, match="out: got"):
        hopper.launch(ending, x, None, w, 0, wrong)
    with pytest.raises(ValueError, match="x: got"):
        hopper.launch(ending, x.float(), None, w, 0, right)
    if ending == "add":
        with pytest.raises(ValueError, match="gate: got none"):
            hopper.launch(ending, x, None, w, 0, right)


@pytest.mark.skipif(INTERPRETED, reason="needs a Hopper GPU")
@pytest.mark.timeout(60)
def test_parts_of_wider_rows_static_scales_and_again() -> None:
    """As a single block calls it: one stream, no scales of rows, strided on both sides; the same bits every time."""
    rows, d = 4608, 3072
    wide = random(rows, 5 * d, seed=1).clamp(-400, 400).to(E4M3)
    _, _, w = operands(1, d, 5 * d, E4M3, streams=1)
    gate, before, own = random(1, d, seed=2), random(rows, d, seed=3).to(torch.bfloat16), hopper.arranged(w)
    expected, results = before.float(), []
    kernels.plain_linear_add(wide, None, w, 0, gate, expected)
    for _ in range(10):
        results.append(before.clone())
        hopper.launch("add", wide, None, own, 0, results[-1], gate)
    torch.cuda.synchronize()
    same(results[0], expected, torch.bfloat16, of_product(E4M3))
    assert all(torch.equal(results[0], again) for again in results)
    _, _, up = operands(1, 4 * d, d, E4M3, streams=1)
    out, plain = wide[:, d:], torch.empty(rows, 4 * d, device=DEVICE)
    x = random(rows, 3 * d, seed=4).clamp(-400, 400).to(E4M3)[:, :d]
    kernels.plain_linear_gelu(x, None, up, 0, 2.0, plain)
    hopper.launch("gelu", x, None, hopper.arranged(up), 0, out, inverse=2.0)
    same(out, plain.clamp(-448, 448), E4M3, of_product(E4M3) + 2**-10)


@pytest.mark.skipif(INTERPRETED, reason="needs a Hopper GPU")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("rows", [1, 17, 257, 4608, 9217])
@pytest.mark.parametrize(("columns", "inner"), [(768, 208), (3072, 15360), (9216, 3072)])
@pytest.mark.parametrize("ending", hopper.ENDINGS[:4])
def test_as_the_reference(rows: int, columns: int, inner: int, ending: str) -> None:
    x, x_scale, w = operands(rows, columns, inner, E4M3)
    split, gate, heads, own = rows // 9, random(2, columns, seed=6), heads_of(rows, 2), hopper.arranged(w)
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


@pytest.mark.skipif(INTERPRETED, reason="needs a Hopper GPU")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("rows", [1, 300, 4608])
def test_heads_and_gelu_in_one_launch(rows: int) -> None:
    """As a single block calls it: the hidden layer goes into a part of wider rows."""
    inner, third, more = 256, 768, 1024
    x, x_scale, w = operands(rows, 3 * third + more, inner, E4M3, streams=1)
    heads, wide = heads_of(rows, 1), poisoned(rows, third + more, dtype=E4M3)
    got = poisoned(rows, 3 * third, dtype=E4M3), wide[:, third:]
    expected = torch.empty(rows, 3 * third, device=DEVICE), torch.empty(rows, more, device=DEVICE)
    kernels.plain_linear_heads_gelu(x, x_scale, w, heads, expected[0], 20.0, expected[1])
    kernels.linear_heads_gelu(x, x_scale, hopper.arranged(w), heads, got[0], 20.0, got[1])
    torch.cuda.synchronize()
    for ours, theirs in zip(got, expected, strict=True):
        same(ours, theirs.clamp(-448, 448), E4M3, of_product(E4M3) + 2**-10)
    assert torch.isnan(wide[:, :third].float()).all()
