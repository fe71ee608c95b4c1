"""User input → a validated, frozen Request. No tensors here; every refusal names field, value and range."""

import binascii
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fluxserve.contract import ENCODINGS, OUTPUT_FORMATS
from fluxserve.errors import InvalidRequest
from fluxserve.media.images import InputImage, read_image
from fluxserve.spec import Limits, ModelSpec

DRAWN_SEEDS = 2**32
"""A seed that is drawn is below this: short enough to read out and to type again."""

MAX_SEED = 2**63 - 1
DEFAULT_QUALITY = 90
_NO_GUIDANCE = (0.0, 1.0)  # callers and model cards write either


@dataclass(frozen=True)
class Request:
    """One request with nothing left to default. Sizes in pixels; of `images` the headers were read.

    With a `strength` the one image is what the picture is redrawn from; without, images are references.
    """

    prompt: str
    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    num_images: int
    images: tuple[InputImage, ...]
    strength: float | None
    output_format: str
    quality: int
    encoding: str

    @property
    def seeds(self) -> tuple[int, ...]:
        """Image k is drawn from seed + k."""
        return tuple(self.seed + k for k in range(self.num_images))


@dataclass(frozen=True)
class Draft:
    """A request whose plain fields are right, and whose images nobody has looked at yet."""

    plain: Mapping[str, Any]
    fields: Mapping[str, Any]
    spec: ModelSpec

    def complete(self) -> Request:
        """Read the headers of the images, and settle the size, which may follow from them. Raises InvalidRequest."""
        raw, encoding = self.fields.get("image"), self.plain["encoding"]
        images = () if raw is None else _images(raw, self.spec, encoding)
        height, width = _size(self.fields, self.spec, images)
        return Request(height=height, width=width, images=images, **self.plain)


def draft(fields: Mapping[str, Any], spec: ModelSpec) -> Draft:
    """Validate all fields that cost nothing to look at: every one but the images. See `parse`."""
    limits = spec.limits
    num_images = _integer(fields, "num_images", 1, 1, limits.max_images)
    plain: dict[str, Any] = {
        "prompt": _prompt(fields.get("prompt"), limits.max_prompt_bytes),
        "num_inference_steps": _steps(fields, spec),
        "guidance_scale": _guidance(fields, spec),
        "seed": _seed(fields, num_images),
        "num_images": num_images,
        "strength": _strength(fields, spec),
        "output_format": _choice(fields, "output_format", OUTPUT_FORMATS),
        "quality": _integer(fields, "quality", DEFAULT_QUALITY, 1, 100),
        "encoding": _choice(fields, "encoding", ENCODINGS),
    }
    if "image" not in fields:
        _size(fields, spec, ())
    return Draft(plain, fields, spec)


def parse(fields: Mapping[str, Any], spec: ModelSpec) -> Request:
    """Validate the fields of one request against a model.

    Args:
        fields: by contract name: bytes for BYTES inputs, a sequence of them for `image`, int and float for the rest;
            absent ones get their default.
        spec: the model that will draw it.

    Raises:
        InvalidRequest: names the field, what came and what is allowed.
    """
    return draft(fields, spec).complete()


def _prompt(raw: bytes | None, most: int) -> str:
    allowed = f"1 to {most} bytes of UTF-8 text"
    if raw is None:
        raise InvalidRequest("prompt", "nothing", allowed)
    if len(raw) > most:
        raise InvalidRequest("prompt", f"{len(raw)} bytes", allowed)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequest("prompt", f"bytes that are not UTF-8 (at byte {error.start})", allowed) from error
    if not text.strip():
        raise InvalidRequest("prompt", "no text" if text else "0 bytes", allowed)
    if "\x00" in text:
        raise InvalidRequest("prompt", "a NUL character", allowed)
    return text


def _integer(fields: Mapping[str, Any], name: str, default: int, least: int, most: int) -> int:
    value = int(fields.get(name, default))
    if not least <= value <= most:
        raise InvalidRequest(name, str(value), f"{least} to {most}")
    return value


def _steps(fields: Mapping[str, Any], spec: ModelSpec) -> int:
    name, only = "num_inference_steps", spec.only_steps
    if only and int(fields.get(name, only)) != only:
        raise InvalidRequest(name, str(fields[name]), f"{only}, or nothing: {spec.name} is distilled to {only} steps")
    return _integer(fields, name, spec.defaults.num_inference_steps, 1, spec.limits.max_inference_steps)


