"""Requests to `generate`, as `prepare` makes them, and what comes back; for the stand-in of Triton."""

from typing import Any

import numpy as np

from fluxserve import contract
from fluxserve.job import Job
from tests.support.fake_triton import InferenceRequest, counted, outputs

STEPS = 3


def job(
    ticket: int = 0,
    seeds: tuple[int, ...] = (1,),
    size: tuple[int, int] = (64, 64),
    steps: int = STEPS,
    request_id: str = "",
    cancelled_after: int | None = None,
    output_format: bytes = b"raw",
    sigmas: np.ndarray | None = None,
    index: int | None = None,
    quality: int = 90,
    encoding: int = 0,
    prompt: bytes = b"",
) -> InferenceRequest:
    arrays = {"ids.clip": np.full(77, 5), "ids.t5": np.full(32, 5), "guidance": np.array([3.0], np.float32)}
    levels = np.linspace(1, 0, steps + 1, dtype=np.float32) if sigmas is None else sigmas
    planned = Job(*size, seeds, levels, arrays)
    file = contract.OUTPUT_FORMATS.index(output_format.decode()) if index is None else index
    wire = planned.dump(ticket=ticket, output_format=file, quality=quality, encoding=encoding)
    values = {
        "job": np.frombuffer(wire, np.uint8)[None],
        "batch_key": np.empty((1, *planned.batch_key, 0), np.uint8),
        "embedded_prompt": np.array([[prompt]], dtype=object),
    }
    return InferenceRequest(values, request_id, cancelled_after)


def images(response: Any) -> np.ndarray:
    """Of raw files: [1, num_images, height, width, 3]."""
    out = outputs(response)
    height, width = out["image_size"][0]
    files = [np.frombuffer(file, np.uint8).reshape(height, width, 3) for file in out["images"][0]]
    return np.stack(files)[None]


def spent(metric: str, **labels: str) -> float:
    return counted(f"fluxserve_{metric}", **labels)
