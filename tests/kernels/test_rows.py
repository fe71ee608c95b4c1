"""rows: RMSNorm or a gated unit, quantised."""

from collections.abc import Callable

import pytest
import torch

from fluxserve.kernels.fp8 import E4M3
from fluxserve.kernels.norm import rms as kernels
from tests.kernels.judge import DEVICE, INTERPRETED, RESULTS, poisoned, random, same

Call = Callable[[str, torch.Tensor, torch.Tensor, torch.Tensor | None], None]
WIDTH = 96 if INTERPRETED else 4096


def plain(prefix: str, x: torch.Tensor, data: torch.Tensor, scale: torch.Tensor | None) -> None:
    getattr(kernels, f"{prefix}rows")(x, data, scale)


def rms(prefix: str, x: torch.Tensor, data: torch.Tensor, scale: torch.Tensor | None) -> None:
    getattr(kernels, f"{prefix}rms_rows")(x, random(x.shape[1], seed=9), 1e-6, data, scale)


def gated(prefix: str, x: torch.Tensor, data: torch.Tensor, scale: torch.Tensor | None) -> None:
    getattr(kernels, f"{prefix}gated_rows")(x, data, scale)


def swiglu(prefix: str, x: torch.Tensor, data: torch.Tensor, scale: torch.Tensor | None) -> None:
    getattr(kernels, f"{prefix}swiglu_rows")(x, data, scale)


@pytest.mark.parametrize("call", [plain, rms, gated, swiglu])
@pytest.mark.parametrize("rows", [1, 17, 77] if INTERPRETED else [1, 17, 512, 4608])
@pytest.mark.parametrize("dtype", RESULTS)
def test_as_the_reference(call: Call, rows: int, dtype: torch.dtype) -> None:
    x = random(rows, (2 if call in (gated, swiglu) else 1) * WIDTH, spread=3)
    data, scale = poisoned(rows, WIDTH, dtype=dtype), poisoned(rows, dtype=torch.float32)
    expected = torch.empty(rows, WIDTH, device=DEVICE)
    call("plain_", x, expected, None)
    call("", x, data, scale if dtype == E4M3 else None)
    tanh = 2**-10 if call is gated and not INTERPRETED else 0.0  # the GPU's own is right to 2^-11
    same(data, expected / scale[:, None] if dtype == E4M3 else expected, dtype, 1e-6 + tanh)


@pytest.mark.parametrize("call", [plain, rms, gated, swiglu])
def test_scales_and_rows_of_zeros(call: Call) -> None:
    x = random(5, (2 if call in (gated, swiglu) else 1) * WIDTH)
    x[3] = 0
    data, scale = poisoned(5, WIDTH, dtype=E4M3), poisoned(5, dtype=torch.float32)
    expected, expected_scale = poisoned(5, WIDTH, dtype=E4M3), poisoned(5, dtype=torch.float32)
    call("", x, data, scale)
    call("plain_", x, expected, expected_scale)
    assert torch.allclose(scale, expected_scale, rtol=1e-5 if INTERPRETED else 2**-9)
    assert (data[3].float() == 0).all()
