"""How far a kernel may be from float64, and how outputs are poisoned. See each test for what it compares with."""

import torch
from torch import Tensor

from fluxserve.kernels.fp8 import E4M3, cast

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"

RESULTS = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16, E4M3]


def poisoned(*shape: int, dtype: torch.dtype, width: int | None = None) -> Tensor:
    """NaN everywhere; with `width`, a view of so many columns of rows that go on beyond it."""
    whole = torch.full((*shape[:-1], shape[-1] + (width or 0)), float("nan"), device=DEVICE)
    return whole.to(dtype)[..., : shape[-1]]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, spread: float = 1.0) -> Tensor:
    """Normal numbers with a few large ones among them, as activations have."""
    generator = torch.Generator(DEVICE).manual_seed(seed + sum(shape))
    x = torch.randn(shape, generator=generator, device=DEVICE) * spread
    x.view(-1)[:: max(1, x.numel() // 7)] *= 12
    return x.to(dtype)


def relative(got: Tensor, expected: Tensor) -> float:
    """‖got − expected‖ / ‖expected‖; NaN counts as everything."""
    error = (got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
    return float(error.nan_to_num(float("inf")))


def same(got: Tensor, expected: Tensor, dtype: torch.dtype, before: float = 1e-6) -> None:
    """As close as `expected`, float32 and unrounded, is to itself rounded once to `dtype`, and a tenth more.

    Args:
        before: relative error that is there before that rounding; see `of_product`.
    """
    assert got.dtype == dtype
    assert torch.isfinite(got.float()).all(), "not written, or not finite"
    assert relative(got, expected) <= 1.1 * relative(cast(expected, dtype), expected) + before


def of_product(operands: torch.dtype) -> float:
    """Relative error of a sum of products on the tensor cores: E4M3's accumulator cuts after 13 bits of mantissa.

    At 15,360 products a simulation of it is off by 3.0e-3, BF16's (25 bits, cut as well) by 1.7e-5.
    """
    if INTERPRETED:
        return 1e-6
    return 2**-8 if operands == E4M3 else 2**-14
