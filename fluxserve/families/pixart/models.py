"""What a PixArt-Σ is described by, and the published members.

Their numbers are those of the published diffusers configurations and of PixArtSigmaPipeline's defaults.
"""

from dataclasses import dataclass
from typing import ClassVar

from fluxserve.families.shared.parts import VaeSpec
from fluxserve.sampling.betas import BetaSchedule
from fluxserve.spec import Defaults, EncoderSpec, Limits, ModelSpec, Numbers, TextSpec

PASSES = 2
"""With guidance: the prompt's and the negative prompt's."""


@dataclass(frozen=True)
class TransformerSpec(Numbers):
    """PixArtTransformer2DModel.

    Attributes:
        out_channels: those of the noise, and behind them as many of a variance that sampling does not use.
        sample_size: side of the latents that it was trained on.
        interpolation_scale: what positions are divided by, so that a larger model's cover the same range.
    """

    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    caption_channels: int
    sample_size: int
    interpolation_scale: int
    in_channels: int = 4
    out_channels: int = 8
    patch_size: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.out_channels not in (self.in_channels, 2 * self.in_channels):
            allowed = f"{self.in_channels}, or twice as many with a variance"
            raise ValueError(f"out_channels: got {self.out_channels}; expected {allowed}")


@dataclass(frozen=True, kw_only=True)
class PixArtSpec(ModelSpec):
    """One member of the family, whole."""

    family: ClassVar[str] = "pixart"

    transformer: TransformerSpec
    vae: VaeSpec
    schedule: BetaSchedule

    def __post_init__(self) -> None:
        if self.transformer.in_channels != self.vae.latent_channels:
            got, expected = self.transformer.in_channels, self.vae.latent_channels
            raise ValueError(f"in_channels: got {got}; expected {expected}, the channels of this VAE's latents")

    @property
    def size_multiple(self) -> int:
        return self.vae.downscale * self.transformer.patch_size

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return the shape of one picture's latents."""
        return 1, self.vae.latent_channels, height // self.vae.downscale, width // self.vae.downscale


def default_interpolation(sample_size: int) -> int:
    """Return the scale of positions where a config.json has none (PixArtTransformer2DModel.__init__)."""
    return max(sample_size // 64, 1)


def defaults(side: int) -> Defaults:
    """Return the defaults of a model that was trained on squares of a side, in pixels."""
    return Defaults(side=side, num_inference_steps=20, guidance_scale=4.5)


def limits(side: int) -> Limits:
    """Return the limits of a model that was trained on squares of a side: up to twice as long, or as many pixels."""
    return Limits(min_side=64, max_side=2 * side, max_pixels=2 * side * side, max_guidance_scale=30.0)


T5 = EncoderSpec("t5", "text_encoder", "tokenizer", tokens=300, vocabulary=32128)


def _published(name: str, sample_size: int) -> PixArtSpec:
    vae = VaeSpec(latent_channels=4, downscale=8, scaling_factor=0.13025, shift_factor=0.0)
    side = sample_size * vae.downscale
    return PixArtSpec(
        name=name,
        transformer=TransformerSpec(
            num_layers=28,
            num_attention_heads=16,
            attention_head_dim=72,
            caption_channels=4096,
            sample_size=sample_size,
            interpolation_scale=default_interpolation(sample_size),
        ),
        vae=vae,
        schedule=BetaSchedule(beta_start=0.0001, beta_end=0.02, beta_schedule="linear", timestep_spacing="linspace"),
        text=TextSpec((T5,)),
        defaults=defaults(side),
        limits=limits(side),
    )


MEMBERS: tuple[PixArtSpec, ...] = (
    _published("pixart-sigma-xl-2-256", 32),
    _published("pixart-sigma-xl-2-512", 64),
    _published("pixart-sigma-xl-2-1024", 128),
    _published("pixart-sigma-xl-2-2k", 256),
)
