"""What Triton sees: the name, dtype and dims of every tensor of every model. No I/O.

`model_repository/*/config.pbtxt` are static files that carry the comments; tests/contract holds each of them against
the tables here. Ensemble tensors share one name space, so no output of `flux` may be called like an input of it:
hence `images` beside `image`, `seeds` beside `seed`, `image_size` beside `height` and `width`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

MAX_BATCH_SIZE = 4
"""Requests of equal size, steps and task that `generate` may take in one batch."""

MAX_WAITING = 64
"""Requests that may wait for the GPU, unless a setting says otherwise or so many would wait for too long."""

MAX_QUEUE_SIZE = 256
"""Triton's own bound on `generate`'s queue: above MAX_WAITING, because a request that was cancelled while it waited no
longer counts but stays in the queue until its turn comes to be answered."""

QUEUE_TIMEOUT_S = 120
"""How long a request may wait for the GPU before Triton answers it UNAVAILABLE, as config.pbtxt is shipped."""

PRIORITY_LEVELS = 3
"""1 is the most urgent; a request that says nothing gets the middle one."""

DEFAULT_PRIORITY = 2

OUTPUT_FORMATS = ("png", "jpeg", "webp", "raw")

ENCODINGS = ("binary", "base64")
"""Of image files, in and out. Triton writes BYTES into JSON as they are, so that only text survives it."""

ANY = -1
"""A dimension that differs from request to request, as Triton writes it."""


@dataclass(frozen=True)
class TensorContract:
    """One tensor. `dims` are without the batch dimension; `meaning` is what a caller reads."""

    name: str
    dtype: str
    dims: tuple[int, ...]
    meaning: str
    optional: bool = False


@dataclass(frozen=True)
class ModelContract:
    """One model of the repository. `max_batch_size` 0 means that its tensors carry no batch dimension."""

    name: str
    inputs: tuple[TensorContract, ...]
    outputs: tuple[TensorContract, ...]
    max_batch_size: int = 0

    def dtype_of(self, name: str) -> str:
        return next(t.dtype for t in (*self.inputs, *self.outputs) if t.name == name)


def _tensor(name: str, dtype: str, dims: Sequence[int], meaning: str, optional: bool = False) -> TensorContract:
    return TensorContract(name, dtype, tuple(dims), meaning, optional)


REQUEST_INPUTS = (
    _tensor("prompt", "BYTES", [1], "required: UTF-8, 1 to 4,096 bytes", optional=True),
    _tensor("height", "INT32", [1], "pixels, a multiple of 16", optional=True),
    _tensor("width", "INT32", [1], "pixels, a multiple of 16", optional=True),
    _tensor("num_inference_steps", "INT32", [1], "1 to the model's limit", optional=True),
    _tensor("guidance_scale", "FP32", [1], "distilled guidance, where the model has it", optional=True),
    _tensor("negative_prompt", "BYTES", [1], "what a second pass of each step is steered away from", optional=True),
    _tensor("true_cfg_scale", "FP32", [1], "FLUX.1: how far; above 1 a step takes two passes", optional=True),
    _tensor("seed", "INT64", [1], "-1 draws one; image k gets seed + k", optional=True),
    _tensor("num_images", "INT32", [1], "1 to 8", optional=True),
    _tensor("image", "BYTES", [ANY], "a PNG, JPEG or WebP file to redraw, or up to 4 to draw after", optional=True),
    _tensor("strength", "FP32", [1], "of an image to redraw: 0 < strength <= 1, how much is redrawn", optional=True),
    _tensor("output_format", "BYTES", [1], "png, jpeg, webp or raw (height x width x 3 bytes)", optional=True),
    _tensor("quality", "INT32", [1], "1 to 100, of jpeg and webp", optional=True),
    _tensor("encoding", "BYTES", [1], "of image and images: binary, or base64 for JSON", optional=True),
    _tensor("embed_prompt", "BOOL", [1], "whether files hold the prompt beside the parameters", optional=True),
)

_ANSWER = (
    _tensor("images", "BYTES", [ANY], "one encoded image for each of num_images"),
    _tensor("seeds", "INT64", [ANY], "the seed of each image"),
    _tensor("timings", "BYTES", [1], "JSON: milliseconds by stage"),
    _tensor("image_size", "INT32", [2], "height and width of the images, pixels"),
)

FLUX = ModelContract("flux", REQUEST_INPUTS, _ANSWER)

# What crosses from `prepare` to `generate`, whatever the model. Triton batches requests whose shapes are equal: that of
# the key has what must be equal in a batch, and the job's length follows from the shapes of all arrays in it.
_JOB = (
    _tensor("job", "UINT8", [ANY], "the arrays of one request: safetensors, see fluxserve/job.py"),
    _tensor("batch_key", "UINT8", [ANY, ANY, ANY, ANY], "no bytes: [height, width, steps, 0]"),
    _tensor("embedded_prompt", "BYTES", [1], "the prompt that files are to hold; empty: none"),
)


def _batch_of_one(tensors: Sequence[TensorContract]) -> tuple[TensorContract, ...]:
    """The same tensors as a model without batching sees them: the batch dimension, of size 1, is written out."""
    return tuple(_tensor(t.name, t.dtype, (ANY, *t.dims), t.meaning, t.optional) for t in tensors)


PREPARE = ModelContract("prepare", REQUEST_INPUTS, _batch_of_one(_JOB))

# Triton takes the batch dimension, of 1, away again where `generate` answers for `flux`, which has none.
GENERATE = ModelContract("generate", _JOB, _ANSWER, max_batch_size=MAX_BATCH_SIZE)

CONTROL = ModelContract(
    "control",
    (
        _tensor("request_id", "BYTES", [1], "the id a request to `flux` was sent with"),
        _tensor("action", "BYTES", [1], "status, cancel or preview"),
        _tensor("kind", "BYTES", [1], "of a preview: glimpse (small; the default) or partial", optional=True),
        _tensor("after", "INT32", [1], "of a preview: the step that it must be later than; 0", optional=True),
        _tensor("encoding", "BYTES", [1], "of a preview: binary, or base64 for JSON", optional=True),
    ),
    (
        _tensor("state", "BYTES", [1], "unknown, queued, running or cancelling"),
        _tensor("step", "INT32", [1], "steps done"),
        _tensor("steps", "INT32", [1], "steps in all; 0 when unknown"),
        _tensor("preview", "BYTES", [1], "a file, empty if there is none yet: PNG; partial in the request's format"),
        _tensor("preview_step", "INT32", [1], "the step that it shows; 0 if there is none"),
    ),
)

MODELS = {m.name: m for m in (FLUX, PREPARE, GENERATE, CONTROL)}
