"""gemm.hopper: what it is launched with anywhere, what it computes on a GPU."""

import pytest
import torch

from fluxserve.families.flux.models import FLUX2_DEV, FLUX2_KLEIN_4B, FLUX2_KLEIN_9B
from fluxserve.families.flux.parts import FluxSpec
from fluxserve.kernels.fp8 import E4M3
from fluxserve.kernels.gemm import hopper as hopper
from fluxserve.kernels.gemm import plain as plain
from fluxserve.kernels.gemm import portable as kernels
from tests.kernels.judge import DEVICE, INTERPRETED, of_product, poisoned, random, same
from tests.kernels.test_linear import HEAD, extremes, heads_of, operands, row_by_row

ALONE = ["none", "gelu", "add", "heads", "swiglu"]
"""Endings of all columns."""


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


@pytest.mark.parametrize("ending", ALONE)
def test_what_it_was_not_built_for_is_refused(ending: str) -> None:
    x, _, usual = operands(4, 768, 128, E4M3)
    w = hopper.arranged(usual)
    bf16, width = ending in ("none", "add"), 384 if ending == "swiglu" else 768
    right, wrong = (torch.empty(4, width, dtype=t, device=DEVICE) for t in (torch.bfloat16, E4M3)[:: 1 if bf16 else -1])
    with pytest.raises(ValueError, match="w: got"):
        hopper.launch(ending, x, None, usual, 0, right)
    with pytest.raises(ValueError, match="out: got"):
        hopper.launch(ending, x, None, w, 0, wrong)
    with pytest.raises(ValueError, match="x: got"):
        hopper.launch(ending, x.float(), None, w, 0, right)
    with pytest.raises(ValueError, match=rf"out: got \[{width - 16}\] columns"):
        hopper.launch(ending, x, None, w, 0, right[:, : width - 16])
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
    plain.plain_linear_add(wide, None, w, 0, gate, expected)
    for _ in range(10):
        results.append(before.clone())
        hopper.launch("add", wide, None, own, 0, results[-1], gate=gate)
    torch.cuda.synchronize()
    same(results[0], expected, torch.bfloat16, of_product(E4M3))
    assert all(torch.equal(results[0], again) for again in results)
    _, _, up = operands(1, 4 * d, d, E4M3, streams=1)
    out, expected = wide[:, d:], torch.empty(rows, 4 * d, device=DEVICE)
    x = random(rows, 3 * d, seed=4).clamp(-400, 400).to(E4M3)[:, :d]
    plain.plain_linear_gelu(x, None, up, 0, 2.0, expected)
    hopper.launch("gelu", x, None, hopper.arranged(up), 0, out, inverse=2.0)
    same(out, expected.clamp(-448, 448), E4M3, of_product(E4M3) + 2**-10)


