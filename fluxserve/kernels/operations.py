"""The operations that an engine is built from, as one set: kernels for a GPU, or plain PyTorch wherever that runs.

Each protocol is one signature. The function that a field holds documents what it reads, writes and rounds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fluxserve.kernels.attention import fused, qk_rope, single_head
from fluxserve.kernels.gemm import adaln, hopper, plain, portable
from fluxserve.kernels.gemm.layers import Heads, Linear, Watched
from fluxserve.kernels.image import group, residual
from fluxserve.kernels.norm import modulated, rms


class Norm(Protocol):
    """LayerNorm, modulation and quantisation of rows [R, C]."""

    def __call__(
        self, x: Tensor, shift: Tensor, scale: Tensor, split: int, data: Tensor, row_scale: Tensor | None
    ) -> None: ...


class Product(Protocol):
    """x · Wᵀ + b."""

    def __call__(self, x: Tensor, x_scale: Tensor | None, w: Linear, split: int, out: Tensor) -> None: ...


class ActivatedProduct(Protocol):
    """A product with an activation, quantised with the static scale 1 / inverse."""

    def __call__(
        self, x: Tensor, x_scale: Tensor | None, w: Linear, split: int, inverse: float, out: Tensor
    ) -> None: ...


class AddedProduct(Protocol):
    """A product that is gated and added to the residual stream in place."""

    def __call__(
        self,
        x: Tensor,
        x_scale: Tensor | None,
        w: Linear,
        split: int,
        gate: Tensor | None,
        residual: Tensor,
        restored: Tensor | None = None,
        watched: Watched | None = None,
    ) -> None: ...


class HeadsProduct(Protocol):
    """The product that makes q, k and v: RMSNorm and RoPE of its heads, then quantisation."""

    def __call__(self, x: Tensor, x_scale: Tensor | None, w: Linear, split: int, heads: Heads, out: Tensor) -> None: ...


class HeadsAndHiddenProduct(Protocol):
    """A single block's first product: q, k and v, and the activated hidden layer of its MLP."""

    def __call__(
        self, x: Tensor, x_scale: Tensor | None, w: Linear, heads: Heads, out: Tensor, inverse: float, hidden: Tensor
    ) -> None: ...


class Attention(Protocol):
    """softmax(q · kᵀ / √d) · v over the first `rows` rows."""

    def __call__(self, qkv: Tensor, rows: int, heads: int, scales: fused.Scales, out: Tensor) -> None: ...


class Modulation(Protocol):
    """adaLN's product for several steps at once."""

    def __call__(self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, out: Tensor) -> None: ...


class QuantisedRows(Protocol):
    """Rows, perhaps gated, in FP8 with a scale each; without `row_scale` as they are."""

    def __call__(self, x: Tensor, data: Tensor, row_scale: Tensor | None) -> None: ...


class NormedRows(Protocol):
    """RMSNorm of rows, then the same."""

    def __call__(self, x: Tensor, weight: Tensor, epsilon: float, data: Tensor, row_scale: Tensor | None) -> None: ...


class HeadRotation(Protocol):
    """RMSNorm and RoPE of query and key heads in place."""

    def __call__(self, x: Tensor, queries: int, weights: Tensor, epsilon: float, cos: Tensor, sin: Tensor) -> None: ...


class GroupNorm(Protocol):
    """GroupNorm over an image in channels-last layout, with SiLU if `silu`."""

    def __call__(
        self,
        x: Tensor,
        groups: int,
        weight: Tensor,
        bias: Tensor,
        epsilon: float,
        silu: bool,
        offset: Tensor | None = None,
        taken: Tensor | None = None,
    ) -> Tensor: ...


class SingleHeadAttention(Protocol):
    """Attention with one wide head."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None: ...


@dataclass(frozen=True)
class Operations:
    """One set of operations.

    arrange: lays a Linear's weights out as this set's products read them.
    add: returns the statistics for the GroupNorm that follows, where the set has them ready.
    """

    arrange: Callable[[Linear], Linear]
    norm: Norm
    linear: Product
    linear_gelu: ActivatedProduct
    linear_swiglu: ActivatedProduct
    linear_add: AddedProduct
    linear_heads: HeadsProduct
    linear_heads_gelu: HeadsAndHiddenProduct
    linear_heads_swiglu: HeadsAndHiddenProduct
    attention: Attention
    modulation: Modulation
    rows: QuantisedRows
    rms_rows: NormedRows
    gated_rows: QuantisedRows
    swiglu_rows: QuantisedRows
    turn: HeadRotation
    group_norm: GroupNorm
    add: Callable[[Tensor, Tensor, Tensor, int], Tensor | None]
    add_upsampled: Callable[[Tensor, Tensor, Tensor], Tensor]
    wide_attention: SingleHeadAttention


def as_they_are(w: Linear) -> Linear:
    """Lay weights out as they are stored."""
    return w


LAUNCHED = Operations(
    arrange=hopper.arranged,
    norm=modulated.norm,
    linear=portable.linear,
    linear_gelu=portable.linear_gelu,
    linear_swiglu=portable.linear_swiglu,
    linear_add=portable.linear_add,
    linear_heads=portable.linear_heads,
    linear_heads_gelu=portable.linear_heads_gelu,
    linear_heads_swiglu=portable.linear_heads_swiglu,
    attention=fused.attention,
    modulation=adaln.modulation,
    rows=rms.rows,
    rms_rows=rms.rms_rows,
    gated_rows=rms.gated_rows,
    swiglu_rows=rms.swiglu_rows,
    turn=qk_rope.turn,
    group_norm=group.group_norm,
    add=residual.add,
    add_upsampled=residual.add_upsampled,
    wide_attention=single_head.wide_attention,
)
"""Every operation as a kernel for Hopper."""

PLAIN = Operations(
    arrange=as_they_are,
    norm=modulated.plain_norm,
    linear=plain.plain_linear,
    linear_gelu=plain.plain_linear_gelu,
    linear_swiglu=plain.plain_linear_swiglu,
    linear_add=plain.plain_linear_add,
    linear_heads=plain.plain_linear_heads,
    linear_heads_gelu=plain.plain_linear_heads_gelu,
    linear_heads_swiglu=plain.plain_linear_heads_swiglu,
    attention=fused.plain_attention,
    modulation=adaln.plain_modulation,
    rows=rms.plain_rows,
    rms_rows=rms.plain_rms_rows,
    gated_rows=rms.plain_gated_rows,
    swiglu_rows=rms.plain_swiglu_rows,
    turn=qk_rope.plain_turn,
    group_norm=group.plain_group_norm,
    add=residual.plain_add,
    add_upsampled=residual.plain_add_upsampled,
    wide_attention=single_head.plain_wide_attention,
)
"""Every operation by its definition: the reference for kernels, and the engine's arithmetic on a CPU."""
