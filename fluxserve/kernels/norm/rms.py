"""What a text encoder's linears read, in one pass over each row: RMSNorm or a gated unit, then the row's own scale.

plain     y = x
rms       y = x / √(mean(x²) + ε) · weight                      T5LayerNorm, Qwen3RMSNorm: no mean is taken off, no bias
gated     y = gelu_tanh(x[: n]) · x[n :]                        T5DenseGatedActDense
swiglu    y = silu(x[: n]) · x[n :]                             Qwen3MLP

data = E4M3(y / s), s = max|y| / 448 per row                    or y in the compute dtype, with no s
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxserve.kernels.fp8 import E4M3, E4M3_MAX, SMALLEST_AMAX, cast, quantise_rows
from fluxserve.kernels.gemm.activations import gelu_tanh


@triton.jit
def _rows_kernel(
    x,
    weight,
    data,
    row_scale,
    columns,
    x_stride,
    data_stride,
    epsilon,
    smallest,
    GATE: tl.constexpr,
    E4M3_LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    mask = column < columns
    y = tl.load(x + row * x_stride + column, mask=mask, other=0.0).to(tl.float32)
    if GATE != "":
        factor = tl.load(x + row * x_stride + columns + column, mask=mask, other=0.0).to(tl.float32)
        if GATE == "gelu":
            y = gelu_tanh(y, INTERPRETED) * factor
        if GATE == "silu":
            y = y * tl.sigmoid(y) * factor
    if weight is not None:
        y = y * tl.rsqrt(tl.sum(y * y, axis=0) / columns + epsilon)
        y = y * tl.load(weight + column, mask=mask, other=0.0)
    if row_scale is not None:
        s = tl.maximum(tl.max(tl.abs(y), axis=0), smallest) / E4M3_LARGEST
        tl.store(row_scale + row, s)
        y = y / s
    tl.store(data + row * data_stride + column, y.to(data.dtype.element_ty), mask=mask)


def _launch(
    x: Tensor, weight: Tensor | None, epsilon: float, gate: str, data: Tensor, row_scale: Tensor | None
) -> None:
    rows, columns = data.shape
    _rows_kernel[(rows,)](
        x,
        weight,
        data,
        row_scale,
        columns,
        x.stride(0),
        data.stride(0),
        epsilon,
        SMALLEST_AMAX,
        GATE=gate,
        E4M3_LARGEST=E4M3_MAX,
        BLOCK=triton.next_power_of_2(columns),
        INTERPRETED=x.device.type == "cpu",
        num_warps=8,
    )


def rows(x: Tensor, data: Tensor, row_scale: Tensor | None) -> None:
    """x [rows, n], any float dtype → data [rows, n]; row_scale float32 [rows] exactly if data is E4M3."""
    _launch(x, None, 0.0, "", data, row_scale)


def rms_rows(x: Tensor, weight: Tensor, epsilon: float, data: Tensor, row_scale: Tensor | None) -> None:
    """The same behind RMSNorm; weight float32 [n]."""
    _launch(x, weight, epsilon, "", data, row_scale)


def gated_rows(x: Tensor, data: Tensor, row_scale: Tensor | None) -> None:
    """x [rows, 2·n], what is activated before what it is multiplied with → data [rows, n]."""
    _launch(x, None, 0.0, "gelu", data, row_scale)


def swiglu_rows(x: Tensor, data: Tensor, row_scale: Tensor | None) -> None:
    """The same with SiLU for GELU."""
    _launch(x, None, 0.0, "silu", data, row_scale)


# --- the same, plainly --------------------------------------------------------------------------------------------


def _store(y: Tensor, data: Tensor, row_scale: Tensor | None) -> None:
    if data.dtype == E4M3 and row_scale is not None:
        quantised, s = quantise_rows(y)
        data.copy_(quantised)
        row_scale.copy_(s)
    else:
        data.copy_(cast(y, data.dtype))


def plain_rows(x: Tensor, data: Tensor, row_scale: Tensor | None) -> None:
    _store(x.float(), data, row_scale)


def plain_rms_rows(x: Tensor, weight: Tensor, epsilon: float, data: Tensor, row_scale: Tensor | None) -> None:
    _store(torch.nn.functional.rms_norm(x.float(), x.shape[-1:], weight, epsilon), data, row_scale)


def plain_gated_rows(x: Tensor, data: Tensor, row_scale: Tensor | None) -> None:
    activated, factor = x.float().chunk(2, dim=-1)
    _store(torch.nn.functional.gelu(activated, approximate="tanh") * factor, data, row_scale)


def plain_swiglu_rows(x: Tensor, data: Tensor, row_scale: Tensor | None) -> None:
    activated, factor = x.float().chunk(2, dim=-1)
    _store(torch.nn.functional.silu(activated) * factor, data, row_scale)
