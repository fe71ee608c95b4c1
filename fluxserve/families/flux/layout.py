"""FLUX's jobs: what `prepare` lays out, what `generate` checks, and what their arrays are called.

ids.ENCODER     int64 [tokens]          tokens of each text encoder
mask.ENCODER    int64 [tokens]          0 at padding, of an encoder that is told
guidance        float32 [1]             distilled guidance
negative.ids.ENCODER, negative.mask.ENCODER     those of the negative prompt, for a second pass of each step
cfg_scale       float32 [1]             how the two passes are joined; there is one without
image           uint8 [height, width, 3]    what is redrawn
references.N    uint8 [h, w, 3]         what the picture is drawn after, FLUX.2
"""

from collections.abc import Mapping

import numpy as np

from fluxserve.errors import InvalidRequest
from fluxserve.families.flux.parts import FluxSpec
from fluxserve.families.flux.request import FluxRequest
from fluxserve.families.shared.layout import Kinds, check_arrays, check_ids, check_mask, check_picture
from fluxserve.job import Array, Job
from fluxserve.media.images import Pixels
from fluxserve.request import Decode, Tokenize, Tokens, numbered
from fluxserve.sampling import schedule
from fluxserve.spec import EncoderSpec

IMAGE, REFERENCES, GUIDANCE, CFG_SCALE = "image", "references", "guidance", "cfg_scale"
PROMPT, NEGATIVE = "", "negative."
"""What the names of a pass's tokens begin with."""
_RGB = 3


def ids(encoder: EncoderSpec, which: str = PROMPT) -> str:
    """Return the name of the array of an encoder's tokens in a pass."""
    return f"{which}ids.{encoder.name}"


def mask(encoder: EncoderSpec, which: str = PROMPT) -> str:
    """Return the name of the array that says which of an encoder's tokens in a pass are no padding."""
    return f"{which}mask.{encoder.name}"


def passes(job: Job) -> tuple[str, ...]:
    """Return the passes of each step, the prompt's first."""
    return (PROMPT, NEGATIVE) if CFG_SCALE in job.arrays else (PROMPT,)


def lay_out(request: FluxRequest, spec: FluxSpec, tokenize: Tokenize, decode: Decode) -> Job:
    """Lay a request out. Raises InvalidRequest: an image is damaged."""
    sigmas = schedule.sigmas(
        request.num_inference_steps, spec.image_tokens(request.height, request.width), spec.schedule
    )
    arrays = {**_tokens(tokenize(request.prompt), spec), GUIDANCE: np.array([request.guidance_scale], np.float32)}
    if request.negative_prompt is not None:
        arrays |= _tokens(tokenize(request.negative_prompt), spec, NEGATIVE)
        arrays[CFG_SCALE] = np.array([request.cfg_scale], np.float32)
    images = _decoded(request, spec, decode)
    if request.strength is not None:
        (arrays[IMAGE],) = images
        start = schedule.image_to_image_start(request.num_inference_steps, request.strength)
        sigmas = sigmas[min(start, request.num_inference_steps - 1) :]
    else:
        arrays |= {f"{REFERENCES}.{index}": image for index, image in enumerate(images)}
    return Job(request.height, request.width, request.seeds, sigmas, arrays)


def _tokens(words: Mapping[str, Tokens], spec: FluxSpec, which: str = PROMPT) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    for encoder in spec.text.encoders:
        arrays[ids(encoder, which)] = words[encoder.name].ids
        if encoder.layers:
            arrays[mask(encoder, which)] = words[encoder.name].mask
    return arrays


def _decoded(request: FluxRequest, spec: FluxSpec, decode: Decode) -> tuple[Pixels, ...]:
    """The images as the model takes them: redrawn in the request's size, or as references in one of their own."""
    decoded = []
    for index, image in enumerate(request.images):
        fit = image.resized(request.height, request.width)
        if spec.takes_references:
            fit = image.reference(spec.limits.max_reference_pixels, spec.size_multiple)
        try:
            decoded.append(decode(image.data, fit))
        except InvalidRequest as error:
            raise numbered(error, index, len(request.images)) from error
    return tuple(decoded)


def nothing(spec: FluxSpec, side: int, image: bool) -> Job:
    """Return a square job of no words and one step; see families.base."""
    scale = np.array([spec.defaults.guidance_scale], np.float32)
    words = {e.name: Tokens(np.zeros(e.tokens, np.int64), np.ones(e.tokens, np.int64)) for e in spec.text.encoders}
    arrays: dict[str, Array] = {GUIDANCE: scale, **_tokens(words, spec)}
    if spec.classifier_free:
        arrays |= {CFG_SCALE: scale, **_tokens(words, spec, NEGATIVE)}
    if image:
        name, size = (f"{REFERENCES}.0", spec.limits.min_reference_side) if spec.takes_references else (IMAGE, side)
        arrays[name] = np.zeros((size, size, _RGB), dtype=np.uint8)
    return Job(side, side, (0,), np.array([1.0, 0.0], dtype=np.float32), arrays)


