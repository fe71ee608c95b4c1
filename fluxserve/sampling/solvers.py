"""Solvers: one step of an ODE or SDE from a network's prediction; coefficients and memory lie on the device.

Every coefficient depends on the schedule alone, so that it is computed before the loop, in float32 on the host and in
diffusers' order. A step is a few operations on tensors that already exist. Latents are float32 whatever the network
computes in.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

Sizes = tuple[int, ...]
Noise = Callable[[], Tensor]
"""Draws float32 noise of the latents' shape, in the order in which it is called."""


class Solver(Protocol):
    """A solver of one loop.

    Attributes:
        timesteps: float32 [steps] on the device, what the network is conditioned on at each step.
    """

    timesteps: Tensor

    def model_input(self, latents: Tensor, step: int) -> Tensor:
        """Return the network's input; may be the latents themselves."""

    def step_(self, latents: Tensor, prediction: Tensor, step: int) -> None:
        """Advance latents [B, …] in place.

        Args:
            prediction: the network's output at this step, any float dtype, of the latents' shape.
        """

    def clean(self, latents: Tensor, prediction: Tensor, step: int) -> Tensor:
        """Estimate the clean latents that the loop tends to, for a preview; changes nothing.

        Args:
            latents: as `step_` left them.
            prediction: the one that `step_` was given.
        """


class Euler:
    """Euler steps along a velocity: x += (σ' − σ) · v (FlowMatchEulerDiscreteScheduler.step)."""

    def __init__(self, sigmas: Tensor, timesteps: Tensor) -> None:
        """
        Args:
            sigmas: noise levels, float32 [steps + 1] on the device, falling to 0.
            timesteps: [steps] on the device.
        """
        self.timesteps, self._sigmas, self._differences = timesteps, sigmas, sigmas.diff()

    def model_input(self, latents: Tensor, step: int) -> Tensor:  # noqa: ARG002 (the network reads latents as they are)
        return latents

    def step_(self, latents: Tensor, prediction: Tensor, step: int) -> None:
        latents.addcmul_(prediction, self._differences[step])

    def clean(self, latents: Tensor, prediction: Tensor, step: int) -> Tensor:
        """Return x' − σ'·v, which is x − σ·v: an Euler step stays on the line to the estimate."""
        return torch.addcmul(latents, prediction, self._sigmas[step + 1], value=-1)


class DPMSolverMultistep:
    """DPM-Solver++ 2M, midpoint, for a network that predicts the noise ε (arXiv 2211.01095, algorithm 2).

    x₀ = (x − σ·ε) / α, and x' = a·x + b·x₀ + c·x₀ of the step before. The first and the last step are of first order,
    as DPMSolverMultistepScheduler has them with its final σ of zero.
    """

    def __init__(self, sigmas: Tensor, timesteps: Tensor) -> None:
        """
        Args:
            sigmas: √((1 − ᾱ) / ᾱ), float32 [steps + 1], falling to 0.
            timesteps: [steps] on the device.
        """
        self.timesteps, device = timesteps, timesteps.device
        sigmas = sigmas.cpu()
        alphas = 1 / (sigmas**2 + 1) ** 0.5
        spreads = sigmas * alphas
        decay, first, second = self._coefficients(alphas, spreads)
        self._from_latents, self._from_noise = (1 / alphas[:-1]).to(device), (-spreads / alphas)[:-1].to(device)
        self._decay, self._first, self._second = decay.to(device), first.to(device), second.to(device)
        self._clean: Tensor | None = None
        self._before: Tensor | None = None

    @staticmethod
    def _coefficients(alphas: Tensor, spreads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return a, b and c of every step, float32 [steps] each."""
        steps = len(alphas) - 1
        logs = torch.log(alphas) - torch.log(spreads)
        widths = logs.diff()
        decay = spreads[1:] / spreads[:-1]
        first = -alphas[1:] * (torch.exp(-widths) - 1)
        second = torch.zeros(steps)
        for step in range(1, steps - 1):
            half = 0.5 * first[step] * widths[step] / widths[step - 1]
            second[step] = -half
            first[step] = first[step] + half
        return decay, first, second

    def model_input(self, latents: Tensor, step: int) -> Tensor:  # noqa: ARG002 (the network reads latents as they are)
        return latents

    def step_(self, latents: Tensor, prediction: Tensor, step: int) -> None:
        if self._clean is None or self._before is None:
            self._clean, self._before = torch.empty_like(latents), torch.zeros_like(latents)
        clean, before = self._clean, self._before
        torch.mul(latents, self._from_latents[step], out=clean)
        clean.addcmul_(prediction, self._from_noise[step])
        latents.mul_(self._decay[step]).addcmul_(clean, self._first[step]).addcmul_(before, self._second[step])
        self._clean, self._before = before, clean

    def clean(self, latents: Tensor, prediction: Tensor, step: int) -> Tensor:  # noqa: ARG002 (`step_` kept it)
        """Return x₀ of the last step."""
        assert self._before is not None, "a step was taken"
        return self._before.clone()


class EulerAncestral:
    """Euler steps for a network that predicts the noise ε, with noise added anew (EulerAncestralDiscreteScheduler).

    x' = x + ε · (σ_down − σ) + σ_up · noise, σ_up² = σ'² (σ² − σ'²) / σ², σ_down² = σ'² − σ_up². The network reads
    x / √(σ² + 1). All noise is drawn before the loop, that of the last step as well, whose σ_up is 0.
    """

    def __init__(self, sigmas: Tensor, timesteps: Tensor, draw: Noise) -> None:
        """
        Args:
            sigmas: √((1 − ᾱ) / ᾱ), float32 [steps + 1], falling to 0.
            timesteps: [steps] on the device.
            draw: called once a step.
        """
        self.timesteps, device = timesteps, timesteps.device
        now, then = sigmas[:-1].cpu(), sigmas[1:].cpu()
        up = (then**2 * (now**2 - then**2) / now**2) ** 0.5
        down = (then**2 - up**2) ** 0.5
        self._differences, self._up = (down - now).to(device), up.to(device)
        self._down = down.to(device)
        self._inputs = (1 / (now**2 + 1) ** 0.5).to(device)
        self._noise: Sequence[Tensor] = [draw().to(device) for _ in range(len(now))]

    def model_input(self, latents: Tensor, step: int) -> Tensor:
        return latents * self._inputs[step]

    def step_(self, latents: Tensor, prediction: Tensor, step: int) -> None:
        latents.addcmul_(prediction, self._differences[step]).addcmul_(self._noise[step], self._up[step])

    def clean(self, latents: Tensor, prediction: Tensor, step: int) -> Tensor:
        """Return x' − σ_up·noise − σ_down·ε, which is x − σ·ε."""
        without_noise = torch.addcmul(latents, self._noise[step], self._up[step], value=-1)
        return without_noise.addcmul_(prediction, self._down[step], value=-1)
