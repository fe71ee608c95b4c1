"""Attention with one head that is too wide for fused kernels: 512 channels of every pixel in the middle of the VAE.

    out = softmax(q · kᵀ / √d) · v

Some rows of q at a time: cuBLAS multiplies, scores are float32, `softmax` leaves weights in the operands' dtype. So
many rows as their scores fill about what the L2 holds, whatever the picture's size, which bounds the memory too.
"""

import torch
from torch import Tensor

from fluxserve.kernels.attention.row_softmax import softmax

SCORES_BYTES = 64 * 2**20
"""Of the float32 scores that there are at a time."""

_TILE = 64
"""Rows are taken in such steps, and at least so many: others would leave tiles of the products half empty."""


def rows_at_a_time(rows: int) -> int:
    """Rows of q whose scores are there at once, if there are so many rows of k."""
    return min(rows, max(SCORES_BYTES // (4 * rows * _TILE), 1) * _TILE)


def wide_attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """Launch.

    Args:
        q, k, v: [rows, d], one dtype; rows may have any stride.
        out: [rows, d] of the same dtype.
    """
    rows, width = q.shape
    step = rows_at_a_time(rows)
    weights = torch.empty(step, rows, dtype=q.dtype, device=q.device)
    for first in range(0, rows, step):
        some = q[first : first + step]
        own = weights[: len(some)]
        softmax(_scores(some, k), width**-0.5, own)
        torch.mm(own, v, out=out[first : first + step])


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """q · kᵀ in float32; only CUDA has a product of another dtype than its operands."""
    if q.is_cuda and q.dtype != torch.float32:
        return torch.mm(q, k.t(), out_dtype=torch.float32)
    return torch.mm(q.float(), k.float().t())


def plain_wide_attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """The same, plainly: the whole score matrix."""
    weights = torch.softmax(q.float() @ k.float().t() * q.shape[1] ** -0.5, dim=1)
    out.copy_(weights @ v.float())
