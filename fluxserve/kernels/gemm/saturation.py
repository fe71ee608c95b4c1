"""How many E4M3 values lie at the limit of the format: a static scale that is too small clips, and nobody would notice.

±448 and NaN are counted, in every SAMPLE-th row. A value that is rounded to 448 from below counts too; `export` leaves
enough room for that to be rare. `gemm.hopper` counts beside its own product; here are the kernel for weights that are
not arranged for it, and the definition.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxserve.kernels.fp8 import E4M3
from fluxserve.kernels.gemm.layers import SAMPLE, Watched

_LIMIT = 0x7E
"""E4M3's bits of 448 without the sign; one more is NaN."""
_BLOCK = 1024


@triton.jit
def _count_kernel(x, counts, index, columns, stride, SAMPLE: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    bits = tl.load(x + tl.program_id(0) * SAMPLE * stride + column, mask=column < columns, other=0)
    count = tl.sum(((bits & 0x7F) >= LIMIT).to(tl.int64), axis=0)
    tl.atomic_add(counts + index, count, mask=count > 0)


def count_saturated(watched: Watched) -> None:
    """Launch: add to `watched.counts`. The sum does not depend on the order."""
    for index, x in enumerate(watched.rows):
        rows, columns = x.shape
        grid = (triton.cdiv(rows, SAMPLE), triton.cdiv(columns, _BLOCK))
        bits = x.view(torch.uint8)
        _count_kernel[grid](bits, watched.counts, index, columns, x.stride(0), SAMPLE, _LIMIT, _BLOCK, num_warps=4)


def plain_count_saturated(watched: Watched) -> None:
    """The same by its definition."""
    for index, x in enumerate(watched.rows):
        watched.counts[index] += at_the_limit(x[::SAMPLE])


def at_the_limit(x: Tensor) -> Tensor:
    """How many values of an E4M3 tensor are ±448 or NaN, int64."""
    assert x.dtype == E4M3, x.dtype
    return ((x.view(torch.uint8) & 0x7F) >= _LIMIT).sum()
