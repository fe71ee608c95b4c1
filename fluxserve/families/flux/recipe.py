"""How FLUX draws: what its text encoders, transformer and VAE are given. Latents are packed as tokens in the loop."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fluxserve.families.base import Draw, Inputs, Recipe, Send
from fluxserve.families.flux import layout, tokens
from fluxserve.families.flux.parts import PATCH, FluxSpec
from fluxserve.job import Array, Arrays, Job
from fluxserve.sampling.guidance import ClassifierFree, Guidance, OnePass
from fluxserve.sampling.solvers import Euler, Solver


class FluxRecipe:
    """The family's half with torch."""

    latents = "hidden_states"
    prediction = "velocity"

    def prompts(self, job: Job, spec: FluxSpec) -> Sequence[Mapping[str, Arrays]]:
        return [_read(job, spec, which) for which in layout.passes(job)]

    def images(self, job: Job) -> Sequence[Array]:
        image = job.get(layout.IMAGE)
        return job.numbered(layout.REFERENCES) if image is None else [image]

    def start(self, job: Job, spec: FluxSpec, draw: Draw, images: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Return noise, or noise mixed with the input image, float32 [1, image_tokens, C].

        The generator's order is diffusers': with an input image it first draws the sample of the VAE's posterior.
        FLUX.2's noise is drawn with the channels of tokens.
        """
        height, width = spec.latent_size(job.height, job.width)
        if spec.transformer.generation == 2:
            return tokens.pack(draw((1, spec.transformer.in_channels, height // PATCH, width // PATCH)), patch=1)
        shape = (1, spec.vae.latent_channels, height, width)
        if layout.IMAGE not in job.arrays:
            return tokens.pack(draw(shape))
        ((mean, std),) = images
        clean = _scaled(mean + std * draw(shape), spec)
        return tokens.pack(tokens.blend_(clean, draw(shape), float(job.sigmas[0])))

    def inputs(
        self,
        job: Job,
        spec: FluxSpec,
        states: Mapping[str, Tensor],
        images: Sequence[tuple[Tensor, Tensor]],
        send: Send,
        which: int,  # noqa: ARG002 (passes differ in their states alone)
    ) -> Inputs:
        axes, size = len(spec.transformer.axes_dims_rope), spec.latent_size(job.height, job.width)
        references = job.numbered(layout.REFERENCES)
        places = [tokens.image_ids(*size, axes)]
        places += [tokens.reference_ids([spec.latent_size(*image.shape[:2]) for image in references], axes)]
        fixed = {
            "encoder_hidden_states": states["sequence"],
            "guidance": send(job[layout.GUIDANCE]),
            "img_ids": send(tokens.joined(places)),
            "txt_ids": send(tokens.text_ids(states["sequence"].shape[1], axes)),
        }
        if "pooled" in states:
            fixed["pooled_projections"] = states["pooled"]
        if not references:
            return Inputs(fixed)
        return Inputs(fixed, torch.cat([tokens.pack(_scaled(mean, spec)) for mean, _ in images], dim=1))

    def solver(self, job: Job, spec: FluxSpec, dtype: torch.dtype, send: Send, draw: Callable[[], Tensor]) -> Solver:  # noqa: ARG002 (an ODE: nothing is drawn)
        levels = send(job.sigmas)
        return Euler(levels, tokens.timesteps(levels[:-1], spec.schedule, dtype))

    def guidance(self, jobs: Sequence[Job], send: Send) -> Guidance:
        """Return how passes are joined; distilled guidance is one of the network's inputs."""
        if len(layout.passes(jobs[0])) == 1:
            return OnePass()
        return ClassifierFree(send(np.concatenate([job[layout.CFG_SCALE] for job in jobs])))

    def decoded(self, latents: Tensor, job: Job, spec: FluxSpec) -> Tensor:
        z = tokens.unpack(latents, *spec.latent_size(job.height, job.width))
        return z / spec.vae.scaling_factor + spec.vae.shift_factor


def _read(job: Job, spec: FluxSpec, which: str) -> Mapping[str, Arrays]:
    """Return what the text encoders read for one pass."""
    read: dict[str, Arrays] = {}
    for encoder in spec.text.encoders:
        read[encoder.name] = {"input_ids": job[layout.ids(encoder, which)]}
        if encoder.layers:
            read[encoder.name] = {**read[encoder.name], "attention_mask": job[layout.mask(encoder, which)]}
    return read


def _scaled(latents: Tensor, spec: FluxSpec) -> Tensor:
    """The VAE's latents as the loop has them."""
    return (latents - spec.vae.shift_factor) * spec.vae.scaling_factor


RECIPE: Recipe[FluxSpec] = FluxRecipe()
