"""Whether the host waits for a GPU where it must not."""

import torch

from fluxserve.job import Job
from fluxserve.pipeline import Pipeline


def loop_never_waits(pipeline: Pipeline, job: Job) -> None:
    """Between the first step and the last nothing synchronises: torch raises on any call that would."""
    with torch.inference_mode():
        steps = pipeline.denoise([(job, 3, pipeline.encode(job))])
        next(steps)  # the beginning
        next(steps)
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert len(list(steps)) == job.steps - 1
        finally:
            torch.cuda.set_sync_debug_mode("default")
