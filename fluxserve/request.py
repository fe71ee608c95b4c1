"""User input → a validated, frozen Request: what all families take alike. Every refusal names field, value and range.

A family's own `parse` is made of these functions and of what it alone takes.
"""

import binascii
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fluxserve.contract import ENCODINGS, OUTPUT_FORMATS
from fluxserve.errors import InvalidRequest
from fluxserve.media.images import Fit, InputImage, Pixels, read_image
from fluxserve.spec import Limits, ModelSpec

DRAWN_SEEDS = 2**32
"""A seed that is drawn is below this: short enough to read out and to type again."""

MAX_SEED = 2**63 - 1
DEFAULT_QUALITY = 90

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Tokens:
    """What one text encoder is given, int64 [tokens] each; `mask` is 0 where an id is padding, else 1."""

    ids: Ids
    mask: Ids


Tokenize = Callable[[str], Mapping[str, Tokens]]
"""A prompt → tokens by the name of the text encoder."""

Decode = Callable[[bytes, Fit], Pixels]
"""An image file → pixels of the size and shape that a model takes."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request with nothing left to default. Sizes in pixels; of `images` the headers were read."""

    prompt: str
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    num_images: int
    images: tuple[InputImage, ...]
    output_format: str
    quality: int
    encoding: str
    embed_prompt: bool

    @property
    def seeds(self) -> tuple[int, ...]:
        """Image k is drawn from seed + k."""
        return tuple(self.seed + k for k in range(self.num_images))


@dataclass(frozen=True)
class Draft:
    """A request whose plain fields are right, and whose images nobody has looked at yet.

    Attributes:
        complete: reads the headers of the images, and settles the size, which may follow from them. Raises
            InvalidRequest.
    """

    complete: Callable[[], Request]


