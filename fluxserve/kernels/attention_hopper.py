"""`kernels.attention` in CUDA C++ for E4M3 and heads of 128 (attention_hopper.cu): a contender for cuDNN's kernel.

cuDNN transposes every tile of values each time it meets it, and keeps maxima that nobody reads; this reads values that
lie transposed already (`transposed`), as a product's ending can leave them.
"""

import ctypes
import math
from ctypes import c_float, c_int, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fluxserve.kernels import cuda
from fluxserve.kernels.fp8 import E4M3
from fluxserve.kernels.layers import VALUES_TOGETHER
from fluxserve.kernels.tensor_map import tensor_map

DIM = 128
_SOURCE = Path(__file__).with_suffix(".cu")
_THREADS = 384
_STAGES, _TILE = 4, 128 * 128
_BOX_ROWS = 64
_SHARED = (2 + 2 * _STAGES) * _TILE + (4 + 4 * _STAGES) * 8


class _Parameters(ctypes.Structure):
    """As attention_hopper.cu has it."""

    _fields_ = [
        *((name, c_void_p) for name in ("scales", "out", "workspace", "arrived")),
        ("base", c_float),
        *((name, c_int) for name in ("rows", "heads", "out_stride")),
    ]


def order_of_keys() -> Tensor:
    """Which of 16 keys stands where among values: those whose scores wgmma leaves in a thread, as its A operand wants
    them."""
    return torch.arange(VALUES_TOGETHER).view(2, 4, 2).transpose(0, 1).flatten()


def order_of_dims() -> Tensor:
    """Which of 64 dimensions stands where, so that a thread's results are sixteen neighbours."""
    return torch.arange(64).view(4, 8, 2).transpose(0, 1).flatten()


def transposed(v: Tensor) -> Tensor:
    """Values [rows, heads · 128] → [heads · 128, rows up to a multiple of 16], in the orders above, zeros behind the
    last."""
    rows, width = v.shape
    whole = -(-rows // VALUES_TOGETHER) * VALUES_TOGETHER
    padded = torch.zeros(whole, width, dtype=torch.uint8, device=v.device)
    padded[:rows] = v.view(torch.uint8)
    keys = padded.view(-1, VALUES_TOGETHER, width)[:, order_of_keys().to(v.device)].reshape(whole, width)
    dims = keys.view(whole, -1, 64)[:, :, order_of_dims().to(v.device)].reshape(whole, width)
    return dims.t().contiguous().view(E4M3)


def attention(qkv: Tensor, values: Tensor, heads: int, scales: Tensor, out: Tensor) -> None:
    """Enqueue.

    Args:
        qkv: E4M3 [rows, at least 2 · heads · 128]: q, then k; rows may have any stride of a multiple of 16.
        values: `transposed`.
        scales: float32 [4]: s_q, s_k, s_v, 1 / s_out.
        out: E4M3 [rows, heads · 128]; rows as qkv's.

    Raises:
        ValueError: what this kernel was not built for.
    """
    rows, width = out.shape
    if width != heads * DIM or any(t.dtype != E4M3 for t in (qkv, values, out)):
        raise ValueError(f"attention: got {width} columns of {out.dtype}, {heads} heads; expected E4M3, heads of {DIM}")
    if any(t.stride(0) % 16 or t.stride(1) != 1 or t.data_ptr() % 16 for t in (qkv, values, out)):
        raise ValueError("attention: expected rows at multiples of 16 bytes")
    keys = -(-rows // VALUES_TOGETHER) * VALUES_TOGETHER
    if len(qkv) != rows or qkv.shape[1] < 2 * width or values.shape != (width, keys):
        got = f"{tuple(qkv.shape)} and values {tuple(values.shape)}"
        raise ValueError(f"attention: got {got}; expected [{rows}, at least {2 * width}] and [{width}, {keys}]")
    addresses = (t.data_ptr() for t in (scales, out, *cuda.meeting_place(out.device)))
    parameters = _Parameters(*addresses, math.log2(math.e) / math.sqrt(DIM), rows, heads, out.stride(0))
    maps = [tensor_map(t.data_ptr(), *t.shape, t.stride(0), _BOX_ROWS) for t in (qkv, values)]
    _kernel().launch(cuda.programs(out.device), *(m.address for m in maps), ctypes.addressof(parameters))


@cache
def _kernel() -> cuda.Kernel:
    return cuda.load(_SOURCE, "attention", [], _THREADS, _SHARED)