def _images(given: Sequence[bytes], spec: ModelSpec, encoding: str) -> tuple[InputImage, ...]:
    """The input images; those of a model that takes references must be fit to be one."""
    most = max(spec.limits.max_references, 1)
    if not 1 <= len(given) <= most:
        allowed = f"1 to {most} of them" if most > 1 else "one"
        raise InvalidRequest("image", f"{len(given)} images", allowed)
    images = []
    for index, data in enumerate(given):
        try:
            image = read_image(_file(data, encoding, spec.limits), spec.limits)
            if spec.takes_references:
                _check_reference(image, spec.limits)
        except InvalidRequest as error:
            raise numbered(error, index, len(given)) from error
        images.append(image)
    return tuple(images)


def _file(data: bytes, encoding: str, limits: Limits) -> bytes:
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


def _check_reference(image: InputImage, limits: Limits) -> None:
    """diffusers' bounds (Flux2ImageProcessor.check_image_input), on the size as it came."""
    short, long = sorted((image.height, image.width))
    if short < limits.min_reference_side or long > limits.max_reference_aspect * short:
        allowed = f"sides from {limits.min_reference_side}, at most {limits.max_reference_aspect} times as long as wide"
        raise InvalidRequest("image", f"an image of {image.width} x {image.height} pixels", allowed)


def _size(fields: Mapping[str, Any], spec: ModelSpec, images: Sequence[InputImage]) -> tuple[int, int]:
    """Height and width; what is missing comes from the first image, or else from the model's default."""
    limits, multiple = spec.limits, spec.size_multiple
    natural = (spec.defaults.side, spec.defaults.side)
    if images and spec.takes_references:
        natural = _fit(*images[0].reference(limits.max_reference_pixels, multiple).size, spec)
    elif images:
        natural = _fit(images[0].height, images[0].width, spec)
    if images:
        natural = _beside(fields, natural, images[0], spec)
    size = {name: int(fields.get(name, side)) for name, side in zip(("height", "width"), natural, strict=True)}
    for name in sorted(size, key=lambda side: side not in fields):  # what was asked for first
        if not limits.min_side <= size[name] <= limits.max_side or size[name] % multiple:
            got = str(size[name]) if name in fields else f"{size[name]}, to keep the image's proportions"
            raise InvalidRequest(name, got, f"a multiple of {multiple} from {limits.min_side} to {limits.max_side}")
    height, width = size["height"], size["width"]
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


def _fit(height: int, width: int, spec: ModelSpec) -> tuple[int, int]:
    """An image's own size, scaled into the model's limits and rounded down to its multiple.

    An image smaller than the limits, or longer than they allow, is stretched to the least side.
    """
    limits, multiple = spec.limits, spec.size_multiple
    scale = min(1.0, limits.max_side / max(height, width), math.sqrt(limits.max_pixels / (height * width)))
    height, width = (int(side * scale + 1e-6) // multiple * multiple for side in (height, width))
    return max(height, limits.min_side), max(width, limits.min_side)


def _guidance(fields: Mapping[str, Any], spec: ModelSpec) -> float:
    value = float(fields.get("guidance_scale", spec.defaults.guidance_scale))
    most = spec.limits.max_guidance_scale
    if not spec.takes_guidance and value not in _NO_GUIDANCE:
        allowed = f"1, or nothing: {spec.name} is distilled to be drawn without"
        raise InvalidRequest("guidance_scale", str(value), allowed)
    if not (math.isfinite(value) and 0.0 <= value <= most):
        raise InvalidRequest("guidance_scale", str(value), f"a finite number from 0 to {most:g}")
    return value


def _seed(fields: Mapping[str, Any], num_images: int) -> int:
    seed = int(fields.get("seed", -1))
    most = MAX_SEED - num_images + 1
    if not -1 <= seed <= most:
        raise InvalidRequest("seed", str(seed), f"-1 (draw one) or 0 to {most}")
    return secrets.randbelow(DRAWN_SEEDS) if seed == -1 else seed


def _strength(fields: Mapping[str, Any], spec: ModelSpec) -> float | None:
    if spec.takes_references:
        if "strength" in fields:
            allowed = f"nothing: {spec.name} draws after its images and redraws none of them"
            raise InvalidRequest("strength", str(fields["strength"]), allowed)
        return None
    if "image" not in fields:
        if "strength" in fields:
            raise InvalidRequest("strength", str(fields["strength"]), "only beside an image")
        return None
    value = float(fields.get("strength", spec.defaults.strength))
    if not (math.isfinite(value) and 0.0 < value <= 1.0):
        raise InvalidRequest("strength", str(value), "0 < strength <= 1")
    return value


def _choice(fields: Mapping[str, Any], name: str, choices: Sequence[str]) -> str:
    """One of several words, the first by default."""
    raw: bytes = fields.get(name, choices[0].encode())
    word = raw.decode("utf-8", errors="replace").lower()
    if word not in choices:
        raise InvalidRequest(name, repr(word[:40]), ", ".join(choices))
    return word
