"""Static scales of what a block quantises before its largest value is known, from the calibration in an artifact.

Only attention's q, k and v and the MLPs' hidden layers need one; everything else takes its scale from each row as it
comes. v is quantised without its mean (kernels.gemm.layers.Centre).
"""

from dataclasses import dataclass

from fluxserve.errors import ArtifactError
from fluxserve.folders.artifact import Scales
from fluxserve.kernels.fp8 import E4M3_MAX

HEADROOM = 2.0
"""How far beyond the largest value that calibration saw a value may go before it saturates. E4M3 is a floating-point
format, so that this costs no digits but at the far end of its 18 octaves; what calibration never saw is given an
octave."""


@dataclass(frozen=True)
class BlockScales:
    """What q, k, v less its mean and the MLP's hidden layer are divided by before they are cast. All 1: nothing is
    quantised."""

    q: float = 1.0
    k: float = 1.0
    v: float = 1.0
    hidden: float = 1.0

    @property
    def out(self) -> float:
        """Attention's output is a weighted mean of what v is."""
        return self.v


def of_block(scales: Scales, block: str, hidden: tuple[str, ...], head_dim: int) -> BlockScales:
    """Of one block, e.g. "transformer_blocks.0".

    Args:
        hidden: the linears that read the MLP's hidden layer; in a double block text's and image's share a scale.

    Raises:
        ArtifactError: the scales are of another model.
    """
    try:
        q, k, _ = scales.attention[f"{block}.attn"]
        largest = max(scales.linears[f"{block}.{name}"] for name in hidden)
    except KeyError as error:
        raise ArtifactError(f"scales.json: no {error}; expected the calibration of this model") from error
    if f"{block}.attn" not in scales.centred:
        got = f"no range of {block}'s values without their mean, which older artifacts lack"
        raise ArtifactError(f"scales.json: {got}; export the model again (fluxserve export)")
    root, unit = head_dim**0.25, HEADROOM / E4M3_MAX
    return BlockScales(q * root * unit, k * root * unit, scales.centred[f"{block}.attn"] * unit, largest * unit)
