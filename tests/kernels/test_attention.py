"""attention: cuDNN's kernel on a GPU; everywhere, its plain reference against PyTorch's attention."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from fluxserve.errors import LibraryRefused
from fluxserve.kernels.attention import plan_cache
from fluxserve.kernels.attention.fused import attention, padded, plain_attention
from fluxserve.kernels.fp8 import E4M3, E4M3_MAX, cast
from tests.kernels.judge import DEVICE, INTERPRETED, random, relative

DIM = 128
SCALES = (0.02, 0.03, 0.01)


def q_k_v(rows: int, heads: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """One row's q, k and v behind each other, and the scales that it is held with."""
    wide = torch.cat([random(rows, heads * DIM, seed=i, spread=0.5) for i in range(3)], dim=1)
    scales = torch.tensor([*SCALES, 1 / SCALES[2]], device=DEVICE)
    if dtype != E4M3:
        return wide.to(dtype), scales
    factor = scales[:3].repeat_interleave(heads * DIM)
    return cast(wide / factor, E4M3), scales


def run(qkv: torch.Tensor, heads: int, scales: torch.Tensor, out: torch.Tensor) -> None:
    """Attention in memory of as many rows as it takes; those behind are as large as numbers get, and don't count."""
    rows, memory = len(qkv), padded(len(qkv), qkv.dtype)
    given = torch.full((memory, qkv.shape[1]), E4M3_MAX, device=DEVICE).to(qkv.dtype)
    given[:rows] = qkv
    made = torch.full((memory, out.stride(0)), float("nan"), device=DEVICE).to(out.dtype)
    attention(given, rows, heads, scales, made[:, : out.shape[1]])
    out.copy_(made[:rows, : out.shape[1]])
    assert torch.isnan(made[:, out.shape[1] :].float()).all(), "what lies between is left alone"


def exact(qkv: torch.Tensor, heads: int, scales: torch.Tensor) -> torch.Tensor:
    held = [1.0] * 3 if qkv.dtype != E4M3 else scales[:3].tolist()
    parts = (p.double() * s for p, s in zip(qkv.chunk(3, dim=1), held, strict=True))
    q, k, v = (p.unflatten(1, (heads, DIM)).transpose(0, 1) for p in parts)
    attended = [
        scaled_dot_product_attention(*head) for head in zip(q, k, v, strict=True)
    ]  # all heads' scores take 16 GB
    return torch.stack(attended).transpose(0, 1).flatten(1).float()


@pytest.mark.parametrize(("rows", "memory"), [(1, 128), (128, 128), (129, 256), (4544, 4608)])
def test_e4m3_takes_whole_tiles(rows: int, memory: int) -> None:
    assert padded(rows, E4M3) == memory
    assert padded(rows, torch.bfloat16) == rows


@pytest.mark.parametrize("rows", [1, 17, 130])
def test_the_reference_is_attention(rows: int) -> None:
    qkv, scales = q_k_v(rows, 2, torch.float32)
    out = torch.empty(rows, 2 * DIM, device=DEVICE)
    plain_attention(qkv, rows, 2, scales, out)
    assert relative(out, exact(qkv, 2, scales)) < 1e-5


def test_the_reference_loses_what_fp8_loses() -> None:
    """E4M3's step is 2^-3: weights and outputs are each off by 2^-4 at most, 2% to 3% over all of them."""
    qkv, scales = q_k_v(300, 2, E4M3)
    out = torch.empty(300, 2 * DIM, device=DEVICE, dtype=E4M3)
    plain_attention(qkv, 300, 2, scales, out)
    assert 0.01 < relative(out.float() * SCALES[2], exact(qkv, 2, scales)) < 0.05


