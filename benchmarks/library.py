"""The other way to do what `kernels.linear` does: cuBLASLt's product, then its ending as a kernel of its own.

Written to be measured against (`benchmarks.kernels`): it costs a trip of the product through memory, and gains whatever
cuBLASLt is faster by. Same signatures, same endings; the text's and the image's product are two calls.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxserve.kernels import linear
from fluxserve.kernels.linear import RMS_EPSILON, Heads, Linear
from fluxserve.kernels.operations import LAUNCHED, Operations

_ROWS, _COLUMNS = 64, 128


@triton.jit
def _ending_kernel(
    y,
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
    split,
    second,
    y_stride,
    out_stride,
    epsilon,
    ENDING: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HEAD: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    tiles_first = tl.cdiv(split, BM)
    tile = tl.program_id(0)
    in_second = tile >= tiles_first
    row = tl.where(in_second, split + (tile - tiles_first) * BM, tile * BM)
    end = tl.where(in_second, M, split)
    column = tl.program_id(1) * BN
    rows, columns = row + tl.arange(0, BM), column + tl.arange(0, BN)
    mask = (rows < end)[:, None] & (columns < N)[None, :]
    product = tl.load(y + rows[:, None] * y_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    parameters = (None, w_scale, bias, out, gate, factors, cos, sin, inverse)
    place = (row, end, column, in_second.to(tl.int32) * second, N, out_stride, epsilon)
    linear._finish(product, 0, parameters, place, ENDING, BM, BN, HEAD, INTERPRETED)


@cache
def _ones(count: int, device: torch.device) -> Tensor:
    return torch.ones(count, device=device)


def products(x: Tensor, x_scale: Tensor | None, w: Linear, split: int) -> Tensor:
    """BF16 [rows, N], without the weights' scales and the bias; cuBLASLt takes scales of rows and of columns together,
    so that of the columns is 1 where there is one for rows."""
    rows, (streams, columns, _) = len(x), w.weight.shape
    out = torch.empty(rows, columns, dtype=torch.bfloat16, device=x.device)
    one, ones = _ones(1, x.device).view(()), _ones(columns, x.device)[None]
    for stream, part in ((0, slice(0, split)), (streams - 1, slice(split, None))):
        if x[part].shape[0] == 0:
            continue
        scale_a = one if x_scale is None else x_scale[part, None]
        torch._scaled_mm(
            x[part],
            w.weight[stream].T,
            scale_a=scale_a,
            scale_b=one if x_scale is None else ones,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
            out=out[part],
        )
    return out


def end(
    ending: str,
    y: Tensor,
    w: Linear,
    split: int,
    out: Tensor,
    gate: Tensor | None = None,
    heads: Heads | None = None,
    inverse: float = 1.0,
) -> None:
    """Finish products [rows, N] as `kernels.linear` would."""
    rows, columns = y.shape
    grid = (triton.cdiv(split, _ROWS) + triton.cdiv(rows - split, _ROWS), triton.cdiv(columns, _COLUMNS))
    _ending_kernel[grid](
        y,
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
        split,
        w.weight.shape[0] - 1,
        y.stride(0),
        out.stride(0),
        RMS_EPSILON,
        ENDING=ending,
        BM=_ROWS,
        BN=_COLUMNS,
        HEAD=heads.factors.shape[-1] if heads else 1,
        INTERPRETED=y.device.type == "cpu",
        num_warps=4,
    )


Finish = Callable[..., None]
"""(ending, x, x_scale, w, split, out, gate=, heads=, inverse=)"""


def operations(finish: Finish, arrange: Callable[[Linear], Linear]) -> Operations:
    """A contender's products in place of ours, for E4M3 alone; everything else as it is launched."""

    def gelu(x: Tensor, x_scale: Tensor | None, w: Linear, split: int, inverse: float, out: Tensor) -> None:
        finish("gelu", x, x_scale, w, split, out, inverse=inverse)

    def add(x: Tensor, x_scale: Tensor | None, w: Linear, split: int, gate: Tensor | None, residual: Tensor) -> None:
        finish("add", x, x_scale, w, split, residual, gate=gate)

    def heads(x: Tensor, x_scale: Tensor | None, w: Linear, split: int, heads: Heads, out: Tensor) -> None:
        finish("heads", x, x_scale, w, split, out, heads=heads)

    return replace(LAUNCHED, arrange=arrange, linear_gelu=gelu, linear_add=add, linear_heads=heads)


def launch(ending: str, x: Tensor, x_scale: Tensor | None, w: Linear, split: int, out: Tensor, **more: Any) -> None:
    """Product and ending, as `kernels.linear` would."""
    end(ending, products(x, x_scale, w, split), w, split, out, **more)


OPERATIONS = operations(launch, LAUNCHED.arrange)
