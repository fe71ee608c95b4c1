"""What FLUX takes beside what all models do: guidance, an image to redraw, or references to draw after."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fluxserve import request
from fluxserve.errors import InvalidRequest
from fluxserve.families.flux.parts import FluxSpec
from fluxserve.media.images import InputImage
from fluxserve.request import Draft, Request
from fluxserve.spec import Limits

_NO_GUIDANCE = (0.0, 1.0)  # callers and model cards write either
_SINGLE = "it is drawn in one pass a step"


@dataclass(frozen=True, kw_only=True)
class FluxRequest(Request):
    """A request of FLUX: with a `strength` the one image is redrawn; without, images are references.

    Attributes:
        negative_prompt: what the second pass of each step reads; None: there is one pass.
        cfg_scale: of classifier-free guidance, above 1; of no meaning with one pass.
    """

    strength: float | None
    negative_prompt: str | None = None
    cfg_scale: float = 1.0


def draft(fields: Mapping[str, Any], spec: FluxSpec) -> Draft:
    """Validate everything but the images. Raises InvalidRequest; see families.base."""
    plain = {
        **request.common(fields, spec),
        "num_inference_steps": _steps(fields, spec),
        "guidance_scale": _guidance(fields, spec),
        "strength": _strength(fields, spec),
    }
    plain |= _passes(fields, spec, plain["guidance_scale"])
    if "image" not in fields:
        request.size(fields, spec, None, _natural((), spec))
    return Draft(lambda: _complete(plain, fields, spec))


def _complete(plain: Mapping[str, Any], fields: Mapping[str, Any], spec: FluxSpec) -> FluxRequest:
    images = request.images(fields, spec, plain["encoding"])
    if spec.takes_references:
        for index, image in enumerate(images):
            _check_reference(image, spec.limits, index, len(images))
    height, width = request.size(fields, spec, images[0] if images else None, _natural(images, spec))
    return FluxRequest(height=height, width=width, images=images, **plain)


def _natural(images: tuple[InputImage, ...], spec: FluxSpec) -> tuple[int, int]:
    """Return height and width where none was asked for: the first image's, or the model's default."""
    if not images:
        return spec.defaults.side, spec.defaults.side
    if spec.takes_references:
        return request.fit(*images[0].reference(spec.limits.max_reference_pixels, spec.size_multiple).size, spec)
    return request.fit(images[0].height, images[0].width, spec)


def _steps(fields: Mapping[str, Any], spec: FluxSpec) -> int:
    name, only = "num_inference_steps", spec.only_steps
    if only and int(fields.get(name, only)) != only:
        raise InvalidRequest(name, str(fields[name]), f"{only}, or nothing: {spec.name} is distilled to {only} steps")
    return request.integer(fields, name, spec.defaults.num_inference_steps, 1, spec.limits.max_inference_steps)


def _guidance(fields: Mapping[str, Any], spec: FluxSpec) -> float:
    value = float(fields.get("guidance_scale", spec.defaults.guidance_scale))
    most = spec.limits.max_guidance_scale
    if not spec.takes_guidance and value not in _NO_GUIDANCE:
        allowed = f"1, or nothing: {spec.name} is distilled to be drawn without"
        raise InvalidRequest("guidance_scale", str(value), allowed)
    if not (math.isfinite(value) and 0.0 <= value <= most):
        raise InvalidRequest("guidance_scale", str(value), f"a finite number from 0 to {most:g}")
    return value


def _passes(fields: Mapping[str, Any], spec: FluxSpec, guidance: float) -> dict[str, Any]:
    """Return what a second pass of each step is given, or nothing: there is none with a scale of 1, as in diffusers."""
    scale, field = _true_cfg_scale(fields, spec), "true_cfg_scale"
    if spec.classifier_free:
        scale, field = guidance, "guidance_scale"
    negative = fields.get("negative_prompt")
    if negative is not None:
        _check_negative(negative, field in fields or spec.classifier_free, spec)
        negative = request.text(negative, "negative_prompt", spec.limits.max_prompt_bytes, empty=True)
    if scale <= 1.0:
        return {}
    if spec.limits.max_passes < 2:
        allowed = "at most 1: its engine was built for one row, and this takes two; `fluxserve export --max-batch 2`"
        raise InvalidRequest(field, f"{scale:g}", allowed)
    if negative is None and not spec.classifier_free:
        raise InvalidRequest(field, str(scale), "1, or more beside a negative_prompt, which may be empty")
    return {"negative_prompt": negative or "", "cfg_scale": scale}


def _true_cfg_scale(fields: Mapping[str, Any], spec: FluxSpec) -> float:
    name = "true_cfg_scale"
    if name in fields and not spec.takes_true_cfg:
        why = "its guidance_scale is that scale" if spec.classifier_free else _SINGLE
        raise InvalidRequest(name, str(fields[name]), f"nothing: {spec.name} does not take it, {why}")
    return request.number(fields, name, 1.0, 1.0, spec.limits.max_guidance_scale)


def _check_negative(negative: bytes, scaled: bool, spec: FluxSpec) -> None:
    """A negative prompt is for a second pass: a model that has none, or a request without a scale, refuses it."""
    if not (spec.takes_true_cfg or spec.classifier_free):
        allowed = f"nothing: {spec.name} does not take it, {_SINGLE}"
        raise InvalidRequest("negative_prompt", request.shown(negative), allowed)
    if not scaled:
        raise InvalidRequest("negative_prompt", request.shown(negative), "only beside a true_cfg_scale, above 1")


def _strength(fields: Mapping[str, Any], spec: FluxSpec) -> float | None:
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


def _check_reference(image: InputImage, limits: Limits, index: int, count: int) -> None:
    """diffusers' bounds (Flux2ImageProcessor.check_image_input), on the size as it came."""
    short, long = sorted((image.height, image.width))
    if short < limits.min_reference_side or long > limits.max_reference_aspect * short:
        allowed = f"sides from {limits.min_reference_side}, at most {limits.max_reference_aspect} times as long as wide"
        error = InvalidRequest("image", f"an image of {image.width} x {image.height} pixels", allowed)
        raise request.numbered(error, index, count)
