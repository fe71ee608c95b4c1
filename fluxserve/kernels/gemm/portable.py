"""Linear layers and what follows them, in one kernel: the product never goes to memory before its ending is done.

    y = (x · Wᵀ) · row scale · column scale + bias                 products accumulated in float32

    linear            out = y
    linear_gelu       out = gelu_tanh(y) / s                        the MLP's first half; s static, out E4M3
    linear_swiglu     out = silu(gates of y) · values of y / s      FLUX.2's; half as wide as y, see `in_turns`
    linear_add        residual += gate · (y + restored)             the projections back into the residual stream
    linear_heads      out = RoPE(RMSNorm(q)), …(k), v, each / its s heads of q, k and v, ready for attention; s static;
                                                                    v less its mean, if it has a `Centre`
    linear_heads_gelu the first columns as heads, the others as gelu both, of the same x: a single block's two products
    linear_heads_swiglu                      … the others as swiglu both  FLUX.2's

x is E4M3 with a scale per row (taken by `norm`), E4M3 with static scales that the weights have in them already, or the
compute dtype. Weights of two streams lie behind each other: rows before `split` take the first (text), the others the
last (image), so that a double block's two products fill the GPU as one.

One persistent program per SM walks over tiles in groups that share weights in L2; operands come by TMA. E4M3 products
are summed in the tensor core's own accumulator (about 14 bits of mantissa), as `use_fast_accum` of cuBLASLt.
Conversion to E4M3 saturates at ±448 (PTX cvt.satfinite), as `fp8.cast` does.
"""

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fluxserve.kernels.gemm import hopper
from fluxserve.kernels.gemm.activations import gelu_tanh, silu
from fluxserve.kernels.gemm.layers import GATES, RMS_EPSILON, Arranged, Heads, Linear, Watched, divided
from fluxserve.kernels.gemm.saturation import count_saturated
from fluxserve.kernels.gemm.value_means import centre_values, less_mean, plus_restored
from fluxserve.kernels.jit import nvrtc

_GROUP = 8
_PART = 128
"""Columns of a tile that are finished at once: more would not leave registers for what an ending loads."""


@triton.jit
def _scaled(y, rows, valid_rows, columns, valid, x_scale, w_scale, bias):
    """The product of quantised numbers → what it stands for, and the bias."""
    if x_scale is not None:
        y = y * tl.load(x_scale + rows, mask=valid_rows, other=0.0)[:, None]
    if w_scale is not None:
        y = y * tl.load(w_scale + columns, mask=valid, other=0.0)[None, :]
    if bias is not None:
        y = y + tl.load(bias + columns, mask=valid, other=0.0)[None, :]
    return y


