"""Hopper's FP8 tensor cores, emulated: how cuDNN's attention adds up P · V, without a GPU.

An E4M3 `wgmma` adds 32 products to its accumulator at once. All 33 terms are aligned to the largest of them, and each
keeps 13 bits below that one's leading bit; the rest is cut off toward zero. SageAttention 2 (arXiv 2411.10958, section
3.2) measured the format. With this rule the emulation shrinks attention over 4,608 to 33,280 keys by the same 2 to 31%
that an H200 does (docs/quality.md has both).
"""

import math

import torch
from torch import Tensor

from fluxserve.kernels.attention.fused import Scales
from fluxserve.kernels.fp8 import E4M3, E4M3_MAX, cast

FRACTION_BITS, INNER = 13, 32
_QUERIES = 16


def accumulated(left: Tensor, right: Tensor) -> Tensor:
    """left [rows, K] · right [K, columns] as the tensor cores add it up; float64 in and out, E4M3's values."""
    total = torch.zeros(len(left), right.shape[1], dtype=torch.float64, device=left.device)
    for first in range(0, left.shape[1], INNER):
        terms = left[:, first : first + INNER, None] * right[None, first : first + INNER]
        largest = torch.maximum(terms.abs().amax(dim=1), total.abs()).clamp_min(1e-300)
        unit = torch.exp2(largest.log2().floor() - FRACTION_BITS)
        total = (torch.trunc(terms / unit[:, None]).sum(dim=1) + torch.trunc(total / unit)) * unit
    return total


def emulated_attention(qkv: Tensor, rows: int, heads: int, scales: Scales, out: Tensor, queries: Tensor) -> None:
    """`kernels.attention.fused` in E4M3 for some rows of queries, int64 [n]; other rows of `out` are left alone."""
    assert qkv.dtype == E4M3, qkv.dtype
    s, dim = scales.tolist(), out.shape[1] // heads
    q, k, v = (part.double() for part in qkv[:rows].chunk(3, dim=1))
    for head in (slice(i * dim, (i + 1) * dim) for i in range(heads)):
        for some in queries.split(_QUERIES):
            scores = q[some, head] @ k[:, head].T * (s[0] * s[1] / math.sqrt(dim))
            weights = torch.exp(scores - scores.amax(dim=1, keepdim=True))
            held = cast(weights * E4M3_MAX, E4M3).double()
            sums = accumulated(held, v[:, head]) / (E4M3_MAX * weights.sum(dim=1, keepdim=True))
            out[some, head] = cast((sums * s[2] * s[3]).float(), E4M3)
