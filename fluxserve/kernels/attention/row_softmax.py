"""Rows of scores → rows of weights that sum to one.

    weights = exp((s − max) · scale) / Σ exp((s − max) · scale)

In float32 from float32 scores; weights are rounded once. A row may be any length: each place of a block keeps a maximum
and a sum of its own, which are put together at the row's end, and a second pass reads the row again, out of the L2.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048
_LOWEST = tl.constexpr(-1e37)
"""Below any score, and still a number: −∞ less −∞ is none."""


@triton.jit
def _softmax_kernel(scores, weights, columns, factor, BLOCK: tl.constexpr):
    begin = tl.program_id(0).to(tl.int64) * columns
    place = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), _LOWEST, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, columns, BLOCK):
        mask = first + place < columns
        s = tl.load(scores + begin + first + place, mask=mask, other=_LOWEST)
        higher = tl.maximum(largest, s)
        total = total * tl.exp2((largest - higher) * factor) + tl.exp2((s - higher) * factor)
        largest = higher
    top = tl.max(largest, axis=0)
    inverse = 1.0 / tl.sum(total * tl.exp2((largest - top) * factor), axis=0)
    for first in range(0, columns, BLOCK):
        mask = first + place < columns
        s = tl.load(scores + begin + first + place, mask=mask, other=_LOWEST)
        y = tl.exp2((s - top) * factor) * inverse
        tl.store(weights + begin + first + place, y.to(weights.dtype.element_ty), mask=mask)


def softmax(scores: Tensor, scale: float, weights: Tensor) -> None:
    """Launch.

    Args:
        scores: float32 [rows, columns], rows behind each other.
        scale: positive.
        weights: of the same shape, any float dtype.
    """
    rows, columns = scores.shape
    assert scores.is_contiguous() and weights.is_contiguous(), "rows behind each other"
    _softmax_kernel[(rows,)](scores, weights, columns, scale * math.log2(math.e), BLOCK=_BLOCK, num_warps=8)


def plain_softmax(scores: Tensor, scale: float, weights: Tensor) -> None:
    """The same, plainly."""
    weights.copy_(torch.softmax(scores * scale, dim=1))
