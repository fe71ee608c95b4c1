"""Checks of a job that several families make: anybody may have sent it."""

from collections.abc import Mapping

import numpy as np

from fluxserve.errors import InvalidRequest
from fluxserve.job import Array, Job
from fluxserve.spec import EncoderSpec, ModelSpec

Kinds = Mapping[str, tuple[type, int]]
"""Name of an array → its dtype and rank."""


def check_picture(job: Job, spec: ModelSpec) -> None:
    """Check sizes and seeds against the model's limits. Raises InvalidRequest."""
    limits, multiple = spec.limits, spec.size_multiple
    for side in (job.height, job.width):
        if not limits.min_side <= side <= limits.max_side or side % multiple:
            allowed = f"sides that are multiples of {multiple} from {limits.min_side} to {limits.max_side}"
            raise InvalidRequest("size", f"{job.height} x {job.width}", allowed)
    if job.height * job.width > limits.max_pixels:
        raise InvalidRequest("size", f"{job.height} x {job.width}", f"at most {limits.max_pixels} pixels")
    if not 0 < len(job.seeds) <= limits.max_images or min(job.seeds) < 0:
        raise InvalidRequest("seeds", f"{len(job.seeds)} seeds", f"1 to {limits.max_images}, none negative")


def check_arrays(job: Job, spec: ModelSpec, needed: Kinds, optional: Kinds) -> None:
    """Check that all needed arrays are there, that nothing else is, and that each has its dtype and rank.

    Raises:
        InvalidRequest: names the array.
    """
    if absent := sorted(set(needed) - set(job.arrays)):
        raise InvalidRequest("job", f"no {', '.join(absent)}", f"{', '.join(sorted(needed))} for {spec.name}")
    kinds = {**needed, **optional}
    for name, array in job.arrays.items():
        if name not in kinds:
            raise InvalidRequest("job", f"an array {name!r}", f"{', '.join(sorted(kinds))} for {spec.name}")
        dtype, rank = kinds[name]
        if array.dtype != dtype or array.ndim != rank or not array.size:
            got = f"{array.dtype} {list(array.shape)}"
            raise InvalidRequest(name, got, f"{np.dtype(dtype)} of {rank} dimensions, not empty")


def check_ids(name: str, ids: Array, encoder: EncoderSpec) -> None:
    """Check an encoder's tokens: an id beyond the vocabulary would read beyond its table. Raises InvalidRequest."""
    known = encoder.vocabulary
    if len(ids) > encoder.tokens or ids.min() < 0 or ids.max() >= known:
        raise InvalidRequest(name, f"{len(ids)} ids", f"1 to {encoder.tokens} ids from 0 to {known - 1}")


def check_mask(name: str, mask: Array, ids: Array) -> None:
    """Check which tokens are no padding: at least one. Raises InvalidRequest."""
    if len(mask) != len(ids) or not mask.any() or not np.isin(mask, (0, 1)).all():
        allowed = f"{len(ids)} numbers, 0 or 1, not all of them 0"
        raise InvalidRequest(name, f"{len(mask)} numbers", allowed)
