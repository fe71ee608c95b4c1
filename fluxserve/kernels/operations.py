"""The operations that an engine is built from, as one set: launched on a GPU, or plainly wherever PyTorch runs."""

from collections.abc import Callable
from dataclasses import dataclass

from fluxserve.kernels import attention, linear, modulation, norm


@dataclass(frozen=True)
class Operations:
    """One set; each field is described where the function of its name is."""

    norm: Callable[..., None]
    linear: Callable[..., None]
    linear_gelu: Callable[..., None]
    linear_add: Callable[..., None]
    linear_heads: Callable[..., None]
    attention: Callable[..., None]
    modulation: Callable[..., None]


LAUNCHED = Operations(
    norm=norm.norm,
    linear=linear.linear,
    linear_gelu=linear.linear_gelu,
    linear_add=linear.linear_add,
    linear_heads=linear.linear_heads,
    attention=attention.attention,
    modulation=modulation.modulation,
)

PLAIN = Operations(
    norm=norm.plain_norm,
    linear=linear.plain_linear,
    linear_gelu=linear.plain_linear_gelu,
    linear_add=linear.plain_linear_add,
    linear_heads=linear.plain_linear_heads,
    attention=attention.plain_attention,
    modulation=modulation.plain_modulation,
)
"""Every operation by its definition: what kernels are judged by, and how an engine's own arithmetic is on a CPU."""
