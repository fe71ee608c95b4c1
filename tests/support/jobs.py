"""Requests and jobs, made past Triton."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fluxserve.families import registry
from fluxserve.job import Array, Job
from fluxserve.request import Request
from fluxserve.spec import ModelSpec


def parse(fields: Mapping[str, Any], spec: ModelSpec) -> Request:
    """Return the request of some fields, as `prepare` reads them."""
    return registry.of(spec).draft(fields, spec).complete()


def check(job: Job, spec: ModelSpec) -> None:
    """Check a job as `generate` does."""
    registry.of(spec).check(job, spec)


def changed(job: Job, arrays: Mapping[str, Array | None], **fields: Any) -> Job:
    """Return a job with other arrays, without those that are None, and with other fields."""
    own = {name: array for name, array in {**job.arrays, **arrays}.items() if array is not None}
    return replace(job, arrays=own, **fields)