@pytest.mark.skipif(INTERPRETED, reason="cuDNN needs a CUDA device")
@pytest.mark.parametrize(
    ("rows", "heads"), [(1, 3), (17, 3), (512, 3), (4608, 3), (9217, 3), (4544, 24), (4608, 32), (4608, 48)]
)
@pytest.mark.parametrize("dtype", [E4M3, torch.bfloat16])
def test_into_a_part_of_wider_rows(rows: int, heads: int, dtype: torch.dtype) -> None:
    """No worse than the same arithmetic done plainly; what lies beside it is left alone."""
    qkv, scales = q_k_v(rows, heads, dtype)
    width = heads * DIM
    wide = torch.empty(rows, 5 * width, device=DEVICE, dtype=dtype)
    plain = torch.empty(rows, width, device=DEVICE, dtype=dtype)
    run(qkv, heads, scales, wide[:, :width])
    plain_attention(qkv, rows, heads, scales, plain)
    factor = SCALES[2] if dtype == E4M3 else 1.0
    expected = exact(qkv, heads, scales)
    allowed = 1.2 * relative(plain.float() * factor, expected) + 1e-3
    assert relative(wide[:, :width].float() * factor, expected) <= allowed


@pytest.mark.skipif(INTERPRETED, reason="cuDNN needs a CUDA device")
@pytest.mark.parametrize("rows", [4544, 4608])
@pytest.mark.parametrize("dtype", [E4M3, torch.bfloat16])
def test_the_same_bits_every_time(rows: int, dtype: torch.dtype) -> None:
    qkv, scales = q_k_v(rows, 24, dtype)
    results = [torch.empty(rows, 24 * DIM, device=DEVICE, dtype=dtype) for _ in range(20)]
    for result in results:
        run(qkv, 24, scales, result)
    assert all(torch.equal(results[0].view(torch.uint8), again.view(torch.uint8)) for again in results)


@pytest.mark.skipif(INTERPRETED, reason="cuDNN needs a CUDA device")
@pytest.mark.parametrize("dtype", [E4M3, torch.bfloat16])
def test_extremes(dtype: torch.dtype) -> None:
    """Scores in the hundreds, so that one key takes all; values as large as they can be held."""
    rows, heads = 300, 3
    qkv, scales = q_k_v(rows, heads, torch.float32)
    held = (448 * scales[:3] if dtype == E4M3 else torch.full((3,), 8.0, device=DEVICE)).repeat_interleave(heads * DIM)
    wide = qkv.sign() * held * torch.where(qkv.abs() > 0.3, 1.0, 0.5)
    factor = scales[:3].repeat_interleave(heads * DIM) if dtype == E4M3 else 1.0
    given = cast(wide / factor, dtype)
    out, plain = (torch.full((rows, heads * DIM), float("nan"), device=DEVICE).to(dtype) for _ in range(2))
    run(given, heads, scales, out)
    plain_attention(given, rows, heads, scales, plain)
    expected, shown = exact(given, heads, scales), SCALES[2] if dtype == E4M3 else 1.0
    assert relative(out.float() * shown, expected) <= 1.2 * relative(plain.float() * shown, expected) + 1e-3


@pytest.mark.skipif(INTERPRETED, reason="cuDNN needs a CUDA device")
def test_values_with_a_mean() -> None:
    """A weakness, held where it is: the tensor cores' 13-bit accumulator cuts over 4,608 keys all in one direction."""
    qkv, scales = q_k_v(4608, 2, E4M3)
    mean = cast(2 + qkv[:, 4 * DIM :].float() / 50, E4M3)
    qkv = torch.cat([qkv[:, : 4 * DIM].float(), mean.float()], dim=1).to(E4M3)
    out, plain = (torch.empty(4608, 2 * DIM, device=DEVICE, dtype=E4M3) for _ in range(2))
    run(qkv, 2, scales, out)
    plain_attention(qkv, 4608, 2, scales, plain)
    expected = exact(qkv, 2, scales)
    assert relative(plain.float() * SCALES[2], expected) < 0.01
    assert relative(out.float() * SCALES[2], expected) < 0.07


def test_another_cudnn_than_pytorchs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cudnn", SimpleNamespace(backend_version=lambda: 91300))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    with pytest.raises(LibraryRefused, match="cudnn: got 91300 for attention; expected PyTorch's own, 91900"):
        plan_cache.library.__wrapped__()


def test_pytorchs_own_words_about_an_older_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    def version() -> int:
        raise RuntimeError("found runtime version (9, 14, 0)")

    monkeypatch.setitem(sys.modules, "cudnn", SimpleNamespace(backend_version=lambda: 91400))
    monkeypatch.setattr(torch.backends.cudnn, "version", version)
    with pytest.raises(LibraryRefused, match=r"cudnn: found runtime version \(9, 14, 0\)"):
        plan_cache.library.__wrapped__()
