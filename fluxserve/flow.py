"""Flow matching for FLUX: schedule, shift, Euler step, latent packing, position ids. Pure functions.

x_σ = σ·noise + (1 − σ)·x₀, and the transformer predicts the velocity noise − x₀; one Euler step from σ to σ' is
x + (σ' − σ)·v. The schedule is arithmetic in float32 on the host, in the order diffusers does it
(FlowMatchEulerDiscreteScheduler.set_timesteps, pipeline_flux.calculate_shift), so that sigmas are equal bit for bit.
Everything below is either NumPy on the host or methods of the tensors that come in: `prepare` imports it without torch.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fluxserve.spec import PATCH, ScheduleSpec

if TYPE_CHECKING:
    from torch import Tensor

FloatArray = npt.NDArray[np.float32]

_REFERENCE_TIME = 10
"""Between a picture and its first reference image, and between two of them (Flux2KleinPipeline._prepare_image_ids)."""

_LARGE = 4300
"""Image tokens above which FLUX.2's shift does not depend on the number of steps."""


def shift_mu(image_tokens: int, schedule: ScheduleSpec) -> float:
    """μ of the resolution-dependent shift: linear in the number of image tokens (pipeline_flux.calculate_shift)."""
    run = schedule.max_image_seq_len - schedule.base_image_seq_len
    slope = (schedule.max_shift - schedule.base_shift) / run
    return image_tokens * slope + (schedule.base_shift - slope * schedule.base_image_seq_len)


def empirical_mu(image_tokens: int, num_inference_steps: int) -> float:
    """μ of FLUX.2's shift, measured by its makers (pipeline_flux2.compute_empirical_mu).

    Two lines in the number of image tokens, for 10 and for 200 steps, and between them linear in the steps; a large
    picture is always on the second line. Reference images do not count.
    """
    at_200 = 0.00016927 * image_tokens + 0.45666666
    if image_tokens > _LARGE:
        return at_200
    at_10 = 8.73809524e-05 * image_tokens + 1.89833333
    slope = (at_200 - at_10) / 190.0
    return slope * num_inference_steps + (at_200 - 200.0 * slope)


@lru_cache(maxsize=256)
def sigmas(num_inference_steps: int, image_tokens: int, schedule: ScheduleSpec) -> FloatArray:
    """Noise levels from 1 down to 0, float32 [num_inference_steps + 1]; read-only: it is kept for the next call.

    Dynamic shifting: e^μ / (e^μ + 1/s − 1); static: shift·s / (1 + (shift − 1)·s); s = linspace(1, 1/n, n), or the
    schedule's base sigmas, which must be n.
    """
    n, base = num_inference_steps, schedule.base_sigmas
    assert len(base) in (0, n), "base sigmas are for so many steps as they are"
    s = np.asarray(base or np.linspace(1.0, 1.0 / n, n)).astype(np.float32)
    if schedule.use_dynamic_shifting:
        mu = empirical_mu(image_tokens, n) if schedule.empirical_shift else shift_mu(image_tokens, schedule)
        e_mu = np.float32(math.exp(mu))
        s = e_mu / (e_mu + (1 / s - 1))
    else:
        shift = np.float32(schedule.shift)
        s = shift * s / (1 + (shift - 1) * s)
    levels = np.append(s, np.float32(0.0)).astype(np.float32)
    levels.setflags(write=False)
    return levels


def image_to_image_start(num_inference_steps: int, strength: float) -> int:
    """How many steps an input image skips (FluxImg2ImgPipeline.get_timesteps)."""
    return int(max(num_inference_steps - min(num_inference_steps * strength, num_inference_steps), 0))


def timesteps(sigmas: "Tensor", schedule: ScheduleSpec, dtype: "object") -> "Tensor":
    """What the transformer is told, [..] in `dtype`: the sigma, rounded as diffusers does (σ·1000, cast, /1000)."""
    n = schedule.num_train_timesteps
    return (sigmas * n).to(dtype) / n  # type: ignore[call-overload, no-any-return]


def euler_step_(latents: "Tensor", velocity: "Tensor", dsigma: "Tensor") -> "Tensor":
    """latents += (σ' − σ)·velocity, in place.

    latents: float32 [B, S, C]; velocity: any float dtype [B, S, C]; dsigma: float32 [B, 1, 1] on the same device.
    The state stays float32 from step to step whatever the engine computes in.
    """
    return latents.addcmul_(velocity, dsigma)


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


def text_ids(tokens: int, axes: int = 3) -> FloatArray:
    """Positions of the text tokens, float32 [tokens, axes]: all at 0, but numbered along FLUX.2's fourth axis."""
    ids = np.zeros((tokens, axes), dtype=np.float32)
    ids[:, 3:] = np.arange(tokens)[:, None]
    return ids
