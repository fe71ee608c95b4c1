"""Bounds on the bodies of requests, which a proxy in front of a server must set."""

import math

from fluxserve.families.flux.parts import FluxSpec

MIB = 2**20


def largest_mib(model: FluxSpec) -> int:
    """Return the size of the largest request that a model takes, in whole MiB.

    Its image files count in base64. One MiB is left for all other fields.
    """
    files = max(model.limits.max_references, 1) * model.limits.max_image_bytes
    return math.ceil(math.ceil(files / 3) * 4 / MIB + 1)
