"""GroupNorm and SiLU over a picture that is laid out pixel by pixel: what the VAE does between its convolutions.

    z = x + offset; y = (z − mean) / √(var + ε) · weight + bias; out = y · sigmoid(y)

Statistics are of one picture and one group. `offset` is the bias of the convolution that x comes from, for which cuDNN
would otherwise take a pass of its own.

Two launches: each program of the first takes some pixels and leaves the mean and the squared deviations of every group;
each of the second merges all of them (Chan's formula, so that a large mean costs no digits) and writes its pixels. x is
read twice and written once: 0.8 GB for 1024² pixels of 128 channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_PARTS = 256
"""Programs of the first launch: enough to fill a GPU, few enough to be merged by every program of the second."""

_PROGRAMS = 1024
"""Of the second launch, at most: each reads all parts, 64 KB with 32 groups, before its share of the pixels."""

_TILE = 8192
"""Numbers that a program holds at once."""


@triton.jit
def _channels(CHANNELS: tl.constexpr, GROUPS: tl.constexpr, PADDED: tl.constexpr):
    """Every channel's place in a pixel, each group padded to a power of two; and whether it is one."""
    index = tl.arange(0, GROUPS * PADDED)
    per_pixel: tl.constexpr = CHANNELS // GROUPS
    if per_pixel == PADDED:
        return index, index < CHANNELS
    return index // PADDED * per_pixel + index % PADDED, index % PADDED < per_pixel


@triton.jit(do_not_specialize=["pixels", "per_part"])  # or every size would be compiled anew
def _statistics_kernel(
    x,
    offset,
    parts,
    pixels,
    per_part,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    part = tl.program_id(0)
    begin = part * per_part
    end = tl.minimum(begin + per_part, pixels)
    group = tl.arange(0, GROUPS)
    channel, valid = _channels(CHANNELS, GROUPS, PADDED)
    per_pixel: tl.constexpr = CHANNELS // GROUPS
    added = tl.zeros((GROUPS * PADDED,), tl.float32)
    if offset is not None:
        added = tl.load(offset + channel, mask=valid, other=0.0)
    count = 0.0
    mean = tl.zeros((GROUPS,), tl.float32)
    deviation = tl.zeros((GROUPS,), tl.float32)
    for row in range(begin, end, ROWS):
        rows = row + tl.arange(0, ROWS)
        mask = (rows < end)[:, None] & valid[None, :]
        tile = tl.load(x + rows[:, None].to(tl.int64) * CHANNELS + channel[None, :], mask=mask, other=0.0)
        tile = tl.where(mask, tile.to(tl.float32) + added[None, :], 0.0)
        tile = tl.reshape(tile, (ROWS, GROUPS, PADDED))
        taken = tl.minimum(end - row, ROWS) * per_pixel * 1.0
        own = tl.sum(tl.sum(tile, axis=2), axis=0) / taken
        apart = tl.where(tl.reshape(mask, (ROWS, GROUPS, PADDED)), tile - own[None, :, None], 0.0)
        step = own - mean
        total = count + taken
        deviation += tl.sum(tl.sum(apart * apart, axis=2), axis=0) + step * step * count * taken / total
        mean += step * taken / total
        count = total
    tl.store(parts + part * GROUPS + group, mean)
    tl.store(parts + (PARTS + part) * GROUPS + group, deviation)


@triton.jit(do_not_specialize=["pixels", "per_part", "used"])
def _apply_kernel(
    x,
    offset,
    parts,
    weight,
    bias,
    out,
    pixels,
    per_part,
    used,
    epsilon,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    SILU: tl.constexpr,
):
    group, part = tl.arange(0, GROUPS), tl.arange(0, PARTS)
    channel, valid = _channels(CHANNELS, GROUPS, PADDED)
    per_pixel: tl.constexpr = CHANNELS // GROUPS
    count = tl.maximum(tl.minimum(pixels - part * per_part, per_part), 0) * per_pixel * 1.0
    at, present = part[:, None] * GROUPS + group[None, :], (part < used)[:, None]
    means = tl.load(parts + at, mask=present, other=0.0)
    deviations = tl.load(parts + PARTS * GROUPS + at, mask=present, other=0.0)
    total = pixels * per_pixel * 1.0
    mean = tl.sum(means * count[:, None], axis=0) / total
    apart = means - mean[None, :]
    variance = tl.sum(deviations + apart * apart * count[:, None], axis=0) / total
    inverse = tl.rsqrt(variance + epsilon)

    factor, shift = tl.load(weight + channel, mask=valid, other=0.0), tl.load(bias + channel, mask=valid, other=0.0)
    added = tl.zeros((GROUPS * PADDED,), tl.float32)
    if offset is not None:
        added = tl.load(offset + channel, mask=valid, other=0.0)
    for row in range(tl.program_id(0) * ROWS, pixels, tl.num_programs(0) * ROWS):
        rows = row + tl.arange(0, ROWS)
        mask = (rows < pixels)[:, None] & valid[None, :]
        at_pixels = rows[:, None].to(tl.int64) * CHANNELS + channel[None, :]
        tile = tl.load(x + at_pixels, mask=mask, other=0.0).to(tl.float32) + added[None, :]
        tile = tl.reshape(tile, (ROWS, GROUPS, PADDED))
        normed = tl.reshape((tile - mean[None, :, None]) * inverse[None, :, None], (ROWS, GROUPS * PADDED))
        y = normed * factor[None, :] + shift[None, :]
        if SILU:
            y = y * tl.sigmoid(y)
        tl.store(out + at_pixels, y.to(out.dtype.element_ty), mask=mask)


def group_norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, epsilon: float, silu: bool, offset: Tensor | None = None
) -> Tensor:
    """Launch both.

    Args:
        x: one picture [1, C, H, W] in channels-last layout; groups a power of two that divides C.
        weight, bias, offset: float32 [C].

    Returns:
        a new tensor like x.
    """
    _, channels, height, width = x.shape
    assert x.is_contiguous(memory_format=torch.channels_last), "pixel by pixel"
    padded = triton.next_power_of_2(channels // groups)
    pixels, rows = height * width, max(1, _TILE // (groups * padded))
    per_part = triton.cdiv(triton.cdiv(pixels, _PARTS), rows) * rows
    used = triton.cdiv(pixels, per_part)
    parts = torch.empty(2, _PARTS, groups, dtype=torch.float32, device=x.device)
    out = torch.empty_like(x)
    shared = {"PARTS": _PARTS, "CHANNELS": channels, "GROUPS": groups, "PADDED": padded, "ROWS": rows, "num_warps": 8}
    _statistics_kernel[(used,)](x, offset, parts, pixels, per_part, **shared)
    programs = min(triton.cdiv(pixels, rows), _PROGRAMS)
    given = (x, offset, parts, weight, bias, out, pixels, per_part, used, epsilon)
    _apply_kernel[(programs,)](*given, SILU=silu, **shared)
    return out


def plain_group_norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, epsilon: float, silu: bool, offset: Tensor | None = None
) -> Tensor:
    """The same, plainly."""
    z = x.float() if offset is None else x.float() + offset[:, None, None]
    y = torch.nn.functional.group_norm(z, groups, weight, bias, epsilon)
    return (torch.nn.functional.silu(y) if silu else y).to(x.dtype).contiguous(memory_format=torch.channels_last)
