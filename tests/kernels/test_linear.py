"""linear and its endings."""

import pytest
import torch

from fluxserve.kernels.fp8 import E4M3, quantise_rows
from fluxserve.kernels.gemm import plain as plain
from fluxserve.kernels.gemm import portable as kernels
from fluxserve.kernels.gemm.layers import GATES, Heads, Linear, in_turns
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
    plain.plain_linear(x, x_scale, w, rows // 4, expected)
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
    plain.plain_linear_gelu(x, x_scale, w, 0, 20.0, expected)
    tanh = 0.0 if INTERPRETED else 2**-10  # the GPU's own is right to 2^-11
    same(got, expected.clamp(-448, 448) if out == E4M3 else expected, out, of_product(dtype) + tanh)
    assert torch.isnan(whole[:, :64].float()).all()


def test_gates_and_values_take_turns() -> None:
    """Each output of the product as it is in the checkpoint: all gates, then all values."""
    order = in_turns(96)
    assert sorted(order.tolist()) == list(range(192))
    gates, values = order.view(-1, 2, GATES).unbind(dim=1)
    assert torch.equal(gates.flatten(), torch.arange(96)) and torch.equal(values.flatten(), torch.arange(96, 192))
    with pytest.raises(ValueError, match="80 wide: expected a multiple of 32"):
        in_turns(80)


@pytest.mark.parametrize(("rows", "columns", "inner"), [*SHAPES, (33, 192, 64), (5, 320, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("out", RESULTS)
def test_swiglu_into_a_part_of_wider_rows(
    rows: int, columns: int, inner: int, dtype: torch.dtype, streams: int, out: torch.dtype
) -> None:
    x, x_scale, w = operands(rows, columns, inner, dtype, streams)
    split, width = rows // 3 if streams == 2 else 0, columns // 2
    whole = torch.full((rows, width + 64), float("nan"), device=DEVICE).to(out)
    got, expected = whole[:, 64:], torch.empty(rows, width, device=DEVICE)
    kernels.linear_swiglu(x, x_scale, w, split, 5.0, got)
    plain.plain_linear_swiglu(x, x_scale, w, split, 5.0, expected)
    tanh = 0.0 if INTERPRETED else 2**-10  # the GPU's own is right to 2^-11
    same(got, expected.clamp(-448, 448) if out == E4M3 else expected, out, 2 * of_product(dtype) + tanh)
    assert torch.isnan(whole[:, :64].float()).all()


def test_swiglu_is_that_of_the_checkpoint() -> None:
    """diffusers': the first half of the outputs is activated, and multiplied with the second."""
    dtype = torch.float32 if INTERPRETED else torch.bfloat16
    x, w = random(9, 64, dtype=dtype), random(192, 64, dtype=dtype, seed=1, spread=0.1)
    gates, values = (x.double() @ w.double().T).chunk(2, dim=1)
    for run in (kernels.linear_swiglu, plain.plain_linear_swiglu):
        got = poisoned(9, 96, dtype=torch.float32)
        run(x, None, Linear(w[in_turns(96).to(DEVICE)][None].contiguous(), None, None), 0, 1.0, got)
        assert relative(got, torch.nn.functional.silu(gates) * values) < (1e-6 if INTERPRETED else 2**-9)


def test_swiglu_of_extremes() -> None:
    """What a gate shuts is 0 and not NaN; what it opens is as it came; what is too large saturates on a GPU."""
    w = torch.zeros(1, 2 * GATES, 64, device=DEVICE)
    w[0, 0, 0] = w[0, GATES, 1] = 1
    x = torch.zeros(5, 64, device=DEVICE)
    x[:, 0] = torch.tensor([-1e4, 1e4, 0.0, -80.0, 80.0])
    x[:, 1] = torch.tensor([1e4, 1e4, -7.0, 3.0, -0.5])
    dtype = torch.float32 if INTERPRETED else torch.bfloat16
    out = poisoned(5, GATES, dtype=RESULTS[-1])
    kernels.linear_swiglu(x.to(dtype), None, Linear(w.to(dtype), None, None), 0, 1.0, out)
    opened = 1e8 if INTERPRETED else 448.0
    assert torch.allclose(out[:, 0].float(), torch.tensor([0, opened, 0, 0, -40.0], device=DEVICE), rtol=1e-2)
    assert (out[:, 1:].float() == 0).all()


@pytest.mark.parametrize(("rows", "columns", "inner"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [True, False])
def test_gated_into_the_residual(rows: int, columns: int, inner: int, dtype: torch.dtype, gated: bool) -> None:
    x, x_scale, w = operands(rows, columns, inner, dtype)
    gate, before = random(2, columns, seed=6), random(rows, columns, seed=7)
    gate = gate if gated else None
    got, expected = before.clone(), before.clone()
    kernels.linear_add(x, x_scale, w, rows // 2, gate, got)
    plain.plain_linear_add(x, x_scale, w, rows // 2, gate, expected)
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
    plain.plain_linear_heads(x, x_scale, w, split, heads, expected)
    same(got, expected, out, of_product(dtype))


@pytest.mark.parametrize("ending", ["gelu", "swiglu"])
def test_heads_and_an_activation_of_the_same_rows(ending: str) -> None:
    """As its two halves, each launched alone."""
    x, x_scale, w = operands(17, 3 * HEAD + 128, 128, E4M3, streams=1)
    heads, width = heads_of(17, 1), 128 if ending == "gelu" else 64
    got = poisoned(17, 3 * HEAD, dtype=torch.float32), poisoned(17, width, dtype=torch.float32)
    expected = torch.empty(17, 3 * HEAD, device=DEVICE), torch.empty(17, width, device=DEVICE)
    getattr(kernels, f"linear_heads_{ending}")(x, x_scale, w, heads, got[0], 20.0, got[1])
    getattr(plain, f"plain_linear_heads_{ending}")(x, x_scale, w, heads, expected[0], 20.0, expected[1])
    for ours, theirs in zip(got, expected, strict=True):
        same(ours, theirs, torch.float32, 2 * of_product(E4M3) + 2**-10)


def extremes(columns: int, inner: int) -> tuple[torch.Tensor, torch.Tensor, Linear]:
    """Rows of nothing, of the largest, of the largest in turns, of the smallest; weights are all the largest."""
    turns = torch.tensor([448.0, -448.0]).repeat(inner // 2)
    x = torch.stack([torch.zeros(inner), torch.full((inner,), 448.0), turns, torch.full((inner,), 2.0**-9)]).to(DEVICE)
    w = 448 * random(1, columns, inner, seed=4).sign()
    scale = torch.full((1, columns), 1 / (448 * inner**0.5), device=DEVICE)
    x_scale = torch.tensor([1, 1e-2, 1, 1e3], device=DEVICE)
    return x.to(E4M3), x_scale, Linear(w.to(E4M3), scale, random(1, columns, seed=5, spread=0.1))


def row_by_row(got: torch.Tensor, expected: torch.Tensor, before: float) -> None:
    """A row of small numbers must not hide behind one of large ones."""
    for ours, theirs in zip(got, expected.clamp(-448, 448) if got.dtype == E4M3 else expected, strict=True):
        same(ours, theirs, got.dtype, before)


@pytest.mark.parametrize("ending", ["none", "gelu", "swiglu", "add", "heads"])
def test_extremes(ending: str) -> None:
    """Nothing overflows on its way, and what is too large for E4M3 becomes the largest."""
    x, x_scale, w = extremes(3 * HEAD, 256)
    width, gate, heads = 3 * HEAD // (2 if ending == "swiglu" else 1), 1e4 * random(1, 3 * HEAD), heads_of(4, 1)
    out = RESULTS[0] if ending == "none" else RESULTS[-1]
    got, expected = poisoned(4, width, dtype=out), torch.empty(4, width, device=DEVICE)
    if ending == "add":
        got, expected = (1e6 * random(4, width, seed=7) for _ in range(2))
    more: dict[str, tuple[object, ...]] = {"gelu": (0, 20.0), "swiglu": (0, 5.0), "add": (0, gate), "heads": (0, heads)}
    name = "linear" if ending == "none" else f"linear_{ending}"
    getattr(kernels, name)(x, x_scale, w, *more.get(ending, (0,)), got)
    getattr(plain, f"plain_{name}")(x, x_scale, w, *more.get(ending, (0,)), expected)
    row_by_row(got, expected, 2 * of_product(E4M3) + (0 if INTERPRETED else 2**-10))


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
