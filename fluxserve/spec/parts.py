"""What a model is described by: a part for each thing that differs between members of the family, and the whole."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

PATCH = 2
"""Side of the square of latent pixels that becomes one token of the transformer."""


class _Numbers:
    """What comes out of a config.json must be what the field says: a whole or finite number, a truth value."""

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            value, kind = getattr(self, field.name), field.type
            whole = isinstance(value, int) and not isinstance(value, bool)
            fits: dict[object, bool] = {
                int: whole and value > 0,
                int | None: value is None or (whole and value > 0),
                float: whole or (isinstance(value, float) and math.isfinite(value)),
                bool: isinstance(value, bool),
            }
            if not fits.get(kind, True):
                raise ValueError(f"{field.name}: got {value!r}; expected a {getattr(kind, '__name__', kind)}")


@dataclass(frozen=True)
class TransformerSpec(_Numbers):
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


@dataclass(frozen=True)
class VaeSpec(_Numbers):
    """AutoencoderKL: `downscale` pixels to a latent pixel; latents are (z - shift) * scaling.

    AutoencoderKLFlux2 scales by statistics that are among its weights: its factors are 1 and 0 here.
    """

    latent_channels: int
    downscale: int
    scaling_factor: float
    shift_factor: float


@dataclass(frozen=True)
class ScheduleSpec(_Numbers):
    """FlowMatchEulerDiscreteScheduler: a static `shift`, or one that grows with the number of image tokens.

    With `empirical_shift` the latter is Flux2Pipeline's, which depends on the number of steps as well. `base_sigmas`
    are the noise levels before the shift, one for each step, of a model that was distilled to them and to no others.
    """

    use_dynamic_shifting: bool
    shift: float = 1.0
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    num_train_timesteps: int = 1000
    empirical_shift: bool = False
    base_sigmas: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_image_seq_len <= self.base_image_seq_len:
            raise ValueError(f"max_image_seq_len: got {self.max_image_seq_len}; expected > {self.base_image_seq_len}")


@dataclass(frozen=True)
class EncoderSpec:
    """A text encoder: the folders of its weights and of its tokenizer, and how many words it knows.

    A prompt is always padded to `tokens`. With `layers` it is a language model: it reads the prompt as a chat's turn,
    is told which tokens are padding, and gives the hidden states after so many layers, one behind the other. With
    `system` that is what the chat begins with, and nothing of an answer is begun.
    """

    name: str
    folder: str
    tokenizer: str
    tokens: int
    vocabulary: int
    layers: tuple[int, ...] = ()
    system: str = ""


@dataclass(frozen=True)
class TextSpec:
    """The text encoders, in the order of their folders. The last one's sequence is what the blocks attend to."""

    encoders: tuple[EncoderSpec, ...]

    @property
    def sequence(self) -> EncoderSpec:
        return self.encoders[-1]

    def named(self, name: str) -> EncoderSpec:
        return next(encoder for encoder in self.encoders if encoder.name == name)

    def changed(self, name: str, **values: Any) -> "TextSpec":
        """The same encoders, one of them with other numbers."""
        return TextSpec(tuple(replace(e, **values) if e.name == name else e for e in self.encoders))


@dataclass(frozen=True)
class Defaults:
    """What a request gets that says nothing."""

    side: int
    num_inference_steps: int
    guidance_scale: float
    strength: float = 0.6


@dataclass(frozen=True)
class Limits:
    """What a request may ask for. Sides and areas are in pixels.

    References are images that a picture is drawn after. A larger one than `max_reference_pixels` is scaled down.
    """

    min_side: int
    max_side: int
    max_pixels: int
    max_inference_steps: int = 100
    max_images: int = 8
    max_guidance_scale: float = 100.0
    max_prompt_bytes: int = 4096
    max_image_bytes: int = 32 * 2**20
    max_image_pixels: int = 64 * 10**6
    max_references: int = 0
    max_reference_pixels: int = 1024 * 1024
    min_reference_side: int = 64
    max_reference_aspect: int = 8

    @property
    def max_decoded_pixels(self) -> int:
        """Of an input image that is decoded whole: four times as long and as wide as the model can use."""
        useful = self.max_reference_pixels if self.max_references else self.max_pixels
        return min(16 * useful, self.max_image_pixels)


@dataclass(frozen=True)
class ModelSpec:
    """One member of the family, whole."""

    name: str
    transformer: TransformerSpec
    vae: VaeSpec
    schedule: ScheduleSpec
    text: TextSpec
    defaults: Defaults
    limits: Limits

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
    def components(self) -> tuple[str, ...]:
        """The names of what the model is run with, text encoders first."""
        return (*(encoder.name for encoder in self.text.encoders), "transformer", "vae_encoder", "vae_decoder")

    @property
    def only_steps(self) -> int | None:
        """The number of steps that the model is drawn in, if there is but one."""
        return len(self.schedule.base_sigmas) or None

    @property
    def takes_references(self) -> bool:
        """Whether input images are tokens beside the picture's, or else what the picture is redrawn from."""
        return self.limits.max_references > 0

    @property
    def takes_guidance(self) -> bool:
        """FLUX.1-schnell takes any, and ignores it, as its pipeline does."""
        return self.transformer.generation == 1 or self.transformer.guidance_embeds

    @property
    def size_multiple(self) -> int:
        """Pixels a side must be a multiple of: one token."""
        return self.vae.downscale * PATCH

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Pixels to latent pixels."""
        return height // self.vae.downscale, width // self.vae.downscale

    def image_tokens(self, height: int, width: int) -> int:
        return (height // self.size_multiple) * (width // self.size_multiple)