def common(fields: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    """Validate the fields that mean the same to every model, but for images and sizes.

    Args:
        fields: by contract name: bytes for BYTES inputs, a sequence of them for `image`, int and float for the rest;
            absent ones get their default.

    Raises:
        InvalidRequest: names the field, what came and what is allowed.
    """
    num_images = integer(fields, "num_images", 1, 1, spec.limits.max_images)
    return {
        "prompt": text(fields.get("prompt"), "prompt", spec.limits.max_prompt_bytes),
        "seed": _seed(fields, num_images),
        "num_images": num_images,
        "output_format": _choice(fields, "output_format", OUTPUT_FORMATS),
        "quality": integer(fields, "quality", DEFAULT_QUALITY, 1, 100),
        "encoding": _choice(fields, "encoding", ENCODINGS),
        "embed_prompt": bool(fields.get("embed_prompt", False)),
    }


def refuse(fields: Mapping[str, Any], names: Sequence[str], spec: ModelSpec) -> None:
    """Refuse fields that a model has no use for. Raises InvalidRequest."""
    for name in names:
        if name in fields:
            raise InvalidRequest(name, shown(fields[name]), f"nothing: {spec.name} does not take it")


def shown(value: object) -> str:
    """A value as a refusal shows it: a number as it is, of bytes how many."""
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    return f"{len(value)} images" if isinstance(value, list | tuple) else str(value)


def text(raw: bytes | None, field: str, most: int, empty: bool = False) -> str:
    """Return a text that was given; `empty`: which may have no words. Raises InvalidRequest."""
    allowed = f"{0 if empty else 1} to {most} bytes of UTF-8 text"
    if raw is None:
        raise InvalidRequest(field, "nothing", allowed)
    if len(raw) > most:
        raise InvalidRequest(field, f"{len(raw)} bytes", allowed)
    try:
        words = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest(field, f"bytes that are not UTF-8 (at byte {error.start})", allowed) from error
    if not empty and not words.strip():
        raise InvalidRequest(field, "no text" if words else "0 bytes", allowed)
    if "\x00" in words:
        raise InvalidRequest(field, "a NUL character", allowed)
    return words


def integer(fields: Mapping[str, Any], name: str, default: int, least: int, most: int) -> int:
    """Return a whole number within bounds. Raises InvalidRequest."""
    value = int(fields.get(name, default))
    if not least <= value <= most:
        raise InvalidRequest(name, str(value), f"{least} to {most}")
    return value


def number(fields: Mapping[str, Any], name: str, default: float, least: float, most: float) -> float:
    """Return a finite number within bounds. Raises InvalidRequest."""
    value = float(fields.get(name, default))
    if not (math.isfinite(value) and least <= value <= most):
        raise InvalidRequest(name, str(value), f"a finite number from {least:g} to {most:g}")
    return value


def images(fields: Mapping[str, Any], spec: ModelSpec, encoding: str) -> tuple[InputImage, ...]:
    """Read the headers of the input images. Raises InvalidRequest, with the image's number."""
    if "image" not in fields:
        return ()
    given: Sequence[bytes] = fields["image"]
    most = max(spec.limits.max_references, 1)
    if not 1 <= len(given) <= most:
        raise InvalidRequest("image", f"{len(given)} images", f"1 to {most} of them" if most > 1 else "one")
    found = []
    for index, data in enumerate(given):
        try:
            found.append(read_image(file(data, encoding, spec.limits), spec.limits))
        except InvalidRequest as error:
            raise numbered(error, index, len(given)) from error
    return tuple(found)


def file(data: bytes, encoding: str, limits: Limits) -> bytes:
    """The bytes of an image file, which may have come as base64 text."""
    if encoding != "base64":
        return data
    if len(data) > 4 * math.ceil(limits.max_image_bytes / 3):
        raise InvalidRequest(
            "image", f"{len(data)} bytes of base64", f"a file of at most {limits.max_image_bytes} bytes"
        )
    try:
        return binascii.a2b_base64(data, strict_mode=True)
    except binascii.Error as error:
        raise InvalidRequest("image", f"{len(data)} bytes that are not base64", "base64, as encoding says") from error


def numbered(error: InvalidRequest, index: int, count: int) -> InvalidRequest:
    """The error, with the image's number if there are several."""
    which = f" as number {index + 1} of {count}" if count > 1 else ""
    return InvalidRequest(error.field, error.got + which, error.allowed)


def size(
    fields: Mapping[str, Any], spec: ModelSpec, image: InputImage | None, natural: tuple[int, int]
) -> tuple[int, int]:
    """Return height and width; a missing one follows from the other and the image, or both are `natural`.

    Raises:
        InvalidRequest: out of the model's limits.
    """
    limits, multiple = spec.limits, spec.size_multiple
    if image is not None:
        natural = _beside(fields, natural, image, spec)
    sides = {name: int(fields.get(name, side)) for name, side in zip(("height", "width"), natural, strict=True)}
    for name in sorted(sides, key=lambda side: side not in fields):  # what was asked for first
        if not limits.min_side <= sides[name] <= limits.max_side or sides[name] % multiple:
            got = str(sides[name]) if name in fields else f"{sides[name]}, to keep the image's proportions"
            raise InvalidRequest(name, got, f"a multiple of {multiple} from {limits.min_side} to {limits.max_side}")
    height, width = sides["height"], sides["width"]
    if height * width > limits.max_pixels:
        got, allowed = f"{height} x {width}", f"at most {limits.max_pixels} pixels in all"
        raise InvalidRequest("height, width", got, allowed)
    return height, width


def _beside(fields: Mapping[str, Any], natural: tuple[int, int], image: InputImage, spec: ModelSpec) -> tuple[int, int]:
    """Height and width where one of them was asked for: the other keeps the image's proportions."""

    def proportional(side: int, own: int, other: int) -> int:
        multiple = spec.size_multiple
        return max(round(side * other / own / multiple) * multiple, spec.limits.min_side)

    if "height" in fields and "width" not in fields:
        return natural[0], proportional(int(fields["height"]), image.height, image.width)
    if "width" in fields and "height" not in fields:
        return proportional(int(fields["width"]), image.width, image.height), natural[1]
    return natural


def fit(height: int, width: int, spec: ModelSpec) -> tuple[int, int]:
    """An image's own size, scaled into the model's limits and rounded down to its multiple.

    An image smaller than the limits, or longer than they allow, is stretched to the least side.
    """
    limits, multiple = spec.limits, spec.size_multiple
    scale = min(1.0, limits.max_side / max(height, width), math.sqrt(limits.max_pixels / (height * width)))
    height, width = (int(side * scale + 1e-6) // multiple * multiple for side in (height, width))
    return max(height, limits.min_side), max(width, limits.min_side)


def _seed(fields: Mapping[str, Any], num_images: int) -> int:
    seed = int(fields.get("seed", -1))
    most = MAX_SEED - num_images + 1
    if not -1 <= seed <= most:
        raise InvalidRequest("seed", str(seed), f"-1 (draw one) or 0 to {most}")
    return secrets.randbelow(DRAWN_SEEDS) if seed == -1 else seed


def _choice(fields: Mapping[str, Any], name: str, choices: Sequence[str]) -> str:
    """One of several words, the first by default."""
    raw: bytes = fields.get(name, choices[0].encode())
    word = raw.decode("utf-8", errors="replace").lower()
    if word not in choices:
        raise InvalidRequest(name, repr(word[:40]), ", ".join(choices))
    return word
