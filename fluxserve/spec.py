"""What every model is described by, whatever its family. Frozen facts: no I/O, no torch."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

NETWORK = "transformer"
"""Name of the component that the loop runs."""


class Numbers:
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
    `max_passes` bounds the passes of the network in a step: each takes one of the rows that an engine was built for.
    """

    min_side: int
    max_side: int
    max_pixels: int
    max_inference_steps: int = 100
    max_images: int = 8
    max_guidance_scale: float = 100.0
    max_passes: int = 2
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


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One model, as everything outside of its family sees it.

    Attributes:
        family: its name in families.registry.
    """

    family: ClassVar[str]

    name: str
    text: TextSpec
    defaults: Defaults
    limits: Limits

    @property
    def components(self) -> tuple[str, ...]:
        """The names of what the model is run with, text encoders first."""
        return (*(encoder.name for encoder in self.text.encoders), NETWORK, "vae_encoder", "vae_decoder")

    @property
    def takes_references(self) -> bool:
        """Whether input images are tokens beside the picture's, or else what the picture is redrawn from."""
        return self.limits.max_references > 0

    @property
    def size_multiple(self) -> int:
        """Pixels a side must be a multiple of."""
        raise NotImplementedError
