"""The mean of attention's values: taken off before they are rounded, given back behind the projection."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks import value_means
from benchmarks.accumulator import emulated_attention
from fluxserve.kernels.fp8 import E4M3, quantise_rows
from fluxserve.kernels.gemm import plain as plain
from fluxserve.kernels.gemm import portable as kernels
from fluxserve.kernels.gemm.hopper import arranged
from fluxserve.kernels.gemm.layers import Centre, Heads, Linear
from fluxserve.kernels.gemm.value_means import centre_values, plain_centre_values
from fluxserve.kernels.operations import LAUNCHED, PLAIN
from tests.kernels.judge import DEVICE, INTERPRETED, of_product, poisoned, random, relative, same
from tests.kernels.test_linear import HEAD, operands

ON_GPU = pytest.mark.skipif(INTERPRETED, reason="needs a Hopper GPU")
Way = Callable[[Tensor, Tensor | None, Linear, int, Centre], None]


def centre_for(width: int, inputs: int, streams: int) -> Centre:
    """A projection of `inputs` numbers, the first `width` of them attention's; outputs poisoned."""
    weight, scale = quantise_rows(random(streams, width, inputs, seed=8, spread=inputs**-0.5))
    mean, restored = torch.full((width,), float("nan")), torch.full((streams, width), float("nan"))
    due = torch.ones(1, dtype=torch.int32, device=DEVICE)
    return Centre(Linear(weight, scale, None), 0.25, due, mean.to(DEVICE), restored.to(DEVICE))


def exact(x: Tensor, x_scale: Tensor | None, w: Linear, split: int, centre: Centre) -> tuple[Tensor, Tensor]:
    """The mean and what is restored of it, in float64, from v itself."""
    wide = x.double() if x_scale is None else x.double() * x_scale.double()[:, None]
    parts = ((0, wide[:split]), (-1, wide[split:])) if len(w.weight) == 2 else ((0, wide),)
    values = []
    for stream, rows in parts:
        y = rows @ w.weight[stream].double().T
        y = y if w.scale is None else y * w.scale[stream].double()
        values.append(y if w.bias is None else y + w.bias[stream].double())
    mean = torch.cat(values)[:, -len(centre.mean) :].mean(dim=0)
    return mean, restored_from(replace(centre, mean=mean))


def restored_from(centre: Centre) -> Tensor:
    """What the projection makes of `centre.mean`, in float64."""
    back = centre.back.weight[:, :, : len(centre.mean)].double() @ centre.mean.double() * centre.inverse
    return back if centre.back.scale is None else back * centre.back.scale.double()


@pytest.mark.parametrize("way", [centre_values, plain_centre_values])
@pytest.mark.parametrize(("rows", "width", "inner", "wider"), [(1, 128, 64, 0), (17, 96, 80, 48), (130, 256, 128, 512)])
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("dtype", [E4M3, torch.float32])
@pytest.mark.parametrize("biased", [True, False])
def test_mean_of_the_values(
    way: Way, rows: int, width: int, inner: int, wider: int, streams: int, dtype: torch.dtype, biased: bool
) -> None:
    x, x_scale, w = operands(rows, 3 * width, inner, dtype, streams)
    w = w if biased else replace(w, bias=None)
    centre, split = centre_for(width, width + wider, streams), rows // 3
    way(x, x_scale, w, split, centre)
    mean, restored = exact(x, x_scale, w, split, centre)
    assert relative(centre.mean, mean) < 1e-5 and relative(centre.restored, restored) < 1e-5


