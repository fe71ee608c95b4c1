"""The end of a residual block over pictures that are laid out pixel by pixel: both branches and a bias, in one pass.

    x += y + bias               bias of the convolution that y comes from, which cuDNN would add in a pass of its own
    out = upsampled(x + y + bias)                     where only a picture of twice the height and width is wanted of it

A program takes some pixels and all their channels. What `add` writes, a GroupNorm reads next: its statistics are taken
in passing. What is upsampled goes into a convolution: every pixel is read once and written four times.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxserve.kernels.image.moments import channels_of, constants_of, empty_statistics, leave, parts_of

_TILE = 2**12
"""Numbers that a program holds at once."""


@triton.jit
def _sum(x, y, shift, pixel, end, channel, valid, CHANNELS: tl.constexpr):
    """Of some pixels; where they lie, whether they are there, and what they come to, in x's dtype."""
    mask = (pixel < end)[:, None] & valid[None, :]
    at = pixel.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    own = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
    return at, mask, (own + other + shift[None, :]).to(x.dtype.element_ty)


@triton.jit(do_not_specialize=["pixels", "per_part"])  # or every size would be compiled anew
def _add_kernel(
    x,
    y,
    bias,
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
    shift = tl.load(bias + channel, mask=valid, other=0.0)
    row = tl.arange(0, ROWS)
    _, mask, z = _sum(x, y, shift, begin + row, end, channel, valid, CHANNELS)
    origin = tl.sum(tl.where(mask, z.to(tl.float32), 0.0), axis=0) / tl.minimum(end - begin, ROWS)
    sums = tl.zeros((ROWS, GROUPS * PADDED), tl.float32)
    squares = tl.zeros((ROWS, GROUPS * PADDED), tl.float32)
    for start in range(begin, end, ROWS):
        at, mask, z = _sum(x, y, shift, start + row, end, channel, valid, CHANNELS)
        tl.store(x + at, z, mask=mask)
        apart = tl.where(mask, z.to(tl.float32) - origin[None, :], 0.0)
        sums += apart
        squares += apart * apart
    leave(statistics, origin, sums, squares, (end - begin) * 1.0, CHANNELS, GROUPS, PADDED, PARTS)


@triton.jit(do_not_specialize=["pixels", "width"])
def _upsampled_kernel(x, y, bias, out, pixels, width, CHANNELS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr):
    pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, PADDED)
    valid = channel < CHANNELS
    shift = tl.load(bias + channel, mask=valid, other=0.0)
    _, mask, z = _sum(x, y, shift, pixel, pixels, channel, valid, CHANNELS)
    corner = pixel // width * (4 * width) + pixel % width * 2
    first = out + corner.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    for down in tl.static_range(2):
        for right in tl.static_range(2):
            tl.store(first + (down * 2 * width + right) * CHANNELS, z, mask=mask)


def _by_pixels(*pictures: Tensor) -> bool:
    return all(t.is_contiguous(memory_format=torch.channels_last) for t in pictures)


def add(x: Tensor, y: Tensor, bias: Tensor, groups: int) -> Tensor:
    """Launch; returns the statistics of x, as a GroupNorm of so many groups takes them.

    Args:
        x, y: pictures [1, C, H, W] in channels-last layout; x is written.
        bias: float32 [C].
        groups: a power of two that divides C.
    """
    assert _by_pixels(x, y), "pixel by pixel"
    pixels = x.shape[2] * x.shape[3]
    per_part, used = parts_of(pixels)
    taken = empty_statistics(x, groups)
    _add_kernel[(used,)](x, y, bias, taken, pixels, per_part, **constants_of(x.shape[1], groups, _TILE))
    return taken


def add_upsampled(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """Launch; returns a new picture [1, C, 2·H, 2·W], every pixel four times. See add; nothing is overwritten."""
    assert _by_pixels(x, y), "pixel by pixel"
    _, channels, height, width = x.shape
    size = (1, channels, 2 * height, 2 * width)
    out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    padded, pixels = triton.next_power_of_2(channels), height * width
    rows = max(1, _TILE // padded)
    constants = {"CHANNELS": channels, "PADDED": padded, "ROWS": rows, "num_warps": 8}
    _upsampled_kernel[(triton.cdiv(pixels, rows),)](x, y, bias, out, pixels, width, **constants)
    return out


def plain_add(x: Tensor, y: Tensor, bias: Tensor, _groups: int) -> None:
    """The same, plainly; plain_group_norm takes statistics of its own."""
    x.copy_(x.float() + y.float() + bias[:, None, None])


def plain_add_upsampled(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """The same, plainly."""
    z = (x.float() + y.float() + bias[:, None, None]).to(x.dtype)
    return z.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3).contiguous(memory_format=torch.channels_last)
