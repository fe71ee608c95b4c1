"""What a FLUX model is described by: a part for each thing that differs between members, and the whole."""

from dataclasses import dataclass
from typing import ClassVar

from fluxserve.errors import UnsupportedArchitecture
from fluxserve.families.shared.parts import VaeSpec
from fluxserve.sampling.schedule import ScheduleSpec
from fluxserve.spec import ModelSpec, Numbers

PATCH = 2
"""Side of the square of latent pixels that becomes one token of the transformer."""


@dataclass(frozen=True)
class TransformerSpec(Numbers):
    """FluxTransformer2DModel or, of generation 2, Flux2Transformer2DModel: double (`num_layers`) and single blocks.

    Generation 2 has no pooled embedding, one modulation for all blocks of a kind, SwiGLU, and no biases.
    """

    num_layers: int
    num_single_layers: int
    num_attention_heads: int
    attention_head_dim: int
    joint_attention_dim: int
    guidance_embeds: bool
    pooled_projection_dim: int | None = None
    in_channels: int = 64
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    rope_theta: float = 10000.0
    mlp_ratio: float = 4.0
    generation: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if sum(self.axes_dims_rope) != self.attention_head_dim:
            raise ValueError(f"axes_dims_rope {self.axes_dims_rope} must sum to {self.attention_head_dim}")

    @property
    def hidden_size(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def biased(self) -> bool:
        """Whether linear layers have a bias, which is all or none."""
        return self.generation == 1

    @property
    def mlp_width(self) -> int:
        """Features between an MLP's layers; of SwiGLU, which multiplies two of them, after it."""
        return int(self.hidden_size * self.mlp_ratio)


@dataclass(frozen=True, kw_only=True)
class FluxSpec(ModelSpec):
    """One member of the family, whole.

    Attributes:
        classifier_free: whether `guidance_scale` is the scale of classifier-free guidance, for which a step takes two
            passes: of a model that is not distilled.
    """

    family: ClassVar[str] = "flux"

    @classmethod
    def of(cls, spec: ModelSpec) -> "FluxSpec":
        """Return a model's spec for what is written for FLUX alone. Raises UnsupportedArchitecture."""
        if not isinstance(spec, cls):
            raise UnsupportedArchitecture("model", f"{spec.name}, of the family {spec.family}", "a model of FLUX")
        return spec

    transformer: TransformerSpec
    vae: VaeSpec
    schedule: ScheduleSpec
    classifier_free: bool = False

    def __post_init__(self) -> None:
        packed = self.vae.latent_channels * PATCH * PATCH
        if self.transformer.in_channels != packed:
            raise ValueError(f"in_channels {self.transformer.in_channels} must be {packed} for this VAE")
        steps, most = self.defaults.num_inference_steps, self.limits.max_inference_steps
        if self.only_steps and not steps == most == self.only_steps:
            raise ValueError(
                f"{steps} steps by default, {most} at most: both must be the {self.only_steps} base sigmas'"
            )

    @property
    def only_steps(self) -> int | None:
        """The number of steps that the model is drawn in, if there is but one."""
        return len(self.schedule.base_sigmas) or None

    @property
    def takes_guidance(self) -> bool:
        """FLUX.1-schnell takes any, and ignores it, as its pipeline does."""
        return self.takes_true_cfg or self.transformer.guidance_embeds or self.classifier_free

    @property
    def takes_true_cfg(self) -> bool:
        """Whether classifier-free guidance may be added to what is distilled, as FluxPipeline does."""
        return self.transformer.generation == 1

    @property
    def size_multiple(self) -> int:
        """Pixels a side must be a multiple of: one token."""
        return self.vae.downscale * PATCH

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Pixels to latent pixels."""
        return height // self.vae.downscale, width // self.vae.downscale

    def image_tokens(self, height: int, width: int) -> int:
        return (height // self.size_multiple) * (width // self.size_multiple)
