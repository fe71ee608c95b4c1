"""Schedules of β against diffusers' schedulers."""

import numpy as np
import pytest
from diffusers import DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler

from fluxserve.sampling import betas
from fluxserve.sampling.betas import BetaSchedule

STEPS = (1, 2, 3, 4, 7, 14, 15, 20, 100)
PIXART = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "timestep_spacing": "linspace"}
SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        (DPMSolverMultistepScheduler, PIXART),
        (DPMSolverMultistepScheduler, {**PIXART, "timestep_spacing": "trailing"}),
        (EulerAncestralDiscreteScheduler, SDXL),
    ],
)
def test_levels_are_those_of_diffusers(scheduler: type, options: dict[str, object], steps: int) -> None:
    theirs = scheduler(**options)
    theirs.set_timesteps(steps)
    schedule = BetaSchedule(**options)  # type: ignore[arg-type]
    assert betas.timesteps(steps, schedule).tolist() == theirs.timesteps.tolist()
    got = betas.sigmas(steps, schedule)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, theirs.sigmas.numpy(), rtol=2e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"beta_schedule": "squaredcos_cap_v2"},
        {"timestep_spacing": "leading"},
        {"beta_start": 0.0},
        {"beta_end": 1.0},
        {"beta_start": 0.5, "beta_end": 0.1},
        {"num_train_timesteps": 0},
    ],
)
def test_a_schedule_that_nobody_implements_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        BetaSchedule(**{**PIXART, **wrong})  # type: ignore[arg-type]
