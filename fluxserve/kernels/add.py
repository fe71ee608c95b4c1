"""The end of a residual block over pictures that are laid out pixel by pixel: both branches and a bias, in one pass.

    x += y + bias               bias of the convolution that y comes from, which cuDNN would add in a pass of its own
    out = upsampled(x + y + bias)                     where only a picture of twice the height and width is wanted of it

A program takes some pixels and all their channels. Upsampled, every pixel is read once and written four times.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 2**12
"""Numbers that a program holds at once."""


@triton.jit
def _sum(x, y, bias, pixel, pixels, CHANNELS: tl.constexpr, PADDED: tl.constexpr):
    """Of some pixels; where they lie, whether they are there, and what they come to, in x's dtype."""
    channel = tl.arange(0, PADDED)
    mask = (pixel < pixels)[:, None] & (channel < CHANNELS)[None, :]
    at = pixel.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
    shift = tl.load(bias + channel, mask=channel < CHANNELS, other=0.0)[None, :]
    own = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
    return at, mask, (own + other + shift).to(x.dtype.element_ty)


@triton.jit(do_not_specialize=["pixels"])  # or every size would be compiled anew
def _add_kernel(x, y, bias, pixels, CHANNELS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr):
    pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at, mask, z = _sum(x, y, bias, pixel, pixels, CHANNELS, PADDED)
    tl.store(x + at, z, mask=mask)


@triton.jit(do_not_specialize=["pixels", "width"])
def _upsampled_kernel(x, y, bias, out, pixels, width, CHANNELS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr):
    pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    _, mask, z = _sum(x, y, bias, pixel, pixels, CHANNELS, PADDED)
    corner = pixel // width * (4 * width) + pixel % width * 2
    first = out + corner.to(tl.int64)[:, None] * CHANNELS + tl.arange(0, PADDED)[None, :]
    for down in tl.static_range(2):
        for right in tl.static_range(2):
            tl.store(first + (down * 2 * width + right) * CHANNELS, z, mask=mask)


def _shape(x: Tensor, y: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """Programs, and what kernels are compiled for."""
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (x, y)), "pixel by pixel"
    _, channels, height, width = x.shape
    padded = triton.next_power_of_2(channels)
    rows = max(1, _TILE // padded)
    return (triton.cdiv(height * width, rows),), {"CHANNELS": channels, "PADDED": padded, "ROWS": rows, "num_warps": 8}


def add(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """Launch; returns x.

    Args:
        x, y: pictures [1, C, H, W] in channels-last layout; x is written.
        bias: float32 [C].
    """
    grid, constants = _shape(x, y)
    _add_kernel[grid](x, y, bias, x.shape[2] * x.shape[3], **constants)
    return x


def add_upsampled(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """Launch; returns a new picture [1, C, 2·H, 2·W], every pixel four times. See add; nothing is overwritten."""
    grid, constants = _shape(x, y)
    _, channels, height, width = x.shape
    size = (1, channels, 2 * height, 2 * width)
    out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    _upsampled_kernel[grid](x, y, bias, out, height * width, width, **constants)
    return out


def plain_add(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """The same, plainly."""
    return x.copy_(x.float() + y.float() + bias[:, None, None])


def plain_add_upsampled(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """The same, plainly."""
    z = (x.float() + y.float() + bias[:, None, None]).to(x.dtype)
    return z.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3).contiguous(memory_format=torch.channels_last)
