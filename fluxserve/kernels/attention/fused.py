"""Attention over text and image rows together: q, k, v as `linear_heads` leaves them → rows for the next linear.

    out = softmax(q · kᵀ · s_q · s_k / √d) · v · s_v / s_out

E4M3: cuDNN's fused kernel, E4M3 in and out. Its weights exp(score − row maximum) are in 0..1 and held times 448. A row
of the output is a weighted mean of v's, so s_out = s_v can't overflow and no scale is left to calibrate.
Compute dtype: cuDNN's as well, all scales 1; an unpinned scaled_dot_product_attention may pick a kernel half as fast.
"""

import math
from functools import cache

import torch
from torch import Tensor

from fluxserve.kernels.attention import plan_cache, plan_worker
from fluxserve.kernels.attention.plan_cache import At, Form
from fluxserve.kernels.fp8 import E4M3, E4M3_MAX, cast

Scales = Tensor
"""float32 [4]: s_q, s_k, s_v, 1 / s_out."""


def padded(rows: int, dtype: torch.dtype) -> int:
    """Rows of memory that attention of so many rows takes: in E4M3 whole tiles."""
    return plan_cache.padded(rows) if dtype == E4M3 else rows


def attention(qkv: Tensor, rows: int, heads: int, scales: Scales, out: Tensor) -> None:
    """Enqueue.

    Args:
        qkv: [padded(rows), 3 · heads · head_dim], E4M3 or the compute dtype; rows may have any stride. Those beyond
            `rows` don't count, but must not be NaN.
        scales: see above; only read for E4M3.
        out: [padded(rows), heads · head_dim] of the same dtype; rows may have any stride, what lies between is left
            alone. What those beyond `rows` are left with is nothing to rely on.
    """
    assert len(qkv) == len(out) == padded(rows, qkv.dtype), f"{len(qkv)} and {len(out)} rows of memory for {rows}"
    _plan(_form(qkv, rows, heads, out), qkv.device).run(qkv, rows, scales, out)


def attention_ahead(qkv: Tensor, usual: int, heads: int, out: Tensor) -> plan_worker.Ahead:
    """Have plans built for every number of rows up to those of qkv and out, the usual first; close it at the end.

    For E4M3 on a GPU: in another dtype each number of rows has a plan of its own, too many to build.
    """
    planned = qkv.is_cuda and qkv.dtype == E4M3
    wanted = plan_worker.forms(_form(qkv, len(qkv), heads, out), len(qkv), usual) if planned else []
    return plan_worker.Ahead(wanted, qkv.device)


def _form(qkv: Tensor, rows: int, heads: int, out: Tensor) -> Form:
    dim, dtype = out.shape[1] // heads, str(qkv.dtype).removeprefix("torch.")
    return Form(len(qkv), heads, dim, dtype, qkv.stride(0), out.stride(0), told=rows < len(qkv))


class _Plan:
    """A plan on one device. Its workspace is its own; `run` never waits, and allocates at a number of rows' first."""

    def __init__(self, form: Form, device: torch.device) -> None:
        self._form, self._handle, self._graph = form, plan_cache.handle(device), plan_cache.opened(form, device)
        self._workspace = torch.empty(self._graph.get_workspace_size(), dtype=torch.uint8, device=device)
        self._weights = torch.tensor([1 / E4M3_MAX, E4M3_MAX], dtype=torch.float32, device=device)

    def run(self, qkv: Tensor, rows: int, scales: Scales, out: Tensor) -> None:
        width = out.shape[1]
        given = {At.Q: qkv, At.K: qkv[:, width:], At.V: qkv[:, 2 * width :], At.OUT: out}
        if qkv.dtype == E4M3:
            given |= {at: scales[i:] for i, at in enumerate((At.Q_SCALE, At.K_SCALE, At.V_SCALE, At.INVERSE_OUT_SCALE))}
            given |= {At.WEIGHT_SCALE: self._weights, At.INVERSE_WEIGHT_SCALE: self._weights[1:]}
        if self._form.told:
            given[At.LENGTH] = _length(rows, qkv.device)
        plan_cache.library().set_stream(handle=self._handle, stream=torch.cuda.current_stream().cuda_stream)
        addresses = {int(at): value.data_ptr() for at, value in given.items()}
        self._graph.execute(addresses, self._workspace, handle=self._handle)


@cache  # for good: captured graphs read what a plan holds
def _plan(form: Form, device: torch.device) -> _Plan:
    with torch.cuda.device(device):
        return _Plan(form, device)


@cache  # for good as well
def _length(rows: int, device: torch.device) -> Tensor:
    return torch.full((1,), rows, dtype=torch.int32, device=device)


def plain_attention(qkv: Tensor, rows: int, heads: int, scales: Scales, out: Tensor) -> None:
    """The same, plainly: the whole score matrix of one head after the other."""
    qkv, out, quantised = qkv[:rows], out[:rows], qkv.dtype == E4M3
    s = scales.tolist() if quantised else [1.0] * 4
    q, k, v = (part.float() * f for part, f in zip(qkv.chunk(3, dim=1), s, strict=False))
    dim = out.shape[1] // heads
    for head in (slice(i * dim, (i + 1) * dim) for i in range(heads)):
        scores = q[:, head] @ k[:, head].T / math.sqrt(dim)
        weights = torch.exp(scores - scores.amax(dim=1, keepdim=True))
        total = weights.sum(dim=1, keepdim=True)
        if quantised:
            weights = cast(weights * E4M3_MAX, E4M3).float() / E4M3_MAX
        out[:, head] = cast(weights @ v[:, head] / total * s[3], out.dtype)
