"""PixArt-Σ's jobs: what `prepare` lays out, what `generate` checks, and what their arrays are called.

ids, mask                       int64 [300]     the prompt's tokens, and 0 at padding
negative_ids, negative_mask     int64 [300]     likewise of the negative prompt
guidance                        float32 [1]     the scale

A job without guidance has the first two alone.
"""

import numpy as np

from fluxserve.errors import InvalidRequest
from fluxserve.families.pixart.models import PixArtSpec
from fluxserve.families.pixart.request import NO_GUIDANCE, PixArtRequest
from fluxserve.families.shared.layout import check_arrays, check_ids, check_mask, check_picture
from fluxserve.job import Array, Job
from fluxserve.request import Decode, Tokenize
from fluxserve.sampling import betas

IDS, MASKS, GUIDANCE = ("ids", "negative_ids"), ("mask", "negative_mask"), "guidance"
"""Names of arrays; of tokens and masks by pass."""

_KINDS = dict.fromkeys((*IDS, *MASKS), (np.int64, 1)) | {GUIDANCE: (np.float32, 1)}
_ALONE = {name: _KINDS[name] for name in (IDS[0], MASKS[0])}


def passes(job: Job) -> int:
    """Return how many passes of the network a step of a job takes."""
    return len(IDS) if GUIDANCE in job.arrays else 1


def lay_out(request: PixArtRequest, spec: PixArtSpec, tokenize: Tokenize, decode: Decode) -> Job:  # noqa: ARG001 (no images)
    """Lay a request out."""
    guided = request.guidance_scale != NO_GUIDANCE
    arrays: dict[str, Array] = {}
    for which, prompt in enumerate((request.prompt, request.negative_prompt) if guided else (request.prompt,)):
        tokens = tokenize(_as_trained(prompt))[spec.text.sequence.name]
        arrays |= {IDS[which]: tokens.ids, MASKS[which]: tokens.mask}
    if guided:
        arrays[GUIDANCE] = np.array([request.guidance_scale], np.float32)
    levels = betas.sigmas(request.num_inference_steps, spec.schedule)
    return Job(request.height, request.width, request.seeds, levels, arrays)


def _as_trained(prompt: str) -> str:
    """Return a caption in lower case, as PixArtSigmaPipeline reads it without `clean_caption`."""
    return prompt.lower().strip()


def parameters(job: Job) -> dict[str, str]:
    """Return what files say about a job; see families.base. Guidance is as it was typed: a float32 has seven digits."""
    scale = job.get(GUIDANCE)
    return {"task": "text-to-image", **({} if scale is None else {"cfg_scale": f"{scale[0]:.7g}"})}


def check(job: Job, spec: PixArtSpec) -> None:
    """Check a job that anybody may have sent. Raises InvalidRequest, which names the array."""
    check_picture(job, spec)
    most = spec.limits.max_inference_steps
    if not 0 < job.steps <= most or not np.array_equal(job.sigmas, betas.sigmas(job.steps, spec.schedule)):
        raise InvalidRequest("sigmas", f"{len(job.sigmas)} numbers", f"those of 1 to {most} steps of {spec.name}")
    alone = not set(job.arrays) - set(_ALONE)
    check_arrays(job, spec, _ALONE if alone else _KINDS, {})
    for which in range(passes(job)):
        check_ids(IDS[which], job[IDS[which]], spec.text.sequence)
        check_mask(MASKS[which], job[MASKS[which]], job[IDS[which]])
        if len(job[IDS[which]]) != len(job[IDS[0]]):
            raise InvalidRequest(IDS[which], f"{len(job[IDS[which]])} ids", f"{len(job[IDS[0]])}, as many as ids")
    scale = float(job[GUIDANCE][0]) if not alone else NO_GUIDANCE
    if not NO_GUIDANCE <= scale <= spec.limits.max_guidance_scale:
        raise InvalidRequest(GUIDANCE, str(scale), f"{NO_GUIDANCE:g} to {spec.limits.max_guidance_scale:g}")


def nothing(spec: PixArtSpec, side: int) -> Job:
    """Return a square job of no words and one step, with guidance; see families.base."""
    tokens = spec.text.sequence.tokens
    arrays: dict[str, Array] = {name: np.zeros(tokens, np.int64) for name in IDS}
    arrays |= {name: np.ones(tokens, np.int64) for name in MASKS}
    arrays[GUIDANCE] = np.array([spec.defaults.guidance_scale], np.float32)
    return Job(side, side, (0,), betas.sigmas(1, spec.schedule), arrays)
