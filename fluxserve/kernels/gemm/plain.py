"""`gemm.portable`'s operations by their definitions, wherever PyTorch runs: what its kernels are judged by."""

import torch
from torch import Tensor

from fluxserve.kernels.fp8 import cast
from fluxserve.kernels.gemm.layers import GATES, RMS_EPSILON, Heads, Linear, Watched, divided
from fluxserve.kernels.gemm.saturation import plain_count_saturated
from fluxserve.kernels.gemm.value_means import plain_centre_values


def _product(x: Tensor, x_scale: Tensor | None, w: Linear, split: int) -> Tensor:
    """y, float32 [rows, N]."""
    parts = []
    for stream, rows in ((0, slice(0, split)), (-1, slice(split, None))):
        y = x[rows].float() @ w.weight[stream].float().T
        y = y * x_scale[rows, None] if x_scale is not None else y
        y = y * w.scale[stream] if w.scale is not None else y
        parts.append(y + w.bias[stream] if w.bias is not None else y)
    return torch.cat(parts)


def plain_linear(x: Tensor, x_scale: Tensor | None, w: Linear, split: int, out: Tensor) -> None:
    out.copy_(cast(_product(x, x_scale, w, split), out.dtype))


def plain_linear_gelu(x: Tensor, x_scale: Tensor | None, w: Linear, split: int, inverse: float, out: Tensor) -> None:
    y = torch.nn.functional.gelu(_product(x, x_scale, w, split), approximate="tanh")
    out.copy_(cast(y * inverse, out.dtype))


def plain_linear_swiglu(x: Tensor, x_scale: Tensor | None, w: Linear, split: int, inverse: float, out: Tensor) -> None:
    gates, values = _product(x, x_scale, w, split).view(len(x), -1, 2, GATES).unbind(dim=2)
    y = torch.nn.functional.silu(gates) * values
    out.copy_(cast(y.flatten(1) * inverse, out.dtype))


def plain_linear_add(
    x: Tensor,
    x_scale: Tensor | None,
    w: Linear,
    split: int,
    gate: Tensor | None,
    residual: Tensor,
    restored: Tensor | None = None,
    watched: Watched | None = None,
) -> None:
    y = _product(x, x_scale, w, split)
    if watched is not None:
        plain_count_saturated(watched)
    if restored is not None:
        y[:split] += restored[0]
        y[split:] += restored[-1]
    if gate is not None:
        y[:split] *= gate[0]
        y[split:] *= gate[-1]
    residual.copy_(residual.float() + y)


def plain_linear_heads(x: Tensor, x_scale: Tensor | None, w: Linear, split: int, heads: Heads, out: Tensor) -> None:
    head_dim = heads.factors.shape[-1]
    y = _product(x, x_scale, w, split).view(len(x), 3, -1, head_dim)
    if heads.centre is not None:
        plain_centre_values(x, x_scale, w, split, heads.centre)
        y[:, 2] -= heads.centre.mean.view(-1, head_dim)
    y[:, :2] = torch.nn.functional.rms_norm(y[:, :2], (head_dim,), eps=RMS_EPSILON)
    y[:split] *= heads.factors[0, :, None]
    y[split:] *= heads.factors[-1, :, None]
    first, second = y[:, :2].chunk(2, dim=-1)
    c, s = heads.cos[:, None, None], heads.sin[:, None, None]
    y[:, :2] = torch.cat([first * c - second * s, second * c + first * s], dim=-1)
    out.copy_(cast(y, out.dtype).flatten(1))


def plain_linear_heads_gelu(
    x: Tensor, x_scale: Tensor | None, w: Linear, heads: Heads, out: Tensor, inverse: float, hidden: Tensor
) -> None:
    first, rest = divided(w, out.shape[1])
    plain_linear_heads(x, x_scale, first, 0, heads, out)
    plain_linear_gelu(x, x_scale, rest, 0, inverse, hidden)


def plain_linear_heads_swiglu(
    x: Tensor, x_scale: Tensor | None, w: Linear, heads: Heads, out: Tensor, inverse: float, hidden: Tensor
) -> None:
    first, rest = divided(w, out.shape[1])
    plain_linear_heads(x, x_scale, first, 0, heads, out)
    plain_linear_swiglu(x, x_scale, rest, 0, inverse, hidden)
