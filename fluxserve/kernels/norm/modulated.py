"""LayerNorm, modulate, quantise: what stands before every linear of a block, in one pass over the residual stream.

    h = (x − mean(x)) / √(var(x) + ε) · (1 + scale) + shift        AdaLayerNormZero of diffusers; ε = 1e-6, no affine
    data = E4M3(h / s), s = max|h| / 448 per row                   or h in the compute dtype, with no s

Rows before `split` take the first stream's shift and scale (text), the others the last one's (image).
Reads 2·D and writes D + 4 bytes a row: at 4,608 × 3,072 42 MB.
"""

import ctypes
from ctypes import c_float, c_int, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fluxserve.kernels.fp8 import E4M3, SMALLEST_AMAX, quantise_rows
from fluxserve.kernels.jit import nvrtc

EPSILON = 1e-6
_SOURCE = Path(__file__).with_suffix(".cu")
_NARROW = 12 * 256
_GROUP = 8
"""Columns that a lane reads at once."""


class _Parameters(ctypes.Structure):
    """As norm.cu has it."""

    _fields_ = [
        *((name, c_void_p) for name in ("x", "shift", "scale", "data", "row_scale")),
        *((name, c_float) for name in ("epsilon", "smallest")),
        *((name, c_int) for name in ("rows", "split", "streams", "x_stride", "data_stride", "stream_stride")),
    ]


def norm(x: Tensor, shift: Tensor, scale: Tensor, split: int, data: Tensor, row_scale: Tensor | None) -> None:
    """Launch the kernel.

    Args:
        x: residual stream, BF16 [rows, D], D a multiple of 8; rows may have any stride of such.
        shift, scale: float32 [streams, D].
        split: rows of the first of two streams; 0 with one.
        data: written, [rows, D], E4M3 or BF16.
        row_scale: written, float32 [rows]; given exactly if data is E4M3.

    Raises:
        ValueError: what this kernel was not built for.
    """
    rows, columns = x.shape
    streams = shift.shape[0]
    if x.dtype != torch.bfloat16 or data.dtype != (torch.bfloat16 if row_scale is None else E4M3):
        raise ValueError(f"norm: got {x.dtype} into {data.dtype}; expected BF16 into E4M3 with scales, or into BF16")
    if columns % _GROUP or x.stride(0) % _GROUP or data.stride(0) % _GROUP or x.stride(1) != 1:
        raise ValueError(f"norm: got {columns} columns, strides {x.stride()}, {data.stride()}; expected multiples of 8")
    parameters = _Parameters(
        *(None if t is None else t.data_ptr() for t in (x, shift, scale, data, row_scale)),
        EPSILON,
        SMALLEST_AMAX,
        rows,
        split,
        streams,
        x.stride(0),
        data.stride(0),
        shift.stride(0),
    )
    kernel = _kernel(columns, streams, row_scale is not None)
    kernel.launch(min(rows, nvrtc.processors(x.device)), ctypes.addressof(parameters))


@cache
def _kernel(columns: int, streams: int, quantised: bool) -> nvrtc.Kernel:
    shared = streams * 2 * columns * torch.float32.itemsize
    warps = 12 if columns <= _NARROW else 8  # of 132 SMs, each then has three of 4,608 rows
    defines = [f"D={columns}", f"QUANTISED={int(quantised)}", f"WARPS={warps}"]
    return nvrtc.load(_SOURCE, "layer_norm", defines, 32 * warps, shared)


def plain_norm(x: Tensor, shift: Tensor, scale: Tensor, split: int, data: Tensor, row_scale: Tensor | None) -> None:
    """The same, plainly."""
    wide = torch.nn.functional.layer_norm(x.float(), x.shape[-1:], eps=EPSILON)
    streams = ((slice(0, split), 0), (slice(split, None), -1))
    h = torch.cat([wide[rows] * (1 + scale[stream]) + shift[stream] for rows, stream in streams])
    if data.dtype == E4M3 and row_scale is not None:
        quantised, s = quantise_rows(h)
        data.copy_(quantised)
        row_scale.copy_(s)
    else:
        data.copy_(h)
