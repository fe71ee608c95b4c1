"""Schedules of flow matching: noise levels from 1 down to 0, as diffusers computes them.

x_σ = σ·noise + (1 − σ)·x₀. The arithmetic is float32 on the host, in diffusers' order
(FlowMatchEulerDiscreteScheduler.set_timesteps, pipeline_flux.calculate_shift), so that sigmas are equal bit for bit.
`prepare` imports this without torch.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from fluxserve.spec import Numbers

FloatArray = npt.NDArray[np.float32]

_LARGE = 4300
"""Image tokens above which FLUX.2's shift does not depend on the number of steps."""


@dataclass(frozen=True)
class ScheduleSpec(Numbers):
    """FlowMatchEulerDiscreteScheduler: a static `shift`, or one that grows with the number of image tokens.

    With `empirical_shift` the latter is Flux2Pipeline's, which depends on the number of steps as well. `base_sigmas`
    are the noise levels before the shift, one for each step, of a model that was distilled to them and to no others.
    """

    use_dynamic_shifting: bool
    shift: float = 1.0
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    num_train_timesteps: int = 1000
    empirical_shift: bool = False
    base_sigmas: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_image_seq_len <= self.base_image_seq_len:
            raise ValueError(f"max_image_seq_len: got {self.max_image_seq_len}; expected > {self.base_image_seq_len}")


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
