"""A Request as the arrays that cross to the GPU worker: what `prepare` makes and `generate` draws."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fluxserve import flow
from fluxserve.request import Request
from fluxserve.spec import ModelSpec
from fluxserve.text import Tokenizers

TEXT_TO_IMAGE_CHANNELS = 0
RGB_CHANNELS = 3


@dataclass(frozen=True)
class Job:
    """Arrays of one request; the names and dtypes are those of contract.GENERATE.

    `pixels` [height, width, channels] has no channels, and so no bytes, when there is no input image: its shape alone
    carries the size, so that requests Triton may batch are exactly those whose shapes are equal.
    """

    clip_ids: npt.NDArray[np.int64]  # [clip_tokens]
    t5_ids: npt.NDArray[np.int64]  # [t5_tokens]
    pixels: npt.NDArray[np.uint8]  # [height, width, 0 or 3]
    sigmas: npt.NDArray[np.float32]  # [steps + 1], falling to 0
    guidance: float
    noise_seeds: tuple[int, ...]

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

    @property
    def likeness(self) -> tuple[object, ...]:
        """What two jobs must share to go through the loop together."""
        return self.pixels.shape, self.sigmas.tobytes(), len(self.clip_ids), len(self.t5_ids)


def plan(request: Request, spec: ModelSpec, tokenizers: Tokenizers) -> Job:
    """Tokenise the prompt, lay out the schedule, scale the input image."""
    ids = tokenizers(request.prompt)
    tokens = spec.image_tokens(request.height, request.width)
    sigmas = flow.sigmas(request.num_inference_steps, tokens, spec.schedule)
    if request.image is None or request.strength is None:
        pixels = np.empty((request.height, request.width, TEXT_TO_IMAGE_CHANNELS), dtype=np.uint8)
    else:
        pixels = request.image.resized(request.height, request.width)
        start = flow.image_to_image_start(request.num_inference_steps, request.strength)
        sigmas = sigmas[min(start, request.num_inference_steps - 1) :]
    return Job(ids.clip, ids.t5, pixels, sigmas, request.guidance_scale, request.seeds)
