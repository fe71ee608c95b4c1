"""What lies between a VAE's networks and the latents of the loop: quant convolutions, and FLUX.2's batch norm.

Latents [1, C, H, W] are small beside what the networks make of them, so all of it is in float32. What can be part of a
neighbour's weights is: `quant_conv` of the encoder's last convolution; batch norm, on the decoder's way, of
`post_quant_conv`. That in turn not of the decoder's first convolution: its bias would meet the zeros of its padding.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fluxserve.engines.fused.weights import Reader
from fluxserve.families.flux.parts import PATCH, FluxSpec
from fluxserve.folders.checkpoint import Checkpoint

_USED = True
"""Quant convolutions are there where a configuration does not say: the default of diffusers' classes."""
_EPSILON = 1e-4


@dataclass(frozen=True)
class Pointwise:
    """A convolution of single pixels. weight: float32 [N, C]; bias: float32 [N]."""

    weight: Tensor
    bias: Tensor

    def __call__(self, pixel: Tensor) -> Tensor:
        """[C] → [N]."""
        return self.weight @ pixel + self.bias


def pointwise(read: Reader, config: Mapping[str, Any], name: str, channels: int) -> Pointwise | None:
    """One of as many channels as it takes; None if the configuration says there is none. Raises CheckpointError."""
    if not config.get(f"use_{name}", _USED):
        return None
    weight = read.shaped(f"{name}.weight", channels, channels, 1, 1).float()
    return Pointwise(weight[:, :, 0, 0], read.shaped(f"{name}.bias", channels).float())


@dataclass(frozen=True)
class Statistics:
    """Batch norm's, float32 [C, PATCH, PATCH]: a channel has others at each place of a square, which is one token."""

    mean: Tensor
    std: Tensor

    def normalised(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """A network's latents [1, C, H, W] and their spread → those of the loop, float32; H and W are even."""
        squares = 1, mean.shape[2] // PATCH, mean.shape[3] // PATCH
        own = self.std.repeat(squares)
        return (mean.float() - self.mean.repeat(squares)) / own, std.float() / own


def statistics(read: Reader, checkpoint: Checkpoint) -> Statistics | None:
    """Of FLUX.2; None of FLUX.1, whose loop scales by two constants. Raises CheckpointError."""
    spec = FluxSpec.of(checkpoint.spec)
    if spec.transformer.generation == 1:
        return None
    channels = spec.vae.latent_channels
    mean, variance = (
        read.shaped(f"bn.running_{part}", channels * PATCH * PATCH).float().view(channels, PATCH, PATCH)
        for part in ("mean", "var")
    )
    return Statistics(mean, torch.sqrt(variance + checkpoint.config("vae").get("batch_norm_eps", _EPSILON)))


class Squares:
    """One linear map of the channels for each place of a square: batch norm taken back, and `post_quant_conv`.

    Args:
        weight: float32 [side, side, N, C]; bias: float32 [side, side, N].
        dtype: of what comes out.
    """

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
        self._weight, self._bias, self._dtype = weight, bias, dtype

    def __call__(self, x: Tensor) -> Tensor:
        """[1, C, H, W] → [1, N, H, W], channels-last; H and W are multiples of the side."""
        side = len(self._bias)
        squares = x.float().unflatten(3, (-1, side)).unflatten(2, (-1, side))  # type: ignore[no-untyped-call]
        y = torch.einsum("pqnc,bchpwq->bhpwqn", self._weight, squares) + self._bias[:, None]
        pixels = y.to(self._dtype).reshape(len(x), *x.shape[2:], -1)
        return pixels.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def before(convolution: Pointwise | None, taken: Statistics | None, dtype: torch.dtype) -> Squares | None:
    """What the decoder's network is preceded by; None if by nothing.

    post · (x · std + mean) + bias = (post · std) · x + (post · mean + bias), at each place of a square.
    """
    if convolution is None:
        return Squares(_diagonal(taken.std), taken.mean.permute(1, 2, 0), dtype) if taken else None
    if taken is None:
        return Squares(convolution.weight[None, None], convolution.bias[None, None], dtype)
    weight = torch.einsum("nc,cpq->pqnc", convolution.weight, taken.std)
    bias = torch.einsum("nc,cpq->pqn", convolution.weight, taken.mean) + convolution.bias
    return Squares(weight, bias, dtype)


def _diagonal(std: Tensor) -> Tensor:
    """[C, PATCH, PATCH] → [PATCH, PATCH, C, C]."""
    return torch.diag_embed(std.permute(1, 2, 0))
