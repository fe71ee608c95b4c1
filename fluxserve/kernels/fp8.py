"""E4M3, the FP8 of weights and activations: 1 sign, 4 exponent and 3 mantissa bits, largest value 448, no infinity.

x is held as q·s: q rounds x/s to the nearest, ties to even; s is a float32 factor of a whole tensor, a row (one token's
activations) or a column (one output channel's weights).
"""

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
SMALLEST_AMAX = 1e-12
"""A row of zeros is held as zeros times this, and not as 0/0."""


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """One rounding to `dtype`; to E4M3 what is beyond ±448 becomes ±448 (PyTorch's own cast would make it NaN)."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3) if dtype == E4M3 else x.to(dtype)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [.., rows, K] → E4M3 of the same shape, float32 scales [.., rows]: each row's largest value becomes 448."""
    wide = x.float()
    scale = wide.abs().amax(dim=-1).clamp_min(SMALLEST_AMAX) / E4M3_MAX
    return cast(wide / scale[..., None], E4M3), scale
