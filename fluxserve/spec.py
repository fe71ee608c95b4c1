"""What a model IS: frozen facts about each member of the FLUX family. No I/O, no torch.

The numbers are those of the published diffusers configurations (transformer/config.json, vae/config.json,
scheduler/scheduler_config.json of FLUX.1-dev and -schnell, FLUX.2-klein and -dev) and of the pipelines' defaults.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
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

    With `empirical_shift` the latter is Flux2Pipeline's, which depends on the number of steps as well.
    """

    use_dynamic_shifting: bool
    shift: float = 1.0
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    num_train_timesteps: int = 1000
    empirical_shift: bool = False

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

    @property
    def components(self) -> tuple[str, ...]:
        """The names of what the model is run with, text encoders first."""
        return (*(encoder.name for encoder in self.text.encoders), "transformer", "vae_encoder", "vae_decoder")

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


_FLUX1 = TransformerSpec(
    num_layers=19,
    num_single_layers=38,
    num_attention_heads=24,
    attention_head_dim=128,
    joint_attention_dim=4096,
    pooled_projection_dim=768,
    guidance_embeds=True,
)
_FLUX1_VAE = VaeSpec(latent_channels=16, downscale=8, scaling_factor=0.3611, shift_factor=0.1159)


def _flux1_text(tokens: int) -> TextSpec:
    """CLIP, whose pooled embedding modulates the blocks, and T5 with so many tokens."""
    clip = EncoderSpec("clip", "text_encoder", "tokenizer", tokens=77, vocabulary=49408)
    return TextSpec((clip, EncoderSpec("t5", "text_encoder_2", "tokenizer_2", tokens, vocabulary=32128)))


_FLUX1_LIMITS = Limits(min_side=64, max_side=2048, max_pixels=2048 * 2048)

FLUX1_DEV = ModelSpec(
    name="flux.1-dev",
    transformer=_FLUX1,
    vae=_FLUX1_VAE,
    schedule=ScheduleSpec(use_dynamic_shifting=True, shift=3.0),
    text=_flux1_text(512),
    defaults=Defaults(side=1024, num_inference_steps=28, guidance_scale=3.5),
    limits=_FLUX1_LIMITS,
)
FLUX1_SCHNELL = ModelSpec(
    name="flux.1-schnell",
    transformer=replace(_FLUX1, guidance_embeds=False),
    vae=_FLUX1_VAE,
    schedule=ScheduleSpec(use_dynamic_shifting=False, shift=1.0),
    text=_flux1_text(256),
    defaults=Defaults(side=1024, num_inference_steps=4, guidance_scale=0.0),
    limits=_FLUX1_LIMITS,
)

# A klein is distilled to 4 steps, beyond twice as many it gains nothing; and guidance has no input to go to.
_KLEIN_4B = TransformerSpec(
    num_layers=5,
    num_single_layers=20,
    num_attention_heads=24,
    attention_head_dim=128,
    joint_attention_dim=7680,
    guidance_embeds=False,
    in_channels=128,
    axes_dims_rope=(32, 32, 32, 32),
    rope_theta=2000.0,
    mlp_ratio=3.0,
    generation=2,
)
_QWEN3 = EncoderSpec("qwen3", "text_encoder", "tokenizer", tokens=512, vocabulary=151936, layers=(9, 18, 27))

