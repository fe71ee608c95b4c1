"""How the fused engine's FP8 numbers come about: every scale, from calibration to the kernels.

E4M3 (Micikevicius et al., FP8 Formats for Deep Learning, arXiv:2209.05433) holds x as q·s: q rounds x / s, and |q| is
at most 448. A static scale is fixed before x is known; a dynamic one is taken from each row. amax is the largest |x|.

    tensor                                     scale s               kind     computed by
    weights                                    amax / 448            static   `folded`, for each output
    q, k (normalised and rotated)              HEADROOM · amax / 448 static   `of_block`, from calibration
    v less its mean over all tokens            HEADROOM · amax / 448 static   `of_block`, from calibration
    attention's output less that mean          s of v                static   its rows are weighted means of v's rows
    softmax's weights, 0 to 1                  1 / 448               static   kernels.attention.fused
    the MLP's hidden layer                     HEADROOM · amax / 448 static   `of_block`, from calibration
    every other input of a product             amax / 448            dynamic  kernels.norm, for each row

Ranges are amax of tensors as they are. Attention's factor head_dim^-1/2 is in no scale: the kernel multiplies scores by
it in float32. A kernel that writes a tensor with a static scale multiplies by 1 / s. Attention, which reads three,
multiplies scores and output by s (`BlockScales.descale`). A product does not: its weights are multiplied by the scale
of its inputs before they are quantised (`folded`).

Why v loses its mean: kernels.gemm.layers.Centre. INT8 is the modulation's alone (kernels.gemm.adaln).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fluxserve.errors import ArtifactError
from fluxserve.folders.artifact import Ranges
from fluxserve.kernels.fp8 import E4M3_MAX, quantise_rows

HEADROOM = 2.0
"""How far beyond calibration's amax a value may go before it saturates. E4M3 is a floating-point format: an octave more
costs no digits except at the far end of its 18 octaves."""


def static(amax: float) -> float:
    """Return the static scale of a tensor whose largest absolute value in calibration was `amax`."""
    return amax * (HEADROOM / E4M3_MAX)


def folded(weight: Tensor, inputs: Tensor | float) -> tuple[Tensor, Tensor]:
    """Quantise weights of a product together with the static scale of its inputs.

    Args:
        weight: [N, K].
        inputs: the scale by which inputs were divided, one or one per feature [K]; 1 for inputs with dynamic scales.

    Returns:
        E4M3 [N, K], and the float32 scale [N] of each output.
    """
    return quantise_rows(weight * inputs)


@dataclass(frozen=True)
class BlockScales:
    """One block's static scales; 1 where a tensor is not quantised.

    Attributes:
        q, k: of queries and keys, normalised and rotated.
        v: of values less their mean, and of attention's output.
        hidden: of the MLP's hidden layer.
    """

    q: float = 1.0
    k: float = 1.0
    v: float = 1.0
    hidden: float = 1.0

    @property
    def inverse_out(self) -> float:
        """What attention's output is multiplied by before it is rounded."""
        return 1 / self.v

    @property
    def inverse_hidden(self) -> float:
        """What the MLP's hidden layer is multiplied by before it is rounded."""
        return 1 / self.hidden

    def head_factors(self, norms: Tensor) -> Tensor:
        """Return what q, k and v are multiplied by before they are rounded.

        Args:
            norms: RMSNorm's weights of q and k, float32 [streams, 2, head_dim].

        Returns:
            float32 [streams, 3, head_dim]: norms (1 for v), each over its static scale.
        """
        streams, _, dim = norms.shape
        inverse = torch.tensor([1 / self.q, 1 / self.k, 1 / self.v], device=norms.device)
        return torch.cat([norms, torch.ones(streams, 1, dim, device=norms.device)], dim=1) * inverse[:, None]

    def descale(self, device: torch.device) -> Tensor:
        """Return float32 [4]: s_q, s_k, s_v and 1 / s_out, as kernels.attention.fused takes them."""
        return torch.tensor([self.q, self.k, self.v, self.inverse_out], dtype=torch.float32, device=device)

    def side_by_side(self, width: int, mlp_width: int, device: torch.device) -> Tensor:
        """Return the scales of a single block's last inputs, float32 [width + mlp_width]: attention's output, then the
        hidden layer."""
        scales = torch.full((width + mlp_width,), self.hidden, device=device)
        scales[:width] = self.v
        return scales

    def attended(self, rows: Tensor, mean: Tensor) -> Tensor:
        """Return attention's output in float32, from rows [S, D] as they are stored and the mean [D] of v."""
        return rows.float() / self.inverse_out + mean


def of_block(ranges: Ranges, block: str, hidden: Sequence[str], attention: bool = True) -> BlockScales:
    """Return the static scales of one block.

    Args:
        block: its name, e.g. "transformer_blocks.0".
        hidden: the linears that read the MLP's hidden layer. Text's and image's in a double block share a scale.
        attention: whether q and k are quantised. v and attention's output are in any quantised block.

    Raises:
        ArtifactError: the ranges are of another model.
    """
    try:
        q, k, _ = ranges.attention[f"{block}.attn"]
        largest = max(ranges.linears[f"{block}.{name}"] for name in hidden)
    except KeyError as error:
        raise ArtifactError(f"scales.json: no {error}; expected the calibration of this model") from error
    if f"{block}.attn" not in ranges.centred:
        got = f"no range of {block}'s values without their mean, which older artifacts lack"
        raise ArtifactError(f"scales.json: {got}; export the model again: {_AGAIN}")
    scales = BlockScales(static(q), static(k), static(ranges.centred[f"{block}.attn"]), static(largest))
    return scales if attention else replace(scales, q=1.0, k=1.0)


_AGAIN = "fluxserve export CHECKPOINT --engine fused --precision fp8 --out ARTIFACT"
