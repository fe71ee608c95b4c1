"""Schedules of denoising diffusion: timesteps and noise levels of a network that was trained to predict the noise.

x_t = √ᾱ·x₀ + √(1 − ᾱ)·noise, with ᾱ the product of 1 − β up to t. A solver reads σ = √((1 − ᾱ) / ᾱ). Arithmetic is on
the host, in diffusers' order and precision. `prepare` imports this without torch.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from fluxserve.spec import Numbers

BETAS = ("linear", "scaled_linear")
SPACINGS = ("linspace", "trailing")


@dataclass(frozen=True)
class BetaSchedule(Numbers):
    """β of every training step, and which of the steps are drawn.

    Attributes:
        beta_schedule: one of BETAS; scaled_linear is linear in √β.
        timestep_spacing: one of SPACINGS; trailing begins at the last training step, whatever the number of steps.
    """

    beta_start: float
    beta_end: float
    beta_schedule: str
    timestep_spacing: str
    num_train_timesteps: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("beta_schedule", BETAS), ("timestep_spacing", SPACINGS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: got {getattr(self, name)!r}; expected {' or '.join(known)}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"beta_start, beta_end: got {self.beta_start}, {self.beta_end}; expected 0 < start <= end < 1"
            )


def timesteps(num_inference_steps: int, schedule: BetaSchedule) -> npt.NDArray[np.int64]:
    """Return the training steps that are drawn, int64 [num_inference_steps], falling."""
    n, last = num_inference_steps, schedule.num_train_timesteps
    if schedule.timestep_spacing == "trailing":
        return np.arange(last, 0, -last / n).round().astype(np.int64) - 1
    return np.linspace(0, last - 1, n + 1).round()[:0:-1].astype(np.int64)


@lru_cache(maxsize=256)
def sigmas(num_inference_steps: int, schedule: BetaSchedule) -> npt.NDArray[np.float32]:
    """Return σ of every step and a last one of 0, float32 [num_inference_steps + 1]; read-only: it is cached."""
    levels = np.append(_levels(schedule)[timesteps(num_inference_steps, schedule)], np.float32(0.0))
    levels.setflags(write=False)
    return levels


@lru_cache(maxsize=16)
def _levels(schedule: BetaSchedule) -> npt.NDArray[np.float32]:
    """σ of every training step. 1 − β is rounded to float32, as diffusers has it: near t = 0 that shows in σ."""
    power = 0.5 if schedule.beta_schedule == "scaled_linear" else 1.0
    ends = schedule.beta_start**power, schedule.beta_end**power
    betas = np.linspace(*ends, schedule.num_train_timesteps).astype(np.float32) ** np.float32(1 / power)
    products = np.cumprod((np.float32(1.0) - betas).astype(np.float64)).astype(np.float32)
    levels: npt.NDArray[np.float32] = np.sqrt((np.float32(1.0) - products) / products)
    return levels
