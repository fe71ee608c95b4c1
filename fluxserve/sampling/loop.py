"""The denoising loop: guidance and solver around a denoiser, which computes one step of the network."""

from collections.abc import Callable, Iterator

from torch import Tensor

from fluxserve.engine import Denoiser
from fluxserve.sampling.guidance import Guidance
from fluxserve.sampling.solvers import Solver


def denoise(
    denoiser: Denoiser,
    window: Tensor,
    prediction: Tensor,
    latents: Tensor,
    solver: Solver,
    guidance: Guidance,
    paced: Callable[[], None],
) -> Iterator[Tensor]:
    """Run all steps; yield the latents after each of them (one tensor, updated in place).

    Args:
        window: the network's input for latents, [passes · B, …].
        prediction: its output, of the same shape.
        latents: float32 [B, …]; overwritten.
        paced: called after each step was enqueued, and may wait for an earlier one.
    """
    denoiser.begin(solver.timesteps)
    for step in range(len(solver.timesteps)):
        guidance.write(window, solver.model_input(latents, step))
        denoiser.run_step(step)
        solver.step_(latents, guidance.join(prediction), step)
        paced()
        yield latents
