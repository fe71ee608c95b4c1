"""What PixArt-Σ takes beside what all models do: a guidance scale, and above 1 a negative prompt."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fluxserve import request
from fluxserve.errors import InvalidRequest
from fluxserve.families.pixart.models import PixArtSpec
from fluxserve.request import Draft, Request

NO_GUIDANCE = 1.0
"""The scale at which the prompt's pass is drawn alone."""

_FOREIGN = ("image", "strength", "true_cfg_scale")


@dataclass(frozen=True, kw_only=True)
class PixArtRequest(Request):
    """A request of PixArt-Σ; an empty negative prompt is what the model was trained with."""

    negative_prompt: str


def draft(fields: Mapping[str, Any], spec: PixArtSpec) -> Draft:
    """Validate everything: there are no images. Raises InvalidRequest; see families.base."""
    request.refuse(fields, _FOREIGN, spec)
    usual, most = spec.defaults, spec.limits
    scale = request.number(fields, "guidance_scale", usual.guidance_scale, NO_GUIDANCE, most.max_guidance_scale)
    height, width = request.size(fields, spec, None, (usual.side, usual.side))
    whole = PixArtRequest(
        **request.common(fields, spec),
        num_inference_steps=request.integer(
            fields, "num_inference_steps", usual.num_inference_steps, 1, most.max_inference_steps
        ),
        guidance_scale=scale,
        negative_prompt=_negative(fields, spec, scale),
        height=height,
        width=width,
        images=(),
    )
    return Draft(lambda: whole)


def _negative(fields: Mapping[str, Any], spec: PixArtSpec, scale: float) -> str:
    name = "negative_prompt"
    if not fields.get(name):
        return ""
    words = request.text(fields[name], name, spec.limits.max_prompt_bytes)
    if scale == NO_GUIDANCE:
        raise InvalidRequest(name, request.shown(fields[name]), f"nothing beside a guidance_scale of {NO_GUIDANCE:g}")
    return words
