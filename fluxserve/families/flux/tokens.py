"""FLUX's latents as tokens, their positions, and the timesteps that the transformer reads. Pure functions.

Everything here is NumPy on the host or methods of the tensors that are given: `prepare` imports it without torch.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fluxserve.families.flux.parts import PATCH
from fluxserve.sampling.schedule import ScheduleSpec

if TYPE_CHECKING:
    from torch import Tensor

FloatArray = npt.NDArray[np.float32]

_REFERENCE_TIME = 10
"""Between a picture and its first reference image, and between two of them (Flux2KleinPipeline._prepare_image_ids)."""


def timesteps(sigmas: "Tensor", schedule: ScheduleSpec, dtype: "object") -> "Tensor":
    """What the transformer is told, [..] in `dtype`: the sigma, rounded as diffusers does (σ·1000, cast, /1000)."""
    n = schedule.num_train_timesteps
    return (sigmas * n).to(dtype) / n  # type: ignore[call-overload, no-any-return]


def blend_(clean: "Tensor", noise: "Tensor", sigma: float) -> "Tensor":
    """The start of image-to-image: σ·noise + (1 − σ)·clean, in place of `noise` [B, C, h, w]."""
    return noise.mul_(sigma).add_(clean * (1 - sigma))


def pack(latents: "Tensor", patch: int = PATCH) -> "Tensor":
    """[B, C, h, w] → [B, (h/2)(w/2), 4C]: each 2×2 square becomes a token (FluxPipeline._pack_latents).

    With `patch` 1 every place is one. FLUX.2 draws its noise so: with the channels of tokens, [B, 4C, h/2, w/2].
    """
    b, c, h, w = latents.shape
    squares = latents.reshape(b, c, h // patch, patch, w // patch, patch)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // patch) * (w // patch), c * patch * patch)


def unpack(tokens: "Tensor", height: int, width: int) -> "Tensor":
    """[B, (h/2)(w/2), 4C] → [B, C, h, w]; `height`, `width` in latent pixels. Inverse of `pack`."""
    b, _, c = tokens.shape
    squares = tokens.reshape(b, height // PATCH, width // PATCH, c // (PATCH * PATCH), PATCH, PATCH)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(b, c // (PATCH * PATCH), height, width)


def image_ids(height: int, width: int, axes: int = 3, time: int = 0) -> FloatArray:
    """Positions (time, y, x) of the image tokens, float32 [(h/2)(w/2), axes]; `height`, `width` in latent pixels.

    FLUX.2 has a fourth axis, on which all image tokens are at 0.
    """
    ids = np.zeros((height // PATCH, width // PATCH, axes), dtype=np.float32)
    ids[..., 0] = time
    ids[..., 1], ids[..., 2] = np.mgrid[0 : height // PATCH, 0 : width // PATCH]
    return ids.reshape(-1, axes)


def reference_ids(sizes: Sequence[tuple[int, int]], axes: int) -> FloatArray:
    """Positions of the tokens of reference images, one behind the other, each at a time of its own."""
    times = (_REFERENCE_TIME * (index + 1) for index in range(len(sizes)))
    ids = [image_ids(height, width, axes, time) for (height, width), time in zip(sizes, times, strict=True)]
    return np.concatenate([np.empty((0, axes), dtype=np.float32), *ids])


def joined(places: Sequence[FloatArray]) -> FloatArray:
    """Return positions of several kinds of tokens, one behind the other."""
    return np.concatenate(places)


def text_ids(tokens: int, axes: int = 3) -> FloatArray:
    """Positions of the text tokens, float32 [tokens, axes]: all at 0, but numbered along FLUX.2's fourth axis."""
    ids = np.zeros((tokens, axes), dtype=np.float32)
    ids[:, 3:] = np.arange(tokens)[:, None]
    return ids