@pytest.mark.skipif(INTERPRETED, reason="needs a Hopper GPU")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("rows", [1, 17, 257, 4608, 9217])
@pytest.mark.parametrize(("columns", "inner"), [(768, 208), (3072, 15360), (9216, 3072)])
@pytest.mark.parametrize("ending", ALONE)
def test_as_the_reference(rows: int, columns: int, inner: int, ending: str) -> None:
    x, x_scale, w = operands(rows, columns, inner, E4M3)
    split, gate, heads, own = rows // 9, random(2, columns, seed=6), heads_of(rows, 2), hopper.arranged(w)
    assert heads.factors.shape[-1] == HEAD
    bf16 = ending in ("none", "add")
    width, factor = (columns // 2, 5.0) if ending == "swiglu" else (columns, 20.0)
    before = random(rows, width, seed=7).to(torch.bfloat16)
    got = before.clone() if ending == "add" else poisoned(rows, width, dtype=torch.bfloat16 if bf16 else E4M3)
    expected = before.float()
    if ending == "none":
        plain.plain_linear(x, x_scale, w, split, expected)
    elif ending == "gelu":
        plain.plain_linear_gelu(x, x_scale, w, split, factor, expected)
    elif ending == "swiglu":
        plain.plain_linear_swiglu(x, x_scale, w, split, factor, expected)
    elif ending == "add":
        plain.plain_linear_add(x, x_scale, w, split, gate, expected)
    else:
        plain.plain_linear_heads(x, x_scale, w, split, heads, expected)
    given = {"gate": gate, "heads": heads if ending == "heads" else None, "inverse": factor}
    hopper.launch(ending, x, x_scale, own, split, got, **given)
    torch.cuda.synchronize()
    before_rounding = of_product(E4M3) * (2 if ending == "swiglu" else 1) + 2**-10  # of two products
    same(got, expected if bf16 else expected.clamp(-448, 448), got.dtype, before_rounding)
    assert DEVICE == "cuda"


@pytest.mark.skipif(INTERPRETED, reason="needs a Hopper GPU")
@pytest.mark.parametrize(
    ("columns", "inner"), [(3072, 3072), (3072, 12288), (3072, 15360), (9216, 3072), (12288, 3072)]
)
@pytest.mark.parametrize("ending", ALONE)
def test_the_same_bits_every_time(columns: int, inner: int, ending: str) -> None:
    """FLUX.1's products. Programs share tiles, and what they come to must not depend on who is first."""
    rows, split = 4608, 512
    x, x_scale, w = operands(rows, columns, inner, E4M3)
    gate, heads, own = random(2, columns, seed=6), heads_of(rows, 2), hopper.arranged(w)
    width = columns // 2 if ending == "swiglu" else columns
    before = random(rows, width, seed=7).to(torch.bfloat16 if ending in ("none", "add") else E4M3)
    results = [before.clone() for _ in range(20)]
    given = {"gate": gate, "heads": heads if ending == "heads" else None, "inverse": 20.0}
    for result in results:
        hopper.launch(ending, x, x_scale, own, split, result, **given)
    assert all(torch.equal(results[0].view(torch.uint8), again.view(torch.uint8)) for again in results)


@pytest.mark.skipif(INTERPRETED, reason="needs a Hopper GPU")
@pytest.mark.parametrize("ending", ALONE)
def test_extremes(ending: str) -> None:
    """As the general kernel's test, which see."""
    x, x_scale, w = extremes(768, 208)
    gate, heads = 100 * random(1, 768), heads_of(4, 1)
    bf16, width = ending in ("none", "add"), 384 if ending == "swiglu" else 768
    got = 100 * random(4, width).to(torch.bfloat16) if bf16 else poisoned(4, width, dtype=E4M3)
    expected = got.float()
    more: dict[str, tuple[object, ...]] = {"gelu": (20.0,), "swiglu": (20.0,), "add": (gate,), "heads": (heads,)}
    name = "plain_linear" if ending == "none" else f"plain_linear_{ending}"
    getattr(plain, name)(x, x_scale, w, 0, *more.get(ending, ()), expected)
    given = {"gate": gate, "heads": heads if ending == "heads" else None, "inverse": 20.0}
    hopper.launch(ending, x, x_scale, hopper.arranged(w), 0, got, **given)
    row_by_row(got, expected, 2 * of_product(E4M3) + 2**-10)


@pytest.mark.skipif(INTERPRETED, reason="needs a Hopper GPU")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("rows", [1, 300, 4608])
@pytest.mark.parametrize("ending", ["gelu", "swiglu"])
def test_heads_and_an_activation_in_one_launch(rows: int, ending: str) -> None:
    """As a single block calls it: the hidden layer goes into a part of wider rows."""
    inner, third, more = 256, 768, 1024
    x, x_scale, w = operands(rows, 3 * third + more, inner, E4M3, streams=1)
    width = more // 2 if ending == "swiglu" else more
    heads, wide = heads_of(rows, 1), poisoned(rows, third + width, dtype=E4M3)
    got = poisoned(rows, 3 * third, dtype=E4M3), wide[:, third:]
    expected = torch.empty(rows, 3 * third, device=DEVICE), torch.empty(rows, width, device=DEVICE)
    getattr(plain, f"plain_linear_heads_{ending}")(x, x_scale, w, heads, expected[0], 5.0, expected[1])
    getattr(kernels, f"linear_heads_{ending}")(x, x_scale, hopper.arranged(w), heads, got[0], 5.0, got[1])
    torch.cuda.synchronize()
    for ours, theirs in zip(got, expected, strict=True):
        same(ours, theirs.clamp(-448, 448), E4M3, 2 * of_product(E4M3) + 2**-10)
    assert torch.isnan(wide[:, :third].float()).all()


@pytest.mark.skipif(INTERPRETED, reason="needs a Hopper GPU")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("spec", [FLUX2_KLEIN_4B, FLUX2_KLEIN_9B, FLUX2_DEV], ids=lambda spec: spec.name)
@pytest.mark.parametrize("rows", [576, 4608])
def test_products_of_flux2_at_their_widths(spec: FluxSpec, rows: int) -> None:
    """Both of its gated products and the one back, text and image apart, each as a block calls it."""
    d, m = spec.transformer.hidden_size, spec.transformer.mlp_width
    x, x_scale, up = operands(rows, 2 * m, d, E4M3)
    wide = poisoned(rows, d + m, dtype=E4M3)
    expected = torch.empty(rows, m, device=DEVICE)
    plain.plain_linear_swiglu(x, x_scale, up, 512, 5.0, expected)
    kernels.linear_swiglu(x, x_scale, hopper.arranged(up), 512, 5.0, wide[:, d:])
    tolerance = 2 * of_product(E4M3) + 2**-10
    same(wide[:, d:], expected.clamp(-448, 448), E4M3, tolerance)
    assert torch.isnan(wide[:, :d].float()).all()

    _, _, single = operands(1, 3 * d + 2 * m, d, E4M3, streams=1)
    heads, qkv = heads_of(rows, 1), poisoned(rows, 3 * d, dtype=E4M3)
    both = torch.empty(rows, 3 * d, device=DEVICE), expected
    plain.plain_linear_heads_swiglu(x, x_scale, single, heads, both[0], 5.0, both[1])
    kernels.linear_heads_swiglu(x, x_scale, hopper.arranged(single), heads, qkv, 5.0, wide[:, d:])
    same(qkv, both[0].clamp(-448, 448), E4M3, tolerance)
    same(wide[:, d:], both[1].clamp(-448, 448), E4M3, tolerance)

    wide[:, :d] = torch.randn(rows, d, device=DEVICE).to(E4M3)
    _, _, out = operands(1, d, d + m, E4M3, streams=1)
    gate, got = random(1, d, seed=2), random(rows, d, seed=3).to(torch.bfloat16)
    added = got.float()
    plain.plain_linear_add(wide, None, out, 0, gate, added)
    kernels.linear_add(wide, None, hopper.arranged(out), 0, gate, got)
    torch.cuda.synchronize()
    same(got, added, torch.bfloat16, of_product(E4M3))
