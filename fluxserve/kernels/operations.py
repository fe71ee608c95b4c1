"""The operations that an engine is built from, as one set: launched on a GPU, or plainly wherever PyTorch runs."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fluxserve.kernels import (
    add,
    attention,
    group_norm,
    linear,
    linear_hopper,
    linear_plain,
    modulation,
    norm,
    rows,
    turn,
    wide_attention,
)
from fluxserve.kernels.layers import Linear


@dataclass(frozen=True)
class Operations:
    """One set; each field is described where the function of its name is.

    arrange: a Linear → the same, as this set's products want its weights to lie.
    """

    arrange: Callable[[Linear], Linear]
    norm: Callable[..., None]
    linear: Callable[..., None]
    linear_gelu: Callable[..., None]
    linear_swiglu: Callable[..., None]
    linear_add: Callable[..., None]
    linear_heads: Callable[..., None]
    linear_heads_gelu: Callable[..., None]
    linear_heads_swiglu: Callable[..., None]
    attention: Callable[..., None]
    modulation: Callable[..., None]
    rows: Callable[..., None]
    rms_rows: Callable[..., None]
    gated_rows: Callable[..., None]
    swiglu_rows: Callable[..., None]
    turn: Callable[..., None]
    group_norm: Callable[..., Tensor]
    add: Callable[..., Tensor | None]
    add_upsampled: Callable[..., Tensor]
    wide_attention: Callable[..., None]


def as_they_are(w: Linear) -> Linear:
    return w


LAUNCHED = Operations(
    arrange=linear_hopper.arranged,
    norm=norm.norm,
    linear=linear.linear,
    linear_gelu=linear.linear_gelu,
    linear_swiglu=linear.linear_swiglu,
    linear_add=linear.linear_add,
    linear_heads=linear.linear_heads,
    linear_heads_gelu=linear.linear_heads_gelu,
    linear_heads_swiglu=linear.linear_heads_swiglu,
    attention=attention.attention,
    modulation=modulation.modulation,
    rows=rows.rows,
    rms_rows=rows.rms_rows,
    gated_rows=rows.gated_rows,
    swiglu_rows=rows.swiglu_rows,
    turn=turn.turn,
    group_norm=group_norm.group_norm,
    add=add.add,
    add_upsampled=add.add_upsampled,
    wide_attention=wide_attention.wide_attention,
)

PLAIN = Operations(
    arrange=as_they_are,
    norm=norm.plain_norm,
    linear=linear_plain.plain_linear,
    linear_gelu=linear_plain.plain_linear_gelu,
    linear_swiglu=linear_plain.plain_linear_swiglu,
    linear_add=linear_plain.plain_linear_add,
    linear_heads=linear_plain.plain_linear_heads,
    linear_heads_gelu=linear_plain.plain_linear_heads_gelu,
    linear_heads_swiglu=linear_plain.plain_linear_heads_swiglu,
    attention=attention.plain_attention,
    modulation=modulation.plain_modulation,
    rows=rows.plain_rows,
    rms_rows=rows.plain_rms_rows,
    gated_rows=rows.plain_gated_rows,
    swiglu_rows=rows.plain_swiglu_rows,
    turn=turn.plain_turn,
    group_norm=group_norm.plain_group_norm,
    add=add.plain_add,
    add_upsampled=add.plain_add_upsampled,
    wide_attention=wide_attention.plain_wide_attention,
)
"""Every operation by its definition: what kernels are judged by, and how an engine's own arithmetic is on a CPU."""
