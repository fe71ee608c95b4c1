"""A Request as the arrays that cross to the GPU worker: what `prepare` makes and `generate` draws."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fluxserve.errors import InvalidRequest
from fluxserve.media import images as imaging
from fluxserve.media.images import Fit, Pixels
from fluxserve.request import Request, numbered
from fluxserve.sampling import schedule
from fluxserve.spec import ModelSpec
from fluxserve.text import Tokenizers

Decode = Callable[[bytes, Fit], Pixels]

TEXT_TO_IMAGE_CHANNELS = 0
RGB_CHANNELS = 3

Ids = npt.NDArray[np.int64]
Sizes = npt.NDArray[np.int32]


def _no_ids() -> Ids:
    return np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Job:
    """Arrays of one request; the names and dtypes are those of contract.GENERATE.

    `pixels` [height, width, channels] has no channels, and so no bytes, when there is no input image: its shape alone
    carries the size, so that requests Triton may batch are exactly those whose shapes are equal.
    """

    token_ids: Ids  # [tokens] of the first text encoder
    token_ids_2: Ids  # [tokens] of the second; [0] where there is none
    pixels: npt.NDArray[np.uint8]  # [height, width, 0 or 3]
    sigmas: npt.NDArray[np.float32]  # [steps + 1], falling to 0
    guidance: float
    noise_seeds: tuple[int, ...]
    token_mask: Ids = field(default_factory=_no_ids)  # [tokens] of the first, 0 at padding; [0] if it is not told
    references: tuple[Pixels, ...] = ()  # [height, width, 3] each

    @property
    def ids(self) -> tuple[Ids, Ids]:
        """Of the text encoders, in the spec's order."""
        return self.token_ids, self.token_ids_2

    @property
    def height(self) -> int:
        return self.pixels.shape[0]

    @property
    def width(self) -> int:
        return self.pixels.shape[1]

    @property
    def is_image_to_image(self) -> bool:
        return self.pixels.shape[2] == RGB_CHANNELS

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def check(self, spec: ModelSpec) -> None:
        """For who builds a job past `plan`: what could not be drawn, or would take the GPU's context along.

        Raises:
            InvalidRequest: names the array, what came and what is allowed.
        """
        limits, multiple = spec.limits, spec.size_multiple
        for side in self.pixels.shape[:2]:
            if not limits.min_side <= side <= limits.max_side or side % multiple:
                allowed = f"sides that are multiples of {multiple} from {limits.min_side} to {limits.max_side}"
                raise InvalidRequest("pixels", f"{self.height} x {self.width}", allowed)
        channels = (TEXT_TO_IMAGE_CHANNELS, RGB_CHANNELS)[: 1 if spec.takes_references else 2]
        if self.height * self.width > limits.max_pixels or self.pixels.shape[2] not in channels:
            allowed = f"at most {limits.max_pixels} pixels of {' or '.join(map(str, channels))} channels"
            raise InvalidRequest("pixels", " x ".join(map(str, self.pixels.shape)), allowed)
        self._check_tokens(spec)
        self._check_references(spec)
        if not 0 < self.steps <= limits.max_inference_steps or not ((self.sigmas >= 0) & (self.sigmas <= 1)).all():
            allowed = f"2 to {limits.max_inference_steps + 1} numbers from 0 to 1"
            raise InvalidRequest("sigmas", f"{len(self.sigmas)} numbers", allowed)
        if not 0 <= self.guidance <= limits.max_guidance_scale:
            raise InvalidRequest("guidance", str(self.guidance), f"0 to {limits.max_guidance_scale:g}")
        if not 0 < len(self.noise_seeds) <= limits.max_images or min(self.noise_seeds) < 0:
            allowed = f"1 to {limits.max_images}, none negative"
            raise InvalidRequest("noise_seeds", f"{len(self.noise_seeds)} seeds", allowed)

    def _check_tokens(self, spec: ModelSpec) -> None:
        for name, ids, encoder in zip(("token_ids", "token_ids_2"), self.ids, spec.text.encoders, strict=False):
            most, known = encoder.tokens, encoder.vocabulary
            if not 0 < len(ids) <= most or ids.min() < 0 or ids.max() >= known:
                raise InvalidRequest(name, f"{len(ids)} ids", f"1 to {most} ids from 0 to {known - 1}")
        mask = self.token_mask
        told = len(self.token_ids) if spec.text.encoders[0].layers else 0
        if len(mask) != told or (told and (not mask.any() or not np.isin(mask, (0, 1)).all())):
            raise InvalidRequest("token_mask", f"{len(mask)} numbers", f"{told} numbers, 0 or 1, not all of them 0")

    def _check_references(self, spec: ModelSpec) -> None:
        limits, multiple = spec.limits, spec.size_multiple
        if len(self.references) > limits.max_references:
            raise InvalidRequest("references", f"{len(self.references)}", f"at most {limits.max_references}")
        for height, width, _ in (reference.shape for reference in self.references):
            unfit = min(height, width) < limits.min_reference_side or height % multiple or width % multiple
            if unfit or height * width > limits.max_reference_pixels:
                allowed = f"sides that are multiples of {multiple} from {limits.min_reference_side}"
                allowed += f", at most {limits.max_reference_pixels} pixels"
                raise InvalidRequest("references", f"{height} x {width}", allowed)

    @property
    def likeness(self) -> tuple[object, ...]:
        """What two jobs must share to go through the loop together."""
        sizes = tuple(reference.shape for reference in self.references)
        return self.pixels.shape, self.sigmas.tobytes(), len(self.token_ids), len(self.token_ids_2), sizes


