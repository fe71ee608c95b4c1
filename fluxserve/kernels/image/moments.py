"""Mean and squared deviations of every group of channels: what a GroupNorm must know of a picture before it begins.

Taken in parts, by whatever kernel has the picture in hand: the one here reads it for nothing else, `add` has just made
it. Each part has a mean of its own; `merged` puts them together by Chan's formula: a large mean costs no digits.

Within a part every lane sums what its numbers are apart from `origin`, and their squares; nothing crosses lanes before
the part's end. `origin` is the mean of the part's first tile: so of N tiles it can be so far off, at worst, that the
squares are N times what they should be, and lose log10(N) digits where the mean is taken off them: two at 1024².
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PARTS = 256
"""At most: enough to fill a GPU, few enough to be merged by every program that needs them."""

FEWEST = 64
"""Pixels of a part: a smaller picture has fewer parts."""

_TILE = 8192
"""Numbers that a program holds at once."""


@triton.jit
def channels_of(CHANNELS: tl.constexpr, GROUPS: tl.constexpr, PADDED: tl.constexpr):
    """Every channel's place in a pixel, each group padded to a power of two; and whether it is one."""
    index = tl.arange(0, GROUPS * PADDED)
    per_pixel: tl.constexpr = CHANNELS // GROUPS
    if per_pixel == PADDED:
        return index, index < CHANNELS
    return index // PADDED * per_pixel + index % PADDED, index % PADDED < per_pixel


@triton.jit
def leave(
    statistics,
    origin,
    sums,
    squares,
    count,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Store what this program's part comes to.

    origin: [GROUPS · PADDED], near the channels' means; 0 where there is no channel.
    sums, squares: [rows, GROUPS · PADDED], of what `count` pixels are apart from it; 0 where there is nothing.
    """
    group = tl.arange(0, GROUPS)
    _, valid = channels_of(CHANNELS, GROUPS, PADDED)
    total = tl.sum(sums, axis=0)
    within = tl.reshape(tl.sum(squares, axis=0) - total * total / count, (GROUPS, PADDED))
    means = tl.reshape(origin + total / count, (GROUPS, PADDED))
    mean = tl.sum(means, axis=1) / (CHANNELS // GROUPS)
    between = tl.where(tl.reshape(valid, (GROUPS, PADDED)), means - mean[:, None], 0.0)
    deviation = tl.sum(within + between * between * count, axis=1)
    at = statistics + tl.program_id(0) * GROUPS + group
    tl.store(at, mean)
    tl.store(at + PARTS * GROUPS, deviation)


@triton.jit
def merged(statistics, pixels, per_part, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, PARTS: tl.constexpr):
    """Mean and variance of every group of the whole picture."""
    group, part = tl.arange(0, GROUPS), tl.arange(0, PARTS)
    count = tl.maximum(tl.minimum(pixels - part * per_part, per_part), 0)
    at, present = statistics + part[:, None] * GROUPS + group[None, :], (count > 0)[:, None]
    share = count.to(tl.float32)[:, None] / pixels
    means = tl.load(at, mask=present, other=0.0)
    first = tl.load(statistics + group)  # a sum of what is large would lose what it differs in
    mean = first + tl.sum((means - first[None, :]) * share, axis=0)
    apart = means - mean[None, :]
    deviations = tl.load(at + PARTS * GROUPS, mask=present, other=0.0)
    per_channel = (pixels * 1.0) * (CHANNELS // GROUPS)
    return mean, tl.sum(deviations / per_channel + apart * apart * share, axis=0)


@triton.jit(do_not_specialize=["pixels", "per_part"])  # or every size would be compiled anew
def _statistics_kernel(
    x,
    offset,
    statistics,
    pixels,
    per_part,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    begin = tl.program_id(0) * per_part
    end = tl.minimum(begin + per_part, pixels)
    channel, valid = channels_of(CHANNELS, GROUPS, PADDED)
    row = tl.arange(0, ROWS)
    first = tl.load(
        x + (begin + row).to(tl.int64)[:, None] * CHANNELS + channel[None, :],
        mask=(begin + row < end)[:, None] & valid[None, :],
        other=0.0,
    )
    origin = tl.sum(first.to(tl.float32), axis=0) / tl.minimum(end - begin, ROWS)
    sums = tl.zeros((ROWS, GROUPS * PADDED), tl.float32)
    squares = tl.zeros((ROWS, GROUPS * PADDED), tl.float32)
    for start in range(begin, end, ROWS):
        pixel = start + row
        mask = (pixel < end)[:, None] & valid[None, :]
        tile = tl.load(x + pixel.to(tl.int64)[:, None] * CHANNELS + channel[None, :], mask=mask, other=0.0)
        apart = tl.where(mask, tile.to(tl.float32) - origin[None, :], 0.0)
        sums += apart
        squares += apart * apart
    if offset is not None:
        origin += tl.load(offset + channel, mask=valid, other=0.0)
    leave(statistics, origin, sums, squares, (end - begin) * 1.0, CHANNELS, GROUPS, PADDED, PARTS)


def parts_of(pixels: int) -> tuple[int, int]:
    """Pixels of every part but the last, and how many parts there are."""
    per_part = max(triton.cdiv(pixels, PARTS), FEWEST)
    return per_part, triton.cdiv(pixels, per_part)


def constants_of(channels: int, groups: int, tile: int) -> dict[str, int]:
    """What kernels are compiled for that hold about `tile` numbers at once."""
    padded = triton.next_power_of_2(channels // groups)
    rows = min(max(1, tile // (groups * padded)), FEWEST)
    return {"CHANNELS": channels, "GROUPS": groups, "PADDED": padded, "PARTS": PARTS, "ROWS": rows, "num_warps": 8}


def empty_statistics(x: Tensor, groups: int) -> Tensor:
    """float32 [2, PARTS, groups]: means and squared deviations; parts that a picture lacks are never read."""
    return torch.empty(2, PARTS, groups, dtype=torch.float32, device=x.device)


def statistics(x: Tensor, groups: int, offset: Tensor | None) -> Tensor:
    """Launch.

    Args:
        x: one picture [1, C, H, W] in channels-last layout; groups a power of two that divides C.
        offset: float32 [C], added to x first.
    """
    assert x.is_contiguous(memory_format=torch.channels_last), "pixel by pixel"
    _, channels, height, width = x.shape
    per_part, used = parts_of(height * width)
    taken = empty_statistics(x, groups)
    constants = constants_of(channels, groups, _TILE)
    _statistics_kernel[(used,)](x, offset, taken, height * width, per_part, **constants)
    return taken
