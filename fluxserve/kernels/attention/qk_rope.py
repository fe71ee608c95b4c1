"""RMSNorm and RoPE of a language model's query and key heads, in place, between their product and attention.

    y = x / √(mean(x²) + ε) · weight                               of one head; queries have one weight, keys another
    x[i], x[i + d/2] = y[i] · cos − y[i + d/2] · sin, y[i + d/2] · cos + y[i] · sin           angles by row and i < d/2

`linear_heads` does the same behind a product, for a transformer's blocks: there q, k and v are thirds. Here several
query heads share a key's, so that they are not; and 40 heads a row are too little to be worth an ending of their own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _turn_kernel(
    x,
    weights,
    cos,
    sin,
    x_stride,
    epsilon,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    PADDED: tl.constexpr,
    HALF: tl.constexpr,
):
    row = tl.program_id(0)
    head, pair = tl.arange(0, PADDED)[:, None], tl.arange(0, HALF)[None, :]
    mask = head < HEADS
    place = x + row * x_stride + head * 2 * HALF + pair
    first = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(place + HALF, mask=mask, other=0.0).to(tl.float32)
    squares = tl.sum(first * first + second * second, axis=1)
    inverse = tl.rsqrt(squares / (2 * HALF) + epsilon)[:, None]
    weight = weights + tl.where(head < QUERIES, 0, 2 * HALF) + pair
    first, second = first * inverse * tl.load(weight), second * inverse * tl.load(weight + HALF)
    c, s = tl.load(cos + row * HALF + pair), tl.load(sin + row * HALF + pair)
    tl.store(place, (first * c - second * s).to(x.dtype.element_ty), mask=mask)
    tl.store(place + HALF, (second * c + first * s).to(x.dtype.element_ty), mask=mask)


def turn(x: Tensor, queries: int, weights: Tensor, epsilon: float, cos: Tensor, sin: Tensor) -> None:
    """Launch.

    Args:
        x: [rows, heads · head_dim], any float dtype, the queries' heads first; rows may have any stride.
        queries: how many heads those are.
        weights: float32 [2, head_dim], of queries and of keys; head_dim a power of two.
        cos, sin: float32 [rows, head_dim / 2].
    """
    (rows, width), head_dim = x.shape, weights.shape[1]
    _turn_kernel[(rows,)](
        x,
        weights,
        cos,
        sin,
        x.stride(0),
        epsilon,
        QUERIES=queries,
        HEADS=width // head_dim,
        PADDED=triton.next_power_of_2(width // head_dim),
        HALF=head_dim // 2,
        num_warps=8,
    )


def plain_turn(x: Tensor, queries: int, weights: Tensor, epsilon: float, cos: Tensor, sin: Tensor) -> None:
    """The same, plainly."""
    head_dim = weights.shape[1]
    y = x.float().view(len(x), -1, head_dim)
    y = torch.nn.functional.rms_norm(y, (head_dim,), eps=epsilon)
    first, second = torch.cat([y[:, :queries] * weights[0], y[:, queries:] * weights[1]], dim=1).chunk(2, dim=-1)
    c, s = cos[:, None], sin[:, None]
    x.copy_(torch.cat([first * c - second * s, second * c + first * s], dim=-1).flatten(1))