@pytest.mark.parametrize("way", [kernels.linear_heads, plain.plain_linear_heads])
def test_heads_lose_it_and_the_projection_adds_it(way: Callable[..., None]) -> None:
    """q and k stay as they are; v and what is restored are what they are in float64."""
    rows, width, inner, split = 23, 128, 96, 7
    x, x_scale, w = operands(rows, 3 * width, inner, E4M3)
    centre = centre_for(width, width, 2)
    turn = torch.ones(rows, HEAD // 2, device=DEVICE), torch.zeros(rows, HEAD // 2, device=DEVICE)
    heads = Heads(torch.ones(2, 3, HEAD, device=DEVICE), *turn, centre)
    got, without = (poisoned(rows, 3 * width, dtype=torch.float32) for _ in range(2))
    way(x, x_scale, w, split, heads, got)
    way(x, x_scale, w, split, replace(heads, centre=None), without)
    tolerance = of_product(E4M3)
    assert torch.equal(got[:, : 2 * width], without[:, : 2 * width])
    assert relative(got[:, 2 * width :] + centre.mean, without[:, 2 * width :]) < tolerance + 1e-6
    kept, again = centre.mean.clone(), poisoned(rows, 3 * width, dtype=torch.float32)
    zeros = torch.zeros_like(x.float()).to(x.dtype)
    way(zeros, x_scale, w, split, replace(heads, centre=replace(centre, due=centre.due * 0)), again)
    assert torch.equal(centre.mean, kept), "computed when it is due, and only then"
    assert w.bias is not None
    values = torch.cat([w.bias[i, 2 * width :].expand(n, -1) for i, n in ((0, split), (1, rows - split))]) - kept
    assert relative(again[:, 2 * width :], values) < tolerance + 1e-6

    add = kernels.linear_add if way is kernels.linear_heads else plain.plain_linear_add
    hidden, hidden_scale, back = operands(rows, width, width, E4M3)
    residual, expected = torch.zeros(rows, width, device=DEVICE), torch.zeros(rows, width, device=DEVICE)
    gate = random(2, width, seed=9)
    add(hidden, hidden_scale, back, split, gate, residual, centre.restored)
    assert back.bias is not None
    plain.plain_linear_add(hidden, hidden_scale, replace(back, bias=back.bias + centre.restored), split, gate, expected)
    assert relative(residual, expected) < tolerance + 1e-6


# --- the judge: attention of values with a mean, against float64 ------------------------------------------------------

KEYS = [1, 17, 300, 4608] if INTERPRETED else [1, 17, 300, 4608, 4700, 16896, 33280, 66048]


def figures(rows: int, ratio: float, peak: float, centred: bool = True) -> dict[str, float]:
    case = value_means.make(rows, ratio, peak, DEVICE)
    way = (PLAIN, emulated_attention) if INTERPRETED else (LAUNCHED, value_means.launched_attention)
    return value_means.errors(case, value_means.run(case, *way, centred))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("rows", KEYS)
@pytest.mark.parametrize("peak", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0, 3.0])
def test_attention_of_values_with_a_mean(request: pytest.FixtureRequest, rows: int, peak: float, ratio: float) -> None:
    """As good as E4M3 arithmetic whose sums are exact; and what attention says beside the mean is right to a tenth."""
    if (rows, peak, ratio) == (66048, 2.0, 0.0):
        reason = "1.3 × plain on an H200: 13 bits lose the tail of peaked scores; no model asks for so many keys"
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    found = figures(rows, ratio, peak)
    assert found["error"] <= 1.1 * found["plain"] + 1e-3
    assert found["projected"] <= 1.1 * found["plain"] + 2**-8, "BF16's rounding of the stream comes on top"
    if rows > 1 and ratio <= 1:
        assert found["error_over_deviation"] <= max(0.1, 1.1 * found["plain_centred_over_deviation"])


@pytest.mark.parametrize(("rows", "shrunk"), [(4608, 0.05), (16896, 0.17)])
def test_the_judge_sees_a_mean_that_is_left_in(rows: int, shrunk: float) -> None:
    """What the sums of the tensor cores lose then, emulated or on the GPU: a mean of one spread shrinks by so much."""
    found = figures(rows, 1.0, 1.0, centred=False)
    assert found["shrunk"] > shrunk
    assert found["error"] > 2 * found["plain"]
    assert found["error_over_deviation"] > 1


# --- beside the product on a Hopper GPU -------------------------------------------------------------------------------


