"""The mean of attention's values, without a pass over them: v = x · Wᵀ + b is linear, so its mean follows from x's.

    mean [heads · head_dim]     Σ over streams of (Σ rows of x) · W_vᵀ + rows · b_v, divided by the number of all rows
    restored [streams, N]       mean · W_backᵀ / s_out, which the projection behind attention adds to its bias

Unless `due` says so, nothing is computed and both stay as they are.

See `layers.Centre` for why. `gemm.hopper` computes both beside its own product; here are the kernels for weights that
are not arranged for it, and the definitions that both are judged by.
"""

from dataclasses import replace
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxserve.kernels.gemm.layers import Centre, Linear

_COLUMNS, _ROWS, _OUTPUTS = 128, 32, 16


@triton.jit
def _sums_kernel(due, x, x_scale, sums, M, K, split, x_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The sum of a stream's rows, divided by the number of all; always added in the same order."""
    if tl.load(due) == 0:
        return
    stream = tl.program_id(1)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.where(stream == 0, 0, split)
    end = tl.where(stream == tl.num_programs(1) - 1, M, split)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for start in range(first, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < end)[:, None] & (columns < K)[None, :]
        part = tl.load(x + rows[:, None] * x_stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        if x_scale is not None:
            part *= tl.load(x_scale + rows, mask=rows < end, other=0.0)[:, None]
        total += tl.sum(part, axis=0)
    tl.store(sums + stream * K + columns, total / M, mask=columns < K)


@triton.jit
def _products_kernel(
    due,
    vector,
    w,
    w_scale,
    bias,
    out,
    first,
    N,
    K,
    w_inner,
    split,
    M,
    factor,
    STREAMS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out = Σ over STREAMS of vector · w's outputs from `first` on, times factor; with bias, by each stream's rows.

    STREAMS 0: one vector for all streams, each of which has an output of its own.
    """
    if tl.load(due) == 0:
        return
    index = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    mask = index < N - first
    value = tl.zeros((OUTPUTS,), dtype=tl.float32)
    for i in tl.static_range(STREAMS if STREAMS > 0 else 1):
        stream = i if STREAMS > 0 else tl.program_id(1)
        output = stream * N + first + index
        total = tl.zeros((OUTPUTS, COLUMNS), dtype=tl.float32)
        for start in range(0, K, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            inside = mask[:, None] & (columns < K)[None, :]
            part = tl.load(w + output[:, None] * w_inner + columns[None, :], mask=inside, other=0.0).to(tl.float32)
            total += part * tl.load(vector + i * K + columns, mask=columns < K, other=0.0)[None, :]
        product = tl.sum(total, axis=1)
        if w_scale is not None:
            product *= tl.load(w_scale + output, mask=mask, other=0.0)
        if bias is not None:
            rows = M if STREAMS == 1 else split if i == 0 else M - split
            product += tl.load(bias + output, mask=mask, other=0.0) * rows / M
        value += product
    place = index if STREAMS > 0 else tl.program_id(1) * N + index
    tl.store(out + place, value * factor, mask=mask)


@cache  # for good: captured graphs write to it
def _sums(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device=device)


def centre_values(x: Tensor, x_scale: Tensor | None, w: Linear, split: int, centre: Centre) -> None:
    """Launch: write `centre.mean` and `centre.restored`, if they are due.

    Args:
        x: [M, K], any dtype; x_scale: float32 [M] or None.
        w: [streams, N, K], whose last len(centre.mean) outputs are v's; rows before `split` take the first stream.
    """
    (rows, inner), (streams, outputs, _), width = x.shape, w.weight.shape, len(centre.mean)
    sums = _sums(streams * inner, x.device)
    grid = (triton.cdiv(inner, _COLUMNS), streams)
    tiles = {"ROWS": _ROWS, "COLUMNS": _COLUMNS, "num_warps": 4}
    _sums_kernel[grid](centre.due, x, x_scale, sums, rows, inner, split, x.stride(0), **tiles)
    tiles = {"OUTPUTS": _OUTPUTS, "COLUMNS": _COLUMNS, "num_warps": 4}
    given = (centre.due, sums, w.weight, w.scale, w.bias, centre.mean)
    first = outputs - width
    _products_kernel[(triton.cdiv(width, _OUTPUTS),)](
        *given, first, outputs, inner, inner, split, rows, 1.0, STREAMS=streams, **tiles
    )
    back = centre.back
    streams, outputs, inputs = back.weight.shape
    given = (centre.due, centre.mean, back.weight, back.scale, None, centre.restored)
    _products_kernel[(triton.cdiv(outputs, _OUTPUTS), streams)](
        *given, 0, outputs, width, inputs, 0, 1, centre.inverse, STREAMS=0, **tiles
    )


def less_mean(w: Linear, mean: Tensor) -> Linear:
    """The same product with the mean taken off its last outputs' bias, in memory that the next call overwrites."""
    bias = _bias(w)
    bias[:, -len(mean) :] -= mean
    return replace(w, bias=bias)


def plus_restored(w: Linear, restored: Tensor) -> Linear:
    """The same projection with `restored` added to its bias, in memory that the next call overwrites."""
    bias = _bias(w)
    bias += restored
    return replace(w, bias=bias)


def _bias(w: Linear) -> Tensor:
    """A copy."""
    streams, outputs, _ = w.weight.shape
    made = _changed_bias(streams, outputs, w.weight.device)
    return made.zero_() if w.bias is None else made.copy_(w.bias)


@cache  # for good, as `_sums`
def _changed_bias(streams: int, outputs: int, device: torch.device) -> Tensor:
    return torch.empty(streams, outputs, dtype=torch.float32, device=device)


def plain_centre_values(x: Tensor, x_scale: Tensor | None, w: Linear, split: int, centre: Centre) -> None:
    """The same by its definition."""
    if not int(centre.due):
        return
    width, mean = len(centre.mean), torch.zeros_like(centre.mean)
    wide = x.float() if x_scale is None else x.float() * x_scale[:, None]
    streams = ((0, wide[:split]), (-1, wide[split:])) if len(w.weight) == 2 else ((0, wide),)
    for stream, rows in streams:
        product = w.weight[stream, -width:].float() @ rows.sum(dim=0)
        product = product if w.scale is None else product * w.scale[stream, -width:]
        mean += product if w.bias is None else product + len(rows) * w.bias[stream, -width:]
    centre.mean.copy_(mean / len(x))
    back = centre.back
    product = back.weight[:, :, :width].float() @ centre.mean * centre.inverse
    centre.restored.copy_(product if back.scale is None else product * back.scale)