def join(references: Sequence[Pixels]) -> tuple[Pixels, Sizes]:
    """References as two arrays: all their bytes, one behind the other, and their heights and widths [n, 2]."""
    sizes = np.array([reference.shape[:2] for reference in references], dtype=np.int32).reshape(-1, 2)
    return np.concatenate([np.empty(0, np.uint8), *(reference.ravel() for reference in references)]), sizes


def split(pixels: Pixels, sizes: Sizes) -> tuple[Pixels, ...]:
    """Inverse of `join`.

    Raises:
        InvalidRequest: the bytes are not those of images of these sizes.
    """
    shapes = [(int(height), int(width), RGB_CHANNELS) for height, width in sizes]
    lengths = [height * width * channels for height, width, channels in shapes]
    if any(min(shape) <= 0 for shape in shapes) or sum(lengths) != pixels.size:
        allowed = f"{sum(lengths)} bytes, of {len(shapes)} images of the sizes that came with them"
        raise InvalidRequest("references", f"{pixels.size} bytes", allowed)
    parts = np.split(pixels, np.cumsum(lengths)[:-1]) if shapes else []
    return tuple(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))


def plan(request: Request, spec: ModelSpec, tokenizers: Tokenizers, decode: Decode = imaging.decode) -> Job:
    """Tokenise the prompt, lay out the schedule, decode the input image or the references.

    Args:
        decode: imaging.decode, or what runs it elsewhere.

    Raises:
        InvalidRequest: an image is damaged.
    """
    words = tokenizers(request.prompt)
    tokens = [words[encoder.name] for encoder in spec.text.encoders]
    image_tokens = spec.image_tokens(request.height, request.width)
    sigmas = schedule.sigmas(request.num_inference_steps, image_tokens, spec.schedule)
    pixels = np.empty((request.height, request.width, TEXT_TO_IMAGE_CHANNELS), dtype=np.uint8)
    images = _decoded(request, spec, decode)
    if request.strength is not None:
        (pixels,) = images
        start = schedule.image_to_image_start(request.num_inference_steps, request.strength)
        sigmas = sigmas[min(start, request.num_inference_steps - 1) :]
    return Job(
        token_ids=tokens[0].ids,
        token_ids_2=tokens[1].ids if len(tokens) > 1 else _no_ids(),
        pixels=pixels,
        sigmas=sigmas,
        guidance=request.guidance_scale,
        noise_seeds=request.seeds,
        token_mask=tokens[0].mask if spec.text.encoders[0].layers else _no_ids(),
        references=images if spec.takes_references else (),
    )


def _decoded(request: Request, spec: ModelSpec, decode: Decode) -> tuple[Pixels, ...]:
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
