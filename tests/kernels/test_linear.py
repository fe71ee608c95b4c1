"""linear and its endings."""

import pytest
import torch

from fluxserve.kernels import linear as kernels
from fluxserve.kernels.fp8 import E4M3, quantise_rows
from fluxserve.kernels.layers import Heads, Linear
from tests.kernels.judge import DEVICE, INTERPRETED, RESULTS, of_product, poisoned, random, relative, same

HEAD = 128
SHAPES = [(1, 256, 128), (17, 384, 96), (130, 128, 160)] if INTERPRETED else [
    (1, 3072, 3072), (17, 768, 256), (4608, 9216, 3072), (4608, 3072, 15360), (9217, 3072, 3072), (511, 64, 4096)
]  # fmt: skip
DTYPES = [E4M3, torch.float32] if INTERPRETED else [E4M3, torch.bfloat16]


def operands(rows: int, columns: int, inner: int, dtype: torch.dtype, streams: int = 2) -> tuple[
    torch.Tensor, torch.Tensor | None, Linear
]:  # fmt: skip
    x, w = random(rows, inner, seed=3), random(streams, columns, inner, seed=4, spread=inner**-0.5)
    bias = random(streams, columns, seed=5, spread=0.1)
    if dtype == E4M3:
        (x, x_scale), (w, scale) = quantise_rows(x), quantise_rows(w)
        return x, x_scale, Linear(w, scale, bias)
    return x.to(dtype), None, Linear(w.to(dtype), None, bias)


@pytest.mark.parametrize(("rows", "columns", "inner"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out", RESULTS[:2])
def test_product(rows: int, columns: int, inner: int, dtype: torch.dtype, out: torch.dtype) -> None:
    x, x_scale, w = operands(rows, columns, inner, dtype)
    got, expected = poisoned(rows, columns, dtype=out), torch.empty(rows, columns, device=DEVICE)
    kernels.linear(x, x_scale, w, rows // 4, got)
    kernels.plain_linear(x, x_scale, w, rows // 4, expected)
    same(got, expected, out, of_product(dtype))


@pytest.mark.parametrize(("rows", "columns", "inner"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out", RESULTS)
def test_gelu_into_a_part_of_wider_rows(
    rows: int, columns: int, inner: int, dtype: torch.dtype, out: torch.dtype
) -> None:
    x, x_scale, w = operands(rows, columns, inner, dtype, streams=1)
    whole = torch.full((rows, columns + 64), float("nan"), device=DEVICE).to(out)
    got, expected = whole[:, 64:], torch.empty(rows, columns, device=DEVICE)
    kernels.linear_gelu(x, x_scale, w, 0, 20.0, got)
    kernels.plain_linear_gelu(x, x_scale, w, 0, 20.0, expected)
    tanh = 0.0 if INTERPRETED else 2**-10  # the GPU's own is right to 2^-11
    same(got, expected.clamp(-448, 448) if out == E4M3 else expected, out, of_product(dtype) + tanh)
    assert torch.isnan(whole[:, :64].float()).all()


@pytest.mark.parametrize(("rows", "columns", "inner"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [True, False])
def test_gated_into_the_residual(rows: int, columns: int, inner: int, dtype: torch.dtype, gated: bool) -> None:
    x, x_scale, w = operands(rows, columns, inner, dtype)
    gate, before = random(2, columns, seed=6), random(rows, columns, seed=7)
    gate = gate if gated else None
    got, expected = before.clone(), before.clone()
    kernels.linear_add(x, x_scale, w, rows // 2, gate, got)
    kernels.plain_linear_add(x, x_scale, w, rows // 2, gate, expected)
    same(got, expected, torch.float32, of_product(dtype))


def heads_of(rows: int, streams: int) -> Heads:
    angle = random(rows, HEAD // 2, seed=8, spread=3)
    return Heads(3 + random(streams, 3, HEAD, seed=9), angle.cos(), angle.sin())


@pytest.mark.parametrize("rows", [1, 17, 70] if INTERPRETED else [1, 17, 4608, 9217])
@pytest.mark.parametrize("count", [1, 2] if INTERPRETED else [2, 24])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("out", RESULTS)
def test_heads(rows: int, count: int, dtype: torch.dtype, streams: int, out: torch.dtype) -> None:
    x, x_scale, w = operands(rows, 3 * count * HEAD, 128, dtype, streams)
    split, heads = rows // 3 if streams == 2 else 0, heads_of(rows, streams)
    got, expected = poisoned(rows, 3 * count * HEAD, dtype=out), torch.empty(rows, 3 * count * HEAD, device=DEVICE)
    kernels.linear_heads(x, x_scale, w, split, heads, got)
    kernels.plain_linear_heads(x, x_scale, w, split, heads, expected)
    same(got, expected, out, of_product(dtype))


def test_heads_and_gelu_of_the_same_rows() -> None:
    """As its two halves, each launched alone."""
    x, x_scale, w = operands(17, 3 * HEAD + 64, 128, E4M3, streams=1)
    heads = heads_of(17, 1)
    got = poisoned(17, 3 * HEAD, dtype=torch.float32), poisoned(17, 64, dtype=torch.float32)
    expected = torch.empty(17, 3 * HEAD, device=DEVICE), torch.empty(17, 64, device=DEVICE)
    kernels.linear_heads_gelu(x, x_scale, w, heads, got[0], 20.0, got[1])
    kernels.plain_linear_heads_gelu(x, x_scale, w, heads, expected[0], 20.0, expected[1])
    for ours, theirs in zip(got, expected, strict=True):
        same(ours, theirs, torch.float32, of_product(E4M3) + 2**-10)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter multiplies with NumPy, whose sums depend on the height")
def test_a_row_depends_on_no_other() -> None:
    """So that an image has the same bytes alone and beside others."""
    x, x_scale, w = operands(40, 256, 128, E4M3, streams=1)
    whole, part = poisoned(40, 256, dtype=torch.float32), poisoned(23, 256, dtype=torch.float32)
    kernels.linear(x, x_scale, w, 0, whole)
    kernels.linear(x[17:].clone(), x_scale[17:].clone() if x_scale is not None else None, w, 0, part)
    assert torch.equal(whole[17:], part)


@pytest.mark.skipif(INTERPRETED, reason="compares with cuBLASLt")
@pytest.mark.parametrize(("columns", "inner"), [(9216, 3072), (3072, 15360)])
def test_loses_no_more_than_the_library(columns: int, inner: int) -> None:
    """cuBLASLt's FP8 product with its fast accumulator: the same arithmetic, done by others."""
    x, x_scale, w = operands(4608, columns, inner, E4M3, streams=1)
    assert x_scale is not None and w.scale is not None
    w = Linear(w.weight, w.scale, None)
    exact = (x.double() @ w.weight[0].double().T * x_scale[:, None] * w.scale).float()
    got, one = poisoned(4608, columns, dtype=torch.float32), torch.ones((), device=DEVICE)
    kernels.linear(x, x_scale, w, 0, got)
    theirs = torch._scaled_mm(x, w.weight[0].T, scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=True)
    assert relative(got, exact) <= 1.5 * relative(theirs * x_scale[:, None] * w.scale, exact)
