"""What every comparison of a pipeline with diffusers measures: latents after each step, relative errors."""

from collections.abc import Callable

import numpy as np
import torch

from fluxserve.job import Job
from fluxserve.pipeline import Pipeline

RELATIVE = 1e-4

State = dict[str, torch.Tensor]


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def noting(seen: list[torch.Tensor]) -> Callable[[object, int, object, State], State]:
    """A callback for diffusers' pipelines that copies the latents after each step to `seen`."""

    def remember(pipe: object, step: int, timestep: object, state: State) -> State:
        seen.append(state["latents"].clone())
        return {}

    return remember


def our_steps(pipeline: Pipeline, job: Job) -> list[torch.Tensor]:
    with torch.inference_mode():
        encoded = pipeline.encode(job)
        _, *steps = [x.clone() for x in pipeline.denoise([(job, seed, encoded) for seed in job.seeds])]
        return steps


def agree(pipeline: Pipeline, job: Job, theirs: list[torch.Tensor], their_images: np.ndarray) -> None:
    """Latents after every step, and the images [n, h, w, 3] in 0..1."""
    ours = our_steps(pipeline, job)
    assert len(ours) == len(theirs) == job.steps
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert relative(a, b) < RELATIVE, f"step {step}"
    (drawing,) = pipeline.draw([job])
    assert drawing is not None
    assert np.abs(drawing.images / 255.0 - their_images).max() <= 0.5 / 255 + RELATIVE
    assert their_images.std() > 0.01, "a flat picture would prove nothing"