@triton.jit
def _store_heads(
    y,
    out,
    rows,
    end,
    column,
    stream,
    third,
    out_stride,
    factors,
    cos,
    sin,
    epsilon,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HEAD: tl.constexpr,
):
    """RMSNorm and RoPE of a tile that lies in q, in k or in v, and covers whole heads; v is only scaled.

    Selected, not branched, and halves never joined again: either would pass the tile through shared memory.
    """
    HALF: tl.constexpr = HEAD // 2
    which = column // third
    turned = which < 2
    heads = tl.reshape(y, (BM, BN // HEAD, HEAD))
    inverse = tl.where(turned, tl.rsqrt(tl.sum(heads * heads, axis=2) / HEAD + epsilon), 1.0)
    halves = tl.reshape(heads * inverse[:, :, None], (BM, BN // HEAD, 2, HALF))
    real, imaginary = tl.split(tl.permute(halves, (0, 1, 3, 2)))
    real, imaginary = tl.reshape(real, (BM, BN // 2)), tl.reshape(imaginary, (BM, BN // 2))

    index = tl.arange(0, BN // 2)
    pair = tl.max_contiguous(index % HALF, HALF)
    place = factors + (stream * 3 + which) * HEAD + pair
    real, imaginary = real * tl.load(place)[None, :], imaginary * tl.load(place + HALF)[None, :]
    valid = (rows < end)[:, None]
    at = rows[:, None] * HALF + pair[None, :]
    used = (rows < tl.where(turned, end, 0))[:, None]
    c = tl.where(turned, tl.load(cos + at, mask=used, other=0.0), 1.0)
    s = tl.load(sin + at, mask=used, other=0.0)
    target = out + rows[:, None] * out_stride + (column + index // HALF * HEAD + pair)[None, :]
    tl.store(target, (real * c - imaginary * s).to(out.dtype.element_ty), mask=valid)
    tl.store(target + HALF, (imaginary * c + real * s).to(out.dtype.element_ty), mask=valid)


@triton.jit
def _finish(
    y,
    offset,
    parameters,
    place,
    ENDING: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HEAD: tl.constexpr,
    GATES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """From a part of the product to what is stored. The part begins `offset` columns into the tile."""
    x_scale, w_scale, bias, out, gate, factors, cos, sin, inverse = parameters
    row, end, column, stream, N, out_stride, epsilon = place
    column += offset
    rows, columns = row + tl.arange(0, BM), column + tl.arange(0, BN)
    of_stream, valid = stream * N + columns, columns < N
    y = _scaled(y, rows, rows < end, of_stream, valid, x_scale, w_scale, bias)
    if ENDING == "gelu":
        y = gelu_tanh(y, INTERPRETED) * inverse
    if ENDING == "swiglu":
        turns = tl.reshape(y, (BM, BN // (2 * GATES), 2, GATES))
        gates, values = tl.split(tl.permute(turns, (0, 1, 3, 2)))
        y = tl.reshape(silu(gates, INTERPRETED) * values * inverse, (BM, BN // 2))
        columns = column // 2 + tl.arange(0, BN // 2)
        valid = columns < N // 2
    target = out + rows[:, None] * out_stride + columns[None, :]
    mask = (rows < end)[:, None] & valid[None, :]
    if ENDING == "add":
        if gate is not None:
            y = y * tl.load(gate + of_stream, mask=valid, other=0.0)[None, :]
        y += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    if ENDING == "heads":
        _store_heads(y, out, rows, end, column, stream, N // 3, out_stride, factors, cos, sin, epsilon, BM, BN, HEAD)
    else:
        tl.store(target, y.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "split"])  # or an odd number of tokens would be compiled anew
def _linear_kernel(
    x,
    w,
    x_scale,
    w_scale,
    bias,
    out,
    gate,
    factors,
    cos,
    sin,
    inverse,
    M,
    N,
    K,
    split,
    second,
    out_stride,
    epsilon,
    ENDING: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    GATES: tl.constexpr,
    PROGRAMS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    tiles_first = tl.cdiv(split, BM)
    tiles_m = tiles_first + tl.cdiv(M - split, BM)
    tiles_n = tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=not INTERPRETED):
        group = tile // (GROUP * tiles_n)
        height = tl.minimum(tiles_m - group * GROUP, GROUP)
        tile_m = group * GROUP + (tile % (GROUP * tiles_n)) % height
        column = (tile % (GROUP * tiles_n)) // height * BN
        in_second = tile_m >= tiles_first
        row = tl.where(in_second, split + (tile_m - tiles_first) * BM, tile_m * BM)
        end = tl.where(in_second, M, split)
        stream = in_second.to(tl.int32) * second

        y = tl.zeros((BM, BN), dtype=tl.float32)
        for k in range(0, K, BK):
            a, b = x.load([row, k]), w.load([stream * N + column, k])
            if INTERPRETED:
                a, b = a.to(tl.float32), b.to(tl.float32)
            y = tl.dot(a, b.T, y)

        parameters = (x_scale, w_scale, bias, out, gate, factors, cos, sin, inverse)
        place = (row, end, column, stream, N, out_stride, epsilon)
        if PARTS == 2:  # one after the other, so that what an ending loads needs half the registers
            left, right = tl.split(tl.permute(tl.reshape(y, (BM, 2, BN // 2)), (0, 2, 1)))
            _finish(left, 0, parameters, place, ENDING, BM, BN // 2, HEAD, GATES, INTERPRETED)
            _finish(right, BN // 2, parameters, place, ENDING, BM, BN // 2, HEAD, GATES, INTERPRETED)
        else:
            _finish(y, 0, parameters, place, ENDING, BM, BN, HEAD, GATES, INTERPRETED)


@dataclass(frozen=True)
class Tiling:
    """How a product is cut.

    rows, columns: of a tile. inner: of K, loaded at once, `stages` of them in flight. warps: of a program. resident:
    programs that share an SM, so that one multiplies while another is at its ending.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    resident: int = 1


def tiling(rows: int, columns: int, element_size: int, out_size: int) -> Tiling:
    """What runs a product of this family fast, and fits: float32 results take twice the shared memory on their way out.

    Reckoned. Measured in FP8 (benchmarks/results/steps-contenders-h100-2026-11-22.json); in BF16 not yet.
    """
    inner = 128 // element_size
    if rows <= 256 or columns <= 256:
        return Tiling(64, 128, inner, 8 if out_size == 4 else 4, 4)
    if rows <= 1024:  # a text encoder's: smaller tiles, so that there are enough for all SMs
        return Tiling(128, 128, inner, 8, 4)
    return Tiling(128, 256, inner, 8, 3 if out_size == 4 else 4)


def parts(t: Tiling, ending: str, out_size: int) -> int:
    """In how many a tile is finished: so many that no register is spilled; heads stay whole."""
    width = _PART // 2 if out_size == 4 and ending != "heads" else _PART
    return 2 if t.columns >= 2 * width else 1


def _launch(ending: str, x: Tensor, x_scale: Tensor | None, w: Linear, split: int, out: Tensor, **more: Any) -> None:
    """In CUDA where the weights lie as its kernel wants them, in Triton everywhere else."""
    launch = hopper.launch if isinstance(w, Arranged) else _launch_triton
    launch(ending, x, x_scale, w, split, out, **more)


def _launch_triton(
    ending: str,
    x: Tensor,
    x_scale: Tensor | None,
    w: Linear,
    split: int,
    out: Tensor,
    *,
    gate: Tensor | None = None,
    heads: Heads | None = None,
    inverse: float = 1.0,
    restored: Tensor | None = None,
    watched: Watched | None = None,
) -> None:
    if heads and heads.centre:
        centre_values(x, x_scale, w, split, heads.centre)
        w = less_mean(w, heads.centre.mean)
    if restored is not None:
        w = plus_restored(w, restored)
    if watched:
        count_saturated(watched)
    (rows, inner), (streams, columns, _) = x.shape, w.weight.shape
    t = tiling(rows, columns, x.element_size(), out.element_size())
    programs = t.resident * nvrtc.processors(x.device)
    _linear_kernel[(programs,)](
        TensorDescriptor.from_tensor(x, [t.rows, t.inner]),
        TensorDescriptor.from_tensor(w.weight.view(streams * columns, inner), [t.columns, t.inner]),
        x_scale,
        w.scale,
        w.bias,
        out,
        gate,
        heads.factors if heads else None,
        heads.cos if heads else None,
        heads.sin if heads else None,
        inverse,
        rows,
        columns,
        inner,
        split,
        streams - 1,
        out.stride(0),
        RMS_EPSILON,
        ENDING=ending,
        BM=t.rows,
        BN=t.columns,
        BK=t.inner,
        PARTS=parts(t, ending, out.element_size()),
        GROUP=_GROUP,
        HEAD=heads.factors.shape[-1] if heads else 1,
        GATES=GATES,
        PROGRAMS=programs,
        INTERPRETED=x.device.type == "cpu",  # Triton's interpreter multiplies bfloat16 as if it were whole numbers
        num_warps=t.warps,
        num_stages=t.stages,
    )


def linear(x: Tensor, x_scale: Tensor | None, w: Linear, split: int, out: Tensor) -> None:
    """out [rows, N] = y. x [rows, K] with rows 16-byte aligned; x_scale float32 [rows] or None; split: see above."""
    _launch("none", x, x_scale, w, split, out)


def linear_gelu(x: Tensor, x_scale: Tensor | None, w: Linear, split: int, inverse: float, out: Tensor) -> None:
    """out [rows, N] = gelu_tanh(y) · inverse."""
    _launch("gelu", x, x_scale, w, split, out, inverse=inverse)


def linear_swiglu(x: Tensor, x_scale: Tensor | None, w: Linear, split: int, inverse: float, out: Tensor) -> None:
    """out [rows, N / 2] = silu(gates) · values · inverse; N a multiple of 2 · GATES."""
    _launch("swiglu", x, x_scale, w, split, out, inverse=inverse)


def linear_add(
    x: Tensor,
    x_scale: Tensor | None,
    w: Linear,
    split: int,
    gate: Tensor | None,
    residual: Tensor,
    restored: Tensor | None = None,
    watched: Watched | None = None,
) -> None:
    """residual [rows, N] += gate · (y + restored), in place; gate, restored float32 [streams, N], None for 1 and 0.

    watched: what is counted meanwhile; see `saturation`.
    """
    _launch("add", x, x_scale, w, split, residual, gate=gate, restored=restored, watched=watched)


def linear_heads(x: Tensor, x_scale: Tensor | None, w: Linear, split: int, heads: Heads, out: Tensor) -> None:
    """out [rows, N], N = 3 · heads · head_dim: q and k normalised and rotated, v less its mean, each times its
    factors."""
    _launch("heads", x, x_scale, w, split, out, heads=heads)


def linear_heads_gelu(
    x: Tensor, x_scale: Tensor | None, w: Linear, heads: Heads, out: Tensor, inverse: float, hidden: Tensor
) -> None:
    """out as linear_heads of the first outputs, hidden as linear_gelu of the others; one stream."""
    _launch_both("gelu", x, x_scale, w, heads, out, inverse, hidden)


def linear_heads_swiglu(
    x: Tensor, x_scale: Tensor | None, w: Linear, heads: Heads, out: Tensor, inverse: float, hidden: Tensor
) -> None:
    """out as linear_heads of the first outputs, hidden as linear_swiglu of the others; one stream."""
    _launch_both("swiglu", x, x_scale, w, heads, out, inverse, hidden)


def _launch_both(
    ending: str,
    x: Tensor,
    x_scale: Tensor | None,
    w: Linear,
    heads: Heads,
    out: Tensor,
    inverse: float,
    hidden: Tensor,
) -> None:
    """One launch of CUDA's, two of Triton's."""
    if isinstance(w, Arranged):
        hopper.launch(f"heads_{ending}", x, x_scale, w, 0, out, heads=heads, inverse=inverse, hidden=hidden)
        return
    first, rest = divided(w, out.shape[1])
    linear_heads(x, x_scale, first, 0, heads, out)
    _launch(ending, x, x_scale, rest, 0, hidden, inverse=inverse)