def parameters(job: Job, spec: FluxSpec) -> dict[str, str]:
    """Return what files say about a job; see families.base. Guidance is as it was typed: a float32 has seven digits."""
    task = "image-to-image" if job.get(IMAGE) is not None else "text-to-image"
    task = "references" if job.numbered(REFERENCES) else task
    names = (GUIDANCE,) if spec.takes_guidance and not spec.classifier_free else ()
    return {"task": task, **{name: f"{job[name][0]:.7g}" for name in (*names, CFG_SCALE) if name in job.arrays}}


def check(job: Job, spec: FluxSpec) -> None:
    """Check what could not be drawn, or would take the GPU's context along.

    Raises:
        InvalidRequest: names the array, what came and what is allowed.
    """
    check_picture(job, spec)
    _check_sigmas(job, spec)
    needed, optional = _kinds(job, spec)
    check_arrays(job, spec, needed, optional)
    for which in passes(job):
        for encoder in spec.text.encoders:
            tokens, alike = job[ids(encoder, which)], len(job[ids(encoder)])
            check_ids(ids(encoder, which), tokens, encoder)
            if len(tokens) != alike:  # passes are rows of one batch
                raise InvalidRequest(ids(encoder, which), f"{len(tokens)} ids", f"{alike}, as many as {ids(encoder)}")
            if encoder.layers:
                check_mask(mask(encoder, which), job[mask(encoder, which)], tokens)
    _check_images(job, spec)
    for name, least in ((GUIDANCE, 0), (CFG_SCALE, 1)):
        array, most = job.get(name), spec.limits.max_guidance_scale
        if array is not None and not (len(array) == 1 and least <= array[0] <= most):
            raise InvalidRequest(name, ", ".join(map(str, array[:4])), f"one number from {least} to {most:g}")


def _check_sigmas(job: Job, spec: FluxSpec) -> None:
    most = spec.limits.max_inference_steps
    if not 0 < job.steps <= most or not ((job.sigmas >= 0) & (job.sigmas <= 1)).all():
        raise InvalidRequest("sigmas", f"{len(job.sigmas)} numbers", f"2 to {most + 1} numbers from 0 to 1")


def _kinds(job: Job, spec: FluxSpec) -> tuple[Kinds, Kinds]:
    """Arrays that a job must have, and those that it may have: dtype and rank by name."""
    if CFG_SCALE in job.arrays and not (spec.limits.max_passes > 1 and (spec.takes_true_cfg or spec.classifier_free)):
        raise InvalidRequest(CFG_SCALE, "an array", f"nothing: {spec.name} is drawn in one pass a step here")
    needed: dict[str, tuple[type, int]] = {GUIDANCE: (np.float32, 1)}
    needed |= {CFG_SCALE: (np.float32, 1)} if CFG_SCALE in job.arrays else {}
    for which in passes(job):
        for encoder in spec.text.encoders:
            needed[ids(encoder, which)] = (np.int64, 1)
            if encoder.layers:
                needed[mask(encoder, which)] = (np.int64, 1)
    optional: dict[str, tuple[type, int]] = {} if spec.takes_references else {IMAGE: (np.uint8, 3)}
    references = min(job.count(REFERENCES), spec.limits.max_references)  # numbered without gaps
    optional |= {f"{REFERENCES}.{index}": (np.uint8, 3) for index in range(references)}
    return needed, optional


def _check_images(job: Job, spec: FluxSpec) -> None:
    limits, multiple = spec.limits, spec.size_multiple
    image = job.get(IMAGE)
    if image is not None and image.shape != (job.height, job.width, _RGB):
        raise InvalidRequest(IMAGE, f"{list(image.shape)}", f"{[job.height, job.width, _RGB]}, as the picture")
    for height, width, channels in (reference.shape for reference in job.numbered(REFERENCES)):
        unfit = min(height, width) < limits.min_reference_side or height % multiple or width % multiple
        if unfit or height * width > limits.max_reference_pixels or channels != _RGB:
            allowed = f"{_RGB} channels, sides that are multiples of {multiple} from {limits.min_reference_side}"
            allowed += f", at most {limits.max_reference_pixels} pixels"
            raise InvalidRequest(REFERENCES, f"{height} x {width} x {channels}", allowed)
