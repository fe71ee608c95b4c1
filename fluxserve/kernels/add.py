"""The end of a residual block over pictures that are laid out pixel by pixel: both branches and a bias, in one pass.

x += y + bias                    bias of the convolution that y comes from, which cuDNN would add in a pass of its own
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 2048


@triton.jit
def _add_kernel(x, y, bias, numbers, CHANNELS: tl.constexpr, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = at < numbers
    shift = tl.load(bias + at % CHANNELS, mask=mask, other=0.0)
    own = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(x + at, (own + other + shift).to(x.dtype.element_ty), mask=mask)


def add(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """Launch; returns x.

    Args:
        x, y: pictures [1, C, H, W] in channels-last layout; x is written.
        bias: float32 [C].
    """
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (x, y)), "pixel by pixel"
    grid = (triton.cdiv(x.numel(), _TILE),)
    _add_kernel[grid](x, y, bias, x.numel(), CHANNELS=x.shape[1], TILE=_TILE, num_warps=8)
    return x


def plain_add(x: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """The same, plainly."""
    return x.copy_(x.float() + y.float() + bias[:, None, None])