def heads_of(rows: int, streams: int, centre: Centre | None) -> Heads:
    angle = random(rows, HEAD // 2, seed=4)
    return Heads(random(streams, 3, HEAD, seed=5).abs() + 0.5, angle.cos(), angle.sin(), centre)


@ON_GPU
@pytest.mark.timeout(60)
@pytest.mark.parametrize("rows", [1, 17, 257, 4608, 9217])
@pytest.mark.parametrize(("width", "inner"), [(256, 208), (3072, 3072), (4096, 4096), (6144, 6144)])
@pytest.mark.parametrize("streams", [1, 2])
def test_spare_warps_as_the_reference(rows: int, width: int, inner: int, streams: int) -> None:
    x, x_scale, w = operands(rows, 3 * width, inner, E4M3, streams)
    split = rows // 9 if streams == 2 else 0
    ours, theirs = centre_for(width, width + 256, streams), centre_for(width, width + 256, streams)
    ours = replace(ours, back=arranged(ours.back))
    got, expected = poisoned(rows, 3 * width, dtype=E4M3), torch.empty(rows, 3 * width, device=DEVICE)
    kernels.linear_heads(x, x_scale, arranged(w), split, heads_of(rows, streams, ours), got)
    plain.plain_linear_heads(x, x_scale, w, split, heads_of(rows, streams, theirs), expected)
    torch.cuda.synchronize()
    mean, _ = exact(x, x_scale, w, split, theirs)
    spread = float(expected[:, 2 * width :].float().std()) if rows > 1 else float(mean.std())
    assert float((ours.mean - mean).norm()) < 5e-4 * spread * width**0.5, "x is added up in halves"
    taken = replace(theirs, mean=ours.mean, restored=ours.restored)
    assert relative(ours.restored, restored_from(taken)) < 1e-4
    same(got[:, : 2 * width], expected[:, : 2 * width].clamp(-448, 448), E4M3, of_product(E4M3) + 2**-10)
    if rows > 1:  # of one row nothing is left but the product's own error
        same(got[:, 2 * width :], expected[:, 2 * width :].clamp(-448, 448), E4M3, of_product(E4M3) + 2**-10)


@ON_GPU
@pytest.mark.timeout(120)
@pytest.mark.parametrize("ending", ["gelu", "swiglu"])
def test_the_same_bits_every_time_and_counters_are_left_at_nothing(ending: str) -> None:
    """Launches of several shapes in turn, as a model's blocks are: each leaves the meeting place as it found it."""
    first: dict[int, list[Tensor]] = {}
    for _ in range(20):
        for rows, width, streams in ((4608, 3072, 2), (4608, 3072, 1), (321, 256, 1), (2000, 256, 2)):
            x, x_scale, w = operands(rows, 3 * width, width, E4M3, streams)
            centre = centre_for(width, 2 * width, streams)
            centre = replace(centre, back=arranged(centre.back))
            out = poisoned(rows, 3 * width, dtype=E4M3)
            heads = heads_of(rows, streams, centre)
            if streams == 1:
                _, _, both = operands(1, 7 * width, width, E4M3, streams=1)
                hidden = poisoned(rows, 4 * width // (1 if ending == "gelu" else 2), dtype=E4M3)
                launch = getattr(kernels, f"linear_heads_{ending}")
                launch(x, x_scale, arranged(both), heads, out, 5.0, hidden)
            else:
                kernels.linear_heads(x, x_scale, arranged(w), rows // 9, heads, out)
            made = [out.view(torch.uint8), centre.mean, centre.restored]
            before = first.setdefault(rows * width * streams, made)
            assert all(torch.equal(a, b) for a, b in zip(before, made, strict=True))


@ON_GPU
def test_a_projection_that_lies_another_way_is_refused() -> None:
    x, x_scale, w = operands(4, 768, 128, E4M3)
    out, centre = poisoned(4, 768, dtype=E4M3), centre_for(256, 256, 2)
    with pytest.raises(ValueError, match=r"centre: got \(2, 256, 256\) as it is; expected it `arranged`"):
        kernels.linear_heads(x, x_scale, arranged(w), 1, heads_of(4, 2, centre), out)
