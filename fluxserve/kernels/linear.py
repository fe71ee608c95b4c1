"""Linear layers and what follows them, in one kernel: the product never goes to memory before its ending is done.

    y = (x · Wᵀ) · row scale · column scale + bias                 products accumulated in float32

    linear            out = y
    linear_gelu       out = gelu_tanh(y) / s                        the MLP's first half; s static, out E4M3
    linear_add        residual += gate · y                          the projections back into the residual stream
    linear_heads      out = RoPE(RMSNorm(q)), …(k), v, each / its s heads of q, k and v, ready for attention; s static
    linear_heads_gelu the first columns as heads, the others as gelu both, of the same x: a single block's two products

x is E4M3 with a scale per row (taken by `norm`), E4M3 with static scales that the weights have in them already, or the
compute dtype. Weights of two streams lie behind each other: rows before `split` take the first (text), the others the
last (image), so that a double block's two products fill the GPU as one.

One persistent program per SM walks over tiles in groups that share weights in L2; operands come by TMA. E4M3 products
are summed in the tensor core's own accumulator (about 14 bits of mantissa), as `use_fast_accum` of cuBLASLt.
Conversion to E4M3 saturates at ±448 (PTX cvt.satfinite), as `fp8.cast` does.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fluxserve.kernels import cuda, linear_hopper
from fluxserve.kernels.fp8 import cast
from fluxserve.kernels.layers import RMS_EPSILON, Arranged, Heads, Linear, divided

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
def gelu_tanh(y, INTERPRETED: tl.constexpr):
    """0.5·y·(1 + tanh(√(2/π)·(y + 0.044715·y³))). A GPU's own tanh is right to 2^-11 and costs one instruction; an
    exponential and a division would cost twenty, and an eighth of the whole product's time."""
    u = y * (0.7978845608028654 + 0.035677408136300125 * y * y)
    if INTERPRETED:
        tanh = 2.0 * tl.sigmoid(2.0 * u) - 1.0
    else:
        tanh = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1)
    return 0.5 * y + 0.5 * y * tanh


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
    INTERPRETED: tl.constexpr,
):
    """From a part of the product to what is stored. The part begins `offset` columns into the tile."""
    x_scale, w_scale, bias, out, gate, factors, cos, sin, inverse = parameters
    row, end, column, stream, N, out_stride, epsilon = place
    column += offset
    rows, columns = row + tl.arange(0, BM), column + tl.arange(0, BN)
    of_stream, valid = stream * N + columns, columns < N
    y = _scaled(y, rows, rows < end, of_stream, valid, x_scale, w_scale, bias)
    target = out + rows[:, None] * out_stride + columns[None, :]
    mask = (rows < end)[:, None] & valid[None, :]
    if ENDING == "gelu":
        y = gelu_tanh(y, INTERPRETED) * inverse
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
            _finish(left, 0, parameters, place, ENDING, BM, BN // 2, HEAD, INTERPRETED)
            _finish(right, BN // 2, parameters, place, ENDING, BM, BN // 2, HEAD, INTERPRETED)
        else:
            _finish(y, 0, parameters, place, ENDING, BM, BN, HEAD, INTERPRETED)


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

    Reckoned, and compiled; not measured yet.
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
    launch = linear_hopper.launch if isinstance(w, Arranged) else _launch_triton
    launch(ending, x, x_scale, w, split, out, **more)


def _launch_triton(
    ending: str,
    x: Tensor,
    x_scale: Tensor | None,
    w: Linear,
    split: int,
    out: Tensor,
    gate: Tensor | None = None,
    heads: Heads | None = None,
    inverse: float = 1.0,
) -> None:
    (rows, inner), (streams, columns, _) = x.shape, w.weight.shape
    t = tiling(rows, columns, x.element_size(), out.element_size())
    programs = t.resident * cuda.processors(x.device)
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


def linear_add(x: Tensor, x_scale: Tensor | None, w: Linear, split: int, gate: Tensor | None, residual: Tensor) -> None:
    """residual [rows, N] += gate · y, in place; gate float32 [streams, N], None for 1."""
    _launch("add", x, x_scale, w, split, residual, gate=gate)


def linear_heads(x: Tensor, x_scale: Tensor | None, w: Linear, split: int, heads: Heads, out: Tensor) -> None:
    """out [rows, N], N = 3 · heads · head_dim: q and k normalised and rotated, v as it is, each times its factors."""
    _launch("heads", x, x_scale, w, split, out, heads=heads)


def linear_heads_gelu(
    x: Tensor, x_scale: Tensor | None, w: Linear, heads: Heads, out: Tensor, inverse: float, hidden: Tensor
) -> None:
    """out as linear_heads of the first outputs, hidden as linear_gelu of the others; one stream."""
    if isinstance(w, Arranged):
        linear_hopper.launch("heads_gelu", x, x_scale, w, 0, out, heads=heads, inverse=inverse, hidden=hidden)
        return
    first, rest = divided(w, out.shape[1])
    linear_heads(x, x_scale, first, 0, heads, out)
    linear_gelu(x, x_scale, rest, 0, inverse, hidden)


# --- the same, plainly --------------------------------------------------------------------------------------------


def _product(x: Tensor, x_scale: Tensor | None, w: Linear, split: int) -> Tensor:
    """y, float32 [rows, N]."""
    parts = []
    for stream, rows in ((0, slice(0, split)), (-1, slice(split, None))):
        y = x[rows].float() @ w.weight[stream].float().T
        y = y * x_scale[rows, None] if x_scale is not None else y
        y = y * w.scale[stream] if w.scale is not None else y
        parts.append(y + w.bias[stream] if w.bias is not None else y)
    return torch.cat(parts)


def plain_linear(x: Tensor, x_scale: Tensor | None, w: Linear, split: int, out: Tensor) -> None:
    out.copy_(cast(_product(x, x_scale, w, split), out.dtype))


def plain_linear_gelu(x: Tensor, x_scale: Tensor | None, w: Linear, split: int, inverse: float, out: Tensor) -> None:
    y = torch.nn.functional.gelu(_product(x, x_scale, w, split), approximate="tanh")
    out.copy_(cast(y * inverse, out.dtype))


def plain_linear_add(
    x: Tensor, x_scale: Tensor | None, w: Linear, split: int, gate: Tensor | None, residual: Tensor
) -> None:
    y = _product(x, x_scale, w, split)
    if gate is not None:
        y[:split] *= gate[0]
        y[split:] *= gate[-1]
    residual.copy_(residual.float() + y)


def plain_linear_heads(x: Tensor, x_scale: Tensor | None, w: Linear, split: int, heads: Heads, out: Tensor) -> None:
    head_dim = heads.factors.shape[-1]
    y = _product(x, x_scale, w, split).view(len(x), 3, -1, head_dim)
    y[:, :2] = torch.nn.functional.rms_norm(y[:, :2], (head_dim,), eps=RMS_EPSILON)
    y[:split] *= heads.factors[0, :, None]
    y[split:] *= heads.factors[-1, :, None]
    first, second = y[:, :2].chunk(2, dim=-1)
    c, s = heads.cos[:, None, None], heads.sin[:, None, None]
    y[:, :2] = torch.cat([first * c - second * s, second * c + first * s], dim=-1)
    out.copy_(cast(y, out.dtype).flatten(1))


def plain_linear_heads_gelu(
    x: Tensor, x_scale: Tensor | None, w: Linear, heads: Heads, out: Tensor, inverse: float, hidden: Tensor
) -> None:
    first, rest = divided(w, out.shape[1])
    plain_linear_heads(x, x_scale, first, 0, heads, out)
    plain_linear_gelu(x, x_scale, rest, 0, inverse, hidden)
