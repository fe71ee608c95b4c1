"""How PixArt-Σ draws: what T5, transformer and VAE are given. Latents keep their two sides in the loop."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fluxserve.families.base import Draw, Inputs, Recipe, Send
from fluxserve.families.pixart import layout
from fluxserve.families.pixart.models import PixArtSpec
from fluxserve.job import Array, Arrays, Job
from fluxserve.sampling import betas
from fluxserve.sampling.guidance import ClassifierFree, Guidance, OnePass
from fluxserve.sampling.solvers import DPMSolverMultistep, Solver


class PixArtRecipe:
    """The family's half with torch."""

    latents = "hidden_states"
    prediction = "noise"

    def prompts(self, job: Job, spec: PixArtSpec) -> Sequence[Mapping[str, Arrays]]:
        name = spec.text.sequence.name
        return [
            {name: {"input_ids": job[layout.IDS[which]], "attention_mask": job[layout.MASKS[which]]}}
            for which in range(layout.passes(job))
        ]

    def images(self, job: Job) -> Sequence[Array]:  # noqa: ARG002 (none is taken)
        return ()

    def start(self, job: Job, spec: PixArtSpec, draw: Draw, images: Sequence[tuple[Tensor, Tensor]]) -> Tensor:  # noqa: ARG002 (there are none)
        return draw(spec.latent_shape(job.height, job.width))

    def inputs(
        self,
        job: Job,
        spec: PixArtSpec,  # noqa: ARG002 (nothing follows from it)
        states: Mapping[str, Tensor],
        images: Sequence[tuple[Tensor, Tensor]],  # noqa: ARG002 (there are none)
        send: Send,
        which: int,
    ) -> Inputs:
        mask = send(job[layout.MASKS[which]])[None]
        return Inputs({"encoder_hidden_states": states["sequence"], "encoder_attention_mask": mask})

    def solver(
        self,
        job: Job,
        spec: PixArtSpec,
        dtype: torch.dtype,
        send: Send,
        draw: Callable[[], Tensor],  # noqa: ARG002 (an ODE: nothing is drawn)
    ) -> Solver:
        steps = send(betas.timesteps(job.steps, spec.schedule)).to(dtype)
        return DPMSolverMultistep(torch.tensor(job.sigmas), steps)

    def guidance(self, jobs: Sequence[Job], send: Send) -> Guidance:
        if layout.passes(jobs[0]) == 1:
            return OnePass()
        return ClassifierFree(send(np.concatenate([job[layout.GUIDANCE] for job in jobs])))

    def decoded(self, latents: Tensor, job: Job, spec: PixArtSpec) -> Tensor:  # noqa: ARG002 (of any size)
        return latents / spec.vae.scaling_factor


RECIPE: Recipe[PixArtSpec] = PixArtRecipe()
