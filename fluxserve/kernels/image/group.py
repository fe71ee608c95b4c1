"""GroupNorm and SiLU over a picture that is laid out pixel by pixel: what the VAE does between its convolutions.

    z = x + offset; y = (z − mean) / √(var + ε) · weight + bias; out = y · sigmoid(y)

Statistics are of one picture and one group. `offset` is the bias of the convolution that x comes from, for which cuDNN
would otherwise take a pass of its own.

Two launches, if who made x has not taken its statistics already: every program of the second merges their parts, and
writes some of the pixels. x is read twice and written once: 0.8 GB for 1024² pixels of 128 channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxserve.kernels.image.moments import channels_of, constants_of, merged, parts_of, statistics
from fluxserve.kernels.jit import nvrtc

_TILE = 8192
"""Numbers that a program holds at once."""

_PER_PROCESSOR = 2
"""Programs: so many fit at once. Each reads all parts, 64 KB with 32 groups, before its share of the pixels."""


@triton.jit(do_not_specialize=["pixels", "per_part"])  # or every size would be compiled anew
def _apply_kernel(
    x,
    offset,
    taken,
    weight,
    bias,
    out,
    pixels,
    per_part,
    epsilon,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    PADDED: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    SILU: tl.constexpr,
):
    channel, valid = channels_of(CHANNELS, GROUPS, PADDED)
    mean, variance = merged(taken, pixels, per_part, CHANNELS, GROUPS, PARTS)
    spread = tl.zeros((GROUPS, PADDED), tl.float32)
    centre = tl.reshape(spread + mean[:, None], (GROUPS * PADDED,))
    factor = tl.reshape(spread + tl.rsqrt(variance + epsilon)[:, None], (GROUPS * PADDED,))
    factor *= tl.load(weight + channel, mask=valid, other=0.0)
    shift = tl.load(bias + channel, mask=valid, other=0.0)
    if offset is not None:
        centre -= tl.load(offset + channel, mask=valid, other=0.0)
    for start in range(tl.program_id(0) * ROWS, pixels, tl.num_programs(0) * ROWS):
        pixel = start + tl.arange(0, ROWS)
        mask = (pixel < pixels)[:, None] & valid[None, :]
        at = pixel.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
        tile = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        y = (tile - centre[None, :]) * factor[None, :] + shift[None, :]
        if SILU:
            y = y * tl.sigmoid(y)
        tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    silu: bool,
    offset: Tensor | None = None,
    taken: Tensor | None = None,
) -> Tensor:
    """Launch.

    Args:
        x: one picture [1, C, H, W] in channels-last layout; groups a power of two that divides C.
        weight, bias, offset: float32 [C].
        taken: statistics of x + offset; None: taken now.

    Returns:
        a new tensor like x.
    """
    assert x.is_contiguous(memory_format=torch.channels_last), "pixel by pixel"
    if taken is None:
        taken = statistics(x, groups, offset)
    pixels = x.shape[2] * x.shape[3]
    constants, out = constants_of(x.shape[1], groups, _TILE), torch.empty_like(x)
    programs = min(triton.cdiv(pixels, constants["ROWS"]), _PER_PROCESSOR * nvrtc.processors(x.device))
    given = (x, offset, taken, weight, bias, out, pixels, parts_of(pixels)[0], epsilon)
    _apply_kernel[(programs,)](*given, SILU=silu, **constants)
    return out


def plain_group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
    silu: bool,
    offset: Tensor | None = None,
    taken: Tensor | None = None,
) -> Tensor:
    """The same, plainly, with statistics of its own."""
    assert taken is None, "the plain set takes none in passing"
    z = x.float() if offset is None else x.float() + offset[:, None, None]
    y = torch.nn.functional.group_norm(z, groups, weight, bias, epsilon)
    return (torch.nn.functional.silu(y) if silu else y).to(x.dtype).contiguous(memory_format=torch.channels_last)
