"""Attention over text and image rows together: q, k, v as `linear_heads` leaves them → rows for the next linear.

    out = softmax(q · kᵀ · s_q · s_k / √d) · v · s_v / s_out

E4M3: cuDNN's fused kernel, E4M3 in and out. Its weights exp(score − row maximum) are in 0..1 and held times 448. A row
of the output is a weighted mean of v's, so s_out = s_v can't overflow and no scale is left to calibrate.
Compute dtype: cuDNN's as well, all scales 1; an unpinned scaled_dot_product_attention may pick a kernel half as fast.
"""

import math
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fluxserve.errors import LibraryMissing, LibraryRefused
from fluxserve.kernels.fp8 import E4M3, E4M3_MAX, cast

Scales = Tensor
"""float32 [4]: s_q, s_k, s_v, 1 / s_out."""

_TILE = 128
"""Rows that cuDNN's E4M3 kernel takes at a time. A last tile that is not full makes it a sixth slower; told besides,
on the device, how many rows count, it loses a twentieth. Whole tiles, and BF16, are quickest without."""


def attention(qkv: Tensor, heads: int, scales: Scales, out: Tensor) -> None:
    """Enqueue.

    Args:
        qkv: [rows, 3 · heads · head_dim], E4M3 (two rows or more: cuDNN has no kernel for one) or the compute dtype;
            rows may have any stride.
        scales: see above; only read for E4M3.
        out: [rows, heads · head_dim] of the same dtype; rows may have any stride, what lies between is left alone.
    """
    rows, width = out.shape
    plan = _plan(rows, heads, width // heads, qkv.dtype, qkv.stride(0), out.stride(0), qkv.device)
    plan.run(qkv, scales, out)


class _Plan:
    """One built cuDNN graph for one shape. Its workspace is its own; `execute` neither allocates nor waits."""

    def __init__(self, rows: int, heads: int, dim: int, dtype: torch.dtype, stride: int, out_stride: int) -> None:
        self._cudnn, self._handle = _cudnn(), _handle()
        self._quantised = dtype == E4M3
        kinds = self._cudnn.data_type
        kind = (
            kinds.FP8_E4M3 if self._quantised else getattr(kinds, {"bfloat16": "BFLOAT16"}.get(str(dtype)[6:], "HALF"))
        )
        graph = self._cudnn.pygraph(
            io_data_type=kind,
            intermediate_data_type=kinds.FLOAT,
            compute_data_type=kinds.FLOAT,
            handle=self._handle,
        )
        sizes = [1, heads, rows, dim]
        q, k, v = (graph.tensor(dim=sizes, stride=[rows * stride, dim, stride, 1], data_type=kind) for _ in range(3))
        self._lengths: dict[Any, Tensor] = {}
        self._scalars: list[Any] = []
        if self._quantised:
            self._scalars = [_scalar(graph, kinds.FLOAT) for _ in range(6)]
            names = ("descale_q", "descale_k", "descale_v", "scale_o", "descale_s", "scale_s")
            given = dict(zip(names, self._scalars, strict=True))
            if rows % _TILE:
                length = _scalar(graph, kinds.INT32)
                self._lengths[length] = torch.tensor([rows], dtype=torch.int32, device="cuda")
                given |= {"use_padding_mask": True, "seq_len_q": length, "seq_len_kv": length}
            out, _, *maxima = graph.sdpa_fp8(q=q, k=k, v=v, is_inference=True, attn_scale=dim**-0.5, **given)
            for maximum in maxima:  # no output: nobody reads them, and each would be cleared before every launch
                maximum.set_dim([1] * 4).set_stride([1] * 4).set_data_type(kinds.FLOAT)
        else:
            out, _ = graph.sdpa(q=q, k=k, v=v, is_inference=True, attn_scale=dim**-0.5)
        out.set_output(True).set_dim(sizes).set_stride([rows * out_stride, dim, out_stride, 1]).set_data_type(kind)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([self._cudnn.heur_mode.A, self._cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        self._graph, self._tensors = graph, (q, k, v, out)
        self._workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device="cuda")
        self._softmax = torch.tensor([1 / E4M3_MAX, E4M3_MAX], dtype=torch.float32, device="cuda")

    def run(self, qkv: Tensor, scales: Scales, out: Tensor) -> None:
        width = out.shape[1]
        parts = [qkv[:, i * width :] for i in range(3)]
        given = dict(zip(self._tensors, (*parts, out), strict=True)) | self._lengths
        if self._quantised:
            scalars = (scales[0:], scales[1:], scales[2:], scales[3:], self._softmax[0:], self._softmax[1:])
            given |= dict(zip(self._scalars, scalars, strict=True))
        self._cudnn.set_stream(handle=self._handle, stream=torch.cuda.current_stream().cuda_stream)
        self._graph.execute({t: value.data_ptr() for t, value in given.items()}, self._workspace, handle=self._handle)


def _scalar(graph: Any, kind: Any) -> Any:
    return graph.tensor(dim=[1, 1, 1, 1], stride=[1, 1, 1, 1], data_type=kind)


@cache
def _cudnn() -> ModuleType:
    """cuDNN's frontend on PyTorch's own cuDNN: with an older one's parts, attention was another at every call."""
    try:
        import cudnn
    except ImportError as error:
        raise LibraryMissing("cudnn", "fused") from error
    try:
        found, usual = cudnn.backend_version(), torch.backends.cudnn.version()
    except RuntimeError as error:  # PyTorch's own check, of what it was built with
        raise LibraryRefused(f"cudnn: {error}") from error
    if found != usual:
        raise LibraryRefused(
            f"cudnn: got {found} for attention; expected PyTorch's own, {usual}: "
            "a folder of LD_LIBRARY_PATH has another, take it out"
        )
    return cudnn  # type: ignore[no-any-return]


@cache
def _handle() -> Any:
    return _cudnn().create_handle()


@cache  # for good: captured graphs read what a plan holds
def _plan(
    rows: int, heads: int, dim: int, dtype: torch.dtype, stride: int, out_stride: int, device: torch.device
) -> _Plan:
    with torch.cuda.device(device):
        return _Plan(rows, heads, dim, dtype, stride, out_stride)


def plain_attention(qkv: Tensor, heads: int, scales: Scales, out: Tensor) -> None:
    """The same, plainly: the whole score matrix of one head after the other."""
    quantised = qkv.dtype == E4M3
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
