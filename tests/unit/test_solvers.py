"""Solvers and guidance against diffusers' schedulers, after every step."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from fluxserve.sampling.guidance import ClassifierFree, OnePass
from fluxserve.sampling.loop import Loop
from fluxserve.sampling.solvers import DPMSolverMultistep, Euler, EulerAncestral, Solver

SHAPE = (2, 4, 6, 5)
STEPS = (1, 2, 3, 14, 15, 20)
VP = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}


def network(x: Tensor, timestep: float) -> Tensor:
    """Stand in for a network: not linear, and different at every timestep."""
    return torch.sin(1.3 * x + timestep / 300) + 0.1 * x


class Counted:
    """A denoiser over `network`, which remembers how it was used."""

    def __init__(self, window: Tensor, prediction: Tensor) -> None:
        self._window, self._prediction, self.steps = window, prediction, list[int]()

    def begin(self, timesteps: Tensor) -> None:
        self._timesteps = timesteps

    def run_step(self, step: int) -> None:
        self.steps.append(step)
        self._prediction.copy_(network(self._window, float(self._timesteps[step])))


def latents() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


def ours(solver: Solver, x: Tensor) -> list[Tensor]:
    window, prediction = torch.empty(SHAPE), torch.empty(SHAPE)
    denoiser, paced = Counted(window, prediction), list[None]()
    loop = Loop(denoiser, window, prediction, x, solver, OnePass(), lambda: paced.append(None))
    steps = []
    for x in loop:
        steps.append(x.clone())
        loop.clean()
        assert torch.equal(x, steps[-1]), "a look changes nothing"
    assert denoiser.steps == list(range(len(solver.timesteps)))
    assert len(paced) == len(steps)
    return steps


def theirs(scheduler: object, x: Tensor, **options: object) -> list[Tensor]:
    steps = []
    for t in scheduler.timesteps:  # type: ignore[attr-defined]
        read = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(read, float(t)), t, x, **options).prev_sample  # type: ignore[attr-defined]
        steps.append(x.clone())
    return steps


def alike(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    for step, (one, other) in enumerate(zip(got, expected, strict=True)):
        assert torch.isfinite(one).all()
        assert (one - other).norm() <= 2e-6 * other.norm(), f"step {step}"


@pytest.mark.parametrize("steps", STEPS)
def test_euler(steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device="cpu")
    alike(ours(Euler(scheduler.sigmas, scheduler.timesteps), latents()), theirs(scheduler, latents()))


@pytest.mark.parametrize("steps", STEPS)
def test_dpm_solver(steps: int) -> None:
    """Set up as PixArt-Σ's folder says it."""
    scheduler = DPMSolverMultistepScheduler(**VP)
    scheduler.set_timesteps(steps)
    solver = DPMSolverMultistep(scheduler.sigmas, scheduler.timesteps)
    alike(ours(solver, latents()), theirs(scheduler, latents()))


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9])
def test_euler_ancestral(steps: int) -> None:
    """Set up as SDXL-Turbo's folder says it; noise in diffusers' order."""
    options = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = EulerAncestralDiscreteScheduler(timestep_spacing="trailing", **options)
    scheduler.set_timesteps(steps)
    first, second = (torch.Generator().manual_seed(7) for _ in range(2))
    solver = EulerAncestral(scheduler.sigmas, scheduler.timesteps, drawing(first))
    x = latents() * scheduler.init_noise_sigma
    alike(ours(solver, x.clone()), theirs(scheduler, x, generator=second))


def drawing(generator: torch.Generator) -> Callable[[], Tensor]:
    return lambda: torch.randn(SHAPE, generator=generator)


@pytest.mark.parametrize("kind", ["euler", "dpm", "ancestral"])
def test_the_clean_latents_are_found_from_each_step(kind: str) -> None:
    """A network that is right about the noise: the estimate is the clean latents, whatever the step."""
    levels, timesteps = torch.tensor([9.0, 3.0, 1.0, 0.2, 0.0]), torch.arange(4.0)
    clean, noise = latents(), torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
    generator, prediction = torch.Generator().manual_seed(6), torch.empty(SHAPE)
    solver: Solver
    if kind == "euler":
        levels = levels / 9
        solver, x = Euler(levels, timesteps), noise.clone()
        right = lambda x, sigma: (x - clean) / sigma  # noqa: E731
    elif kind == "dpm":
        solver = DPMSolverMultistep(levels, timesteps)
        x = (clean + 9 * noise) / 82**0.5
        right = lambda x, sigma: (x * (sigma**2 + 1) ** 0.5 - clean) / sigma  # noqa: E731
    else:
        solver, x = EulerAncestral(levels, timesteps, drawing(generator)), clean + 9 * noise
        right = lambda x, sigma: (x - clean) / sigma  # noqa: E731
    for step in range(4):
        prediction.copy_(right(x, levels[step]))
        solver.step_(x, prediction, step)
        assert torch.allclose(solver.clean(x, prediction, step), clean, atol=2e-4), f"step {step}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_is_float32(dtype: torch.dtype) -> None:
    """A small step along a velocity in BF16 would vanish in a state that is BF16 as well."""
    x = torch.ones(SHAPE)
    solver = Euler(torch.tensor([1.0, 0.999, 0.0]), torch.tensor([1000.0, 999.0]))
    solver.step_(x, torch.ones(SHAPE, dtype=dtype), 0)
    assert x.unique().item() == pytest.approx(0.999, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scales", [(0.0, 1.0), (1.0, 4.5)])
def test_classifier_free_guidance(scales: tuple[float, float], dtype: torch.dtype) -> None:
    """Each row has a scale of its own; one of 1 is the prompt alone."""
    guidance, x = ClassifierFree(torch.tensor(scales)), latents()
    scale = torch.tensor(scales, dtype=torch.float64)[:, None, None, None]
    window = torch.empty(2 * SHAPE[0], *SHAPE[1:], dtype=dtype)
    guidance.write(window, x)
    assert torch.equal(window, torch.cat([x, x]).to(dtype))
    prediction = torch.randn(window.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    prompt, negative = prediction.double().chunk(2)
    for _ in range(2):  # the buffer of the first call is used again
        joined = guidance.join(prediction)
        assert joined.dtype == torch.float32
        assert torch.allclose(joined.double(), negative + scale * (prompt - negative), atol=2e-6)
        assert torch.equal(joined[scales.index(1.0)].double(), prompt[scales.index(1.0)])
