"""What crosses from `prepare` to `generate`: a job, and what its answer needs. Three tensors, whatever the model.

A prompt for the files has a tensor of its own, whose shape is always the same: in the job, its length would keep
requests with prompts of different lengths out of one batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fluxserve import job as jobs
from fluxserve.contract import ENCODINGS, OUTPUT_FORMATS
from fluxserve.errors import InvalidRequest
from fluxserve.job import Array, Job
from fluxserve.media.provenance import MAX_PROMPT_BYTES
from fluxserve.request import Request

_CHOICES = {"output_format": OUTPUT_FORMATS, "encoding": ENCODINGS}
_BESIDE = ("ticket", "quality", *_CHOICES)


@dataclass(frozen=True)
class Delivery:
    """How a request is answered.

    Attributes:
        ticket: the key to its place in the in-flight table.
        prompt: what the files are to hold as the prompt; empty unless the caller wants that.
    """

    ticket: int
    output_format: str
    quality: int
    encoding: str
    prompt: str


def sealed(job: Job, ticket: int, request: Request) -> dict[str, Any]:
    """Return contract.PREPARE's outputs, with the batch dimension of 1 that `generate` takes."""
    chosen = {name: words.index(getattr(request, name)) for name, words in _CHOICES.items()}
    wire = job.dump(ticket=ticket, quality=request.quality, **chosen)
    return {
        "job": np.frombuffer(wire, dtype=np.uint8)[None],
        "batch_key": np.empty((1, *job.batch_key, 0), dtype=np.uint8),
        "embedded_prompt": [[request.prompt.encode() if request.embed_prompt else b""]],
    }


def opened(arrays: Mapping[str, Array]) -> tuple[Job, Delivery]:
    """Inverse of `sealed`, for tensors that anybody may have sent.

    Raises:
        InvalidRequest: names the tensor or the array in it.
    """
    for name, array in arrays.items():
        if len(array) != 1:
            raise InvalidRequest(name, f"a batch of {len(array)}", "one request at a time; Triton forms the batches")
    job, numbers = jobs.parse(arrays["job"][0].tobytes(), _BESIDE)
    if arrays["batch_key"].shape[1:] != (*job.batch_key, 0):
        raise InvalidRequest("batch_key", f"shape {list(arrays['batch_key'].shape[1:])}", f"{[*job.batch_key, 0]}")
    if not 1 <= numbers["quality"] <= 100:
        raise InvalidRequest("quality", str(numbers["quality"]), "1 to 100")
    words = {name: _choice(name, numbers[name], choices) for name, choices in _CHOICES.items()}
    prompt = _prompt(arrays["embedded_prompt"][0, 0])
    return job, Delivery(numbers["ticket"], quality=numbers["quality"], prompt=prompt, **words)


def _prompt(raw: bytes) -> str:
    refusal = InvalidRequest("embedded_prompt", f"{len(raw)} bytes", f"at most {MAX_PROMPT_BYTES} bytes of UTF-8 text")
    if len(raw) > MAX_PROMPT_BYTES:
        raise refusal
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise refusal from error


def _choice(name: str, index: int, choices: tuple[str, ...]) -> str:
    if not 0 <= index < len(choices):
        raise InvalidRequest(name, str(index), f"0 to {len(choices) - 1}: {', '.join(choices)}")
    return choices[index]
