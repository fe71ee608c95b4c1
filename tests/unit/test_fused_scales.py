"""Static FP8 scales: ranges are measured as they are, and become scales in engines.fused.scales alone."""

from pathlib import Path

import pytest
import torch
from fluxserve_export import fp8
from fluxserve_export.calibrate import watched
from torch import Tensor, nn
from torch.nn import functional

from fluxserve.engines.fused.scales import BlockScales, folded, of_block, static
from fluxserve.errors import ArtifactError
from fluxserve.folders.artifact import Ranges
from fluxserve.kernels.fp8 import E4M3, cast

BLOCK, HIDDEN = "transformer_blocks.0", ("ff.net.2", "ff_context.net.2")
CPU = torch.device("cpu")
COMMAND = "fluxserve export CHECKPOINT --engine fused --precision fp8 --out ARTIFACT"


def ranges(q: float = 7.3, k: float = 11.1, v: float = 5.0, centred: float = 3.7) -> Ranges:
    linears = {f"{BLOCK}.{name}": amax for name, amax in zip(HIDDEN, (1.7, 9.1), strict=True)}
    return Ranges(linears, {f"{BLOCK}.attn": (q, k, v)}, {f"{BLOCK}.attn": centred})


class _Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v)


class _Block(nn.Module):
    """A module that calibration finds: attention under a name that ends in "attn"."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = _Attention()


def heads(dtype: torch.dtype, head_dim: int, seed: int) -> list[Tensor]:
    """q, k and v, [1, 2 heads, 9 tokens, head_dim]."""
    generator = torch.Generator().manual_seed(seed)
    return [(3 * torch.randn(1, 2, 9, head_dim, generator=generator)).to(dtype) for _ in "qkv"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [32, 128])
def test_ranges_are_measured_as_they_are(dtype: torch.dtype, head_dim: int) -> None:
    block, (q, k, v) = _Block(), heads(dtype, head_dim, seed=0)
    with watched("transformer", block) as seen:
        block.attn(q, k, v)
    assert seen.ranges("max").attention == {"attn": tuple(float(x.abs().max()) for x in (q, k, v))}


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2**-23), (torch.bfloat16, 2**-8 + 2**-23)])
def test_format_1s_scales_are_off_by_a_rounding(dtype: torch.dtype, bound: float) -> None:
    """Calibration multiplied q and k by head_dim^-1/4 in its own dtype.

    The factor and the product are rounded to float32, by 2^-24 at most each, and the product to bfloat16, by 2^-8.
    """
    changed = 0
    for seed in range(50):
        for x in heads(dtype, 128, seed):
            stored = float((x * fp8.root_scale(128)).abs().max())
            old = of_block(ranges(q=stored).without_root(128), BLOCK, HIDDEN).q
            new = of_block(ranges(q=float(x.abs().max())), BLOCK, HIDDEN).q
            assert abs(old / new - 1) <= bound
            changed += old != new
    assert changed > 0, "128^-1/4 is no power of two"


@pytest.mark.parametrize("head_dim", [16, 256])
def test_they_are_the_same_where_the_factor_is_a_power_of_two(head_dim: int) -> None:
    x = heads(torch.bfloat16, head_dim, seed=1)[0]
    stored = float((x * fp8.root_scale(head_dim)).abs().max())
    assert ranges(q=stored).without_root(head_dim) == ranges(q=float(x.abs().max()), k=11.1 * head_dim**0.25)


def test_format_1_gives_the_scales_that_it_gave() -> None:
    """Bit for bit, by the formula that read it."""
    root, unit = 128**0.25, 2.0 / 448
    for q, k in torch.rand(200, 2, dtype=torch.float64).mul(20).add(1e-3).tolist():
        scales = of_block(ranges(q, k).without_root(128), BLOCK, HIDDEN)
        assert scales == BlockScales(q * root * unit, k * root * unit, 3.7 * unit, 9.1 * unit)


def test_a_block_has_the_scales_of_the_table() -> None:
    scales = of_block(ranges(), BLOCK, HIDDEN)
    assert scales == BlockScales(static(7.3), static(11.1), static(3.7), static(9.1))
    assert static(448.0) == 2.0, "an octave above what calibration saw"
    kept = of_block(ranges(), BLOCK, HIDDEN, attention=False)
    assert kept == BlockScales(1.0, 1.0, static(3.7), static(9.1)), "attention's output is E4M3 all the same"


def test_what_a_kernel_multiplies_by() -> None:
    scales, norms = BlockScales(0.5, 0.25, 2.0, 4.0), torch.rand(2, 2, 8)
    factors = scales.head_factors(norms)
    assert torch.equal(factors, torch.cat([norms * torch.tensor([[2.0], [4.0]]), torch.full((2, 1, 8), 0.5)], dim=1))
    assert scales.descale(CPU).tolist() == [0.5, 0.25, 2.0, 0.5]
    assert scales.side_by_side(2, 3, CPU).tolist() == [2.0, 2.0, 4.0, 4.0, 4.0]
    assert (scales.inverse_out, scales.inverse_hidden) == (0.5, 0.25)
    rows, mean = torch.rand(4, 3), torch.rand(3)
    assert torch.equal(scales.attended(rows, mean), 2 * rows + mean)


@pytest.mark.parametrize("scale", [0.037, torch.linspace(0.01, 0.09, 64)], ids=["one", "by feature"])
def test_a_product_of_rows_with_static_scales(scale: Tensor | float) -> None:
    """Weights take the scale of their inputs, so that a product is as exact as one of rows without."""
    x, w = torch.randn(16, 64), torch.randn(24, 64)
    stored, by_output = folded(w, scale)
    assert stored.dtype == E4M3 and by_output.shape == (24,)
    got = cast(x / scale, E4M3).float() @ stored.float().T * by_output
    expected = x @ w.T
    assert (got - expected).norm() < 0.05 * expected.norm()


def test_ranges_without_the_mean_name_the_command() -> None:
    old = Ranges(ranges().linears, ranges().attention, {})
    with pytest.raises(ArtifactError, match=COMMAND):
        of_block(old, BLOCK, HIDDEN)


def test_the_command_is_the_exporters(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Only the checkpoint is missing."""
    from fluxserve_export import cli

    names = {"CHECKPOINT": str(tmp_path / "nowhere"), "ARTIFACT": str(tmp_path / "a")}
    program, export, *arguments = (names.get(word, word) for word in COMMAND.split())
    assert (program, export) == ("fluxserve", "export")
    assert cli.main(arguments) == 1
    assert "nowhere" in capsys.readouterr().err
