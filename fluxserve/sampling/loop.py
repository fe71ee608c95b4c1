"""The denoising loop: guidance and solver around a denoiser, which computes one step of the network."""

from collections.abc import Callable, Iterator

from torch import Tensor

from fluxserve.engine import Denoiser
from fluxserve.sampling.guidance import Guidance
from fluxserve.sampling.solvers import Solver


class Loop:
    """All steps of a few pictures. Iterating runs them; it never waits for what a preview needs.

    Attributes:
        latents: float32 [B, …], updated in place.
        done: steps so far.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        window: Tensor,
        prediction: Tensor,
        latents: Tensor,
        solver: Solver,
        guidance: Guidance,
        paced: Callable[[], None],
    ) -> None:
        """
        Args:
            window: the network's input for latents, [passes · B, …].
            prediction: its output, of the same shape.
            latents: what the loop begins with; overwritten.
            paced: called after each step was enqueued, and may wait for an earlier one.
        """
        self.latents = latents
        self._denoiser, self._window, self._prediction = denoiser, window, prediction
        self._solver, self._guidance, self._paced = solver, guidance, paced
        self.done = 0

    def __iter__(self) -> Iterator[Tensor]:
        """Yield the latents after each step."""
        self._denoiser.begin(self._solver.timesteps)
        for step in range(len(self._solver.timesteps)):
            self._guidance.write(self._window, self._solver.model_input(self.latents, step))
            self._denoiser.run_step(step)
            self._solver.step_(self.latents, self._guidance.join(self._prediction), step)
            self.done = step + 1
            self._paced()
            yield self.latents

    def clean(self) -> Tensor:
        """Estimate the clean latents from the step that was yielded last."""
        return self._solver.clean(self.latents, self._guidance.join(self._prediction), self.done - 1)