FLUX2_KLEIN_4B = ModelSpec(
    name="flux.2-klein-4b",
    transformer=_KLEIN_4B,
    vae=VaeSpec(latent_channels=32, downscale=8, scaling_factor=1.0, shift_factor=0.0),
    schedule=ScheduleSpec(use_dynamic_shifting=True, shift=3.0, empirical_shift=True),
    text=TextSpec((_QWEN3,)),
    defaults=Defaults(side=1024, num_inference_steps=4, guidance_scale=1.0),
    limits=replace(_FLUX1_LIMITS, max_inference_steps=8, max_guidance_scale=1.0, max_references=4),
)
FLUX2_KLEIN_9B = replace(
    FLUX2_KLEIN_4B,
    name="flux.2-klein-9b",
    transformer=replace(
        _KLEIN_4B, num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12288
    ),
)
# The words that the model was trained behind (diffusers' flux2/system_messages.py); the line break is one of them.
_MISTRAL3 = EncoderSpec(
    name="mistral3",
    folder="text_encoder",
    tokenizer="tokenizer",
    tokens=512,
    vocabulary=131072,
    layers=(10, 20, 30),
    system="You are an AI that reasons about image descriptions. You give structured responses focusing on object"
    " relationships, object\nattribution and actions without speculation.",
)
FLUX2_DEV = replace(
    FLUX2_KLEIN_4B,
    name="flux.2-dev",
    transformer=replace(
        _KLEIN_4B,
        num_layers=8,
        num_single_layers=48,
        num_attention_heads=48,
        joint_attention_dim=15360,
        guidance_embeds=True,
    ),
    text=TextSpec((_MISTRAL3,)),
    defaults=Defaults(side=1024, num_inference_steps=28, guidance_scale=4.0),
    limits=replace(_FLUX1_LIMITS, max_references=4),
)
TINY = ModelSpec(
    name="tiny",
    transformer=TransformerSpec(
        num_layers=1,
        num_single_layers=5,
        num_attention_heads=2,
        attention_head_dim=128,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        guidance_embeds=True,
    ),
    vae=VaeSpec(latent_channels=16, downscale=8, scaling_factor=1.0, shift_factor=0.0),  # the folder has its own
    schedule=ScheduleSpec(use_dynamic_shifting=True, shift=3.0),
    text=_flux1_text(32),
    defaults=Defaults(side=128, num_inference_steps=20, guidance_scale=3.0),
    limits=Limits(min_side=64, max_side=512, max_pixels=512 * 512),
)

FAMILY: tuple[ModelSpec, ...] = (FLUX1_DEV, FLUX1_SCHNELL, FLUX2_KLEIN_4B, FLUX2_KLEIN_9B, FLUX2_DEV, TINY)


def from_configs(transformer: Mapping[str, Any], vae: Mapping[str, Any], scheduler: Mapping[str, Any]) -> ModelSpec:
    """Read a ModelSpec out of a diffusers folder's three config.json files.

    A fine-tune keeps its base's transformer shape, and with it the base's defaults and limits; the VAE's scale and
    the schedule are always the folder's own. A shape nobody published gets FLUX.1-dev's or -schnell's defaults,
    by whether it has a guidance embedding; one of generation 2 FLUX.2-dev's or -klein's.

    Raises:
        ValueError: the numbers contradict each other.
        KeyError: a number is missing.
    """
    for name, neutral in _NOT_IMPLEMENTED.items():
        if scheduler.get(name, neutral) != neutral:
            raise ValueError(f"scheduler {name}: got {scheduler[name]!r}; expected {neutral!r}")
    shape = _transformer(transformer)
    base = next((m for m in FAMILY if m.transformer == shape), None)
    if base is None:
        guided, unguided = (FLUX2_DEV, FLUX2_KLEIN_4B) if shape.generation == 2 else (FLUX1_DEV, FLUX1_SCHNELL)
        base = replace(guided if shape.guidance_embeds else unguided, name="custom")
    factors = (1.0, 0.0) if shape.generation == 2 else (vae["scaling_factor"], vae["shift_factor"])
    downscale = 2 ** (len(vae["block_out_channels"]) - 1)
    schedule = ScheduleSpec(**_pick(ScheduleSpec, scheduler))
    return replace(
        base,
        transformer=shape,
        vae=VaeSpec(vae["latent_channels"], downscale, *factors),
        schedule=replace(schedule, empirical_shift=shape.generation == 2),
    )


def _transformer(config: Mapping[str, Any]) -> TransformerSpec:
    generation = 2 if config.get("_class_name") == "Flux2Transformer2DModel" else 1
    needed = "axes_dims_rope" if generation == 2 else "pooled_projection_dim"  # without a default that would fit
    if config.get(needed) is None:
        raise KeyError(needed)
    usual = {name: getattr(_KLEIN_4B, name) for name in ("rope_theta", "mlp_ratio")} if generation == 2 else {}
    return replace(TransformerSpec(**_pick(TransformerSpec, {**usual, **config})), generation=generation)


# Options of FlowMatchEulerDiscreteScheduler that FLUX does not use and flow.py lacks, and their neutral values.
_NOT_IMPLEMENTED = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "invert_sigmas": False,
    "stochastic_sampling": False,
    "shift_terminal": None,
    "time_shift_type": "exponential",
}


def _pick(spec: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `config` that `spec` has fields for; lists become tuples so that specs compare and hash."""
    for field in fields(spec):
        if field.default is MISSING and field.name not in config:
            raise KeyError(field.name)
    named = {f.name: config[f.name] for f in fields(spec) if config.get(f.name) is not None}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in named.items()}
