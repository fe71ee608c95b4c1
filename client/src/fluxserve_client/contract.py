"""What Triton sees: the names, dtypes and dims of every tensor, and nothing of it anywhere else in the client.

`flux` makes pictures, `control` answers for the requests that are in flight. Neither has a batch dimension.
Values are judged by the server alone, so that its limits live in one place; here only what cannot become a
tensor of the right dtype is refused. Tensors of an ensemble share one name space, hence the plurals: an output
called like an input would be answered with the input.
"""

from __future__ import annotations

import io
import json
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from fluxserve_client.errors import ServerError
from fluxserve_client.images import ImageInput, file_of
from fluxserve_client.result import ImageFormat, Preview, Progress, Result, State, Timings, format_named

FLUX = "flux"
CONTROL = "control"

Tensor: TypeAlias = npt.NDArray[Any]
Tensors: TypeAlias = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Request:
    """The inputs of `flux`; None leaves one to the server's default. `AsyncClient.generate` documents them."""

    prompt: str
    height: int | None = None
    width: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    true_cfg_scale: float | None = None
    seed: int | None = None
    num_images: int | None = None
    image: ImageInput | Sequence[ImageInput] | None = None
    strength: float | None = None
    output_format: ImageFormat | str | None = None
    quality: int | None = None
    embed_prompt: bool | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The inputs that were given, one element each; `image` has as many as there are pictures.

        Raises:
            TypeError, ValueError: a value that no tensor of the input's dtype can hold; the message names it.
            OSError: an `image` is a path that cannot be read.
        """
        given = ((name, form, getattr(self, name)) for name, form in _INPUTS.items())
        return {name: form(name, value) for name, form, value in given if value is not None}


def control_tensors(request_id: str, action: str) -> dict[str, Tensor]:
    """The inputs of `control`; `action` is "status" or "cancel"."""
    return {"request_id": _text("request_id", request_id), "action": _text("action", action)}


def preview_tensors(request_id: str, kind: str, after: int) -> dict[str, Tensor]:
    """The inputs of `control` for a picture later than step `after`; `kind` is "glimpse" or "partial"."""
    more = {"kind": _text("kind", kind), "after": np.array([after], dtype=np.int32)}
    return {**control_tensors(request_id, "preview"), **more}


def parse_preview(outputs: Tensors, index: int) -> Preview | None:
    """The picture in the answer of `control`, if there is one. Raises `ServerError` if it breaks the contract."""
    image, step = _strings(outputs, "preview")[0], int(_output(outputs, "preview_step", count=1)[0])
    if not image:
        return None
    kind = _format_of(image)
    try:
        width, height = Image.open(io.BytesIO(image), formats=[kind]).size
    except (OSError, ValueError, SyntaxError) as error:
        raise ServerError(f"preview: got {len(image)} bytes that are no {kind} file") from error
    return Preview(image, kind, width, height, step, index)


def parse_progress(outputs: Tensors) -> Progress:
    """The answer of `control`. Raises `ServerError` if it breaks the contract."""
    state = _strings(outputs, "state")[0].decode()
    if state not in set(State):
        raise ServerError(f"state: got {state!r}, expected one of {', '.join(State)}")
    return Progress(State(state), *(int(_output(outputs, name)[0]) for name in ("step", "steps")))


def parse_result(outputs: Tensors, request_id: str, asked: str | None) -> Result:
    """The answer of `flux`. Raises `ServerError` if it breaks the contract."""
    images = _strings(outputs, "images")
    seeds = tuple(int(seed) for seed in _output(outputs, "seeds"))
    if len(seeds) != len(images):
        raise ServerError(f"seeds: got {len(seeds)} of them for {len(images)} images", request_id=request_id)
    height, width = (int(pixels) for pixels in _output(outputs, "image_size", count=2))
    return Result(
        images=images,
        seeds=seeds,
        timings=_timings(_strings(outputs, "timings")[0]),
        height=height,
        width=width,
        format=cast(ImageFormat, format_named(asked)) if asked else _format_of(images[0]),
        request_id=request_id,
    )


def _text(name: str, value: object) -> Tensor:
    if not isinstance(value, str):
        raise TypeError(f"{name}: got {type(value).__name__}, expected str")
    try:
        return _bytes(value.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: not valid Unicode text: {error}") from error


def _bytes(value: bytes) -> Tensor:
    # dtype object: numpy's own bytes dtype drops trailing zeros, which files do have
    return np.array([value], dtype=np.object_)


def _pictures(name: str, value: object) -> Tensor:
    one_file = bytes | bytearray | memoryview | str
    several = value if isinstance(value, Sequence) and not isinstance(value, one_file) else (value,)
    return np.array([file_of(name, each) for each in several], dtype=np.object_)


def _format(name: str, value: object) -> Tensor:
    return _text(name, format_named(value) if isinstance(value, str) else value)


def _integer(dtype: type[np.int32 | np.int64]) -> Callable[[str, object], Tensor]:
    limits = np.iinfo(dtype)

    def form(name: str, value: object) -> Tensor:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{name}: got {type(value).__name__}, expected int")
        number = operator.index(cast(int, value))
        if not limits.min <= number <= limits.max:
            raise ValueError(f"{name}: got {number}, expected {limits.min} to {limits.max} ({limits.dtype})")
        return np.array([number], dtype=dtype)

    return form


def _float(name: str, value: object) -> Tensor:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {type(value).__name__}, expected float")
    number = float(value)
    if math.isfinite(number) and abs(number) > float(np.finfo(np.float32).max):
        raise ValueError(f"{name}: got {number}, which float32 cannot hold")
    return np.array([number], dtype=np.float32)


def _truth(name: str, value: object) -> Tensor:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}, expected bool")
    return np.array([value], dtype=np.bool_)


_INPUTS: dict[str, Callable[[str, object], Tensor]] = {
    "prompt": _text,
    "height": _integer(np.int32),
    "width": _integer(np.int32),
    "num_inference_steps": _integer(np.int32),
    "guidance_scale": _float,
    "negative_prompt": _text,
    "true_cfg_scale": _float,
    "seed": _integer(np.int64),
    "num_images": _integer(np.int32),
    "image": _pictures,
    "strength": _float,
    "output_format": _format,
    "quality": _integer(np.int32),
    "embed_prompt": _truth,
}


def _output(outputs: Tensors, name: str, count: int | None = None) -> Tensor:
    tensor = outputs.get(name)
    if tensor is None or tensor.size == 0:
        there = ", ".join(sorted(outputs)) or "nothing"
        raise ServerError(f"{name}: missing from the answer, which has {there}")
    if count not in (None, tensor.size):
        raise ServerError(f"{name}: got {tensor.size} elements, expected {count}")
    return tensor.ravel()


def _strings(outputs: Tensors, name: str) -> tuple[bytes, ...]:
    return tuple(bytes(element) for element in _output(outputs, name))


def _timings(text: bytes) -> Timings:
    try:
        stages = json.loads(text)
        return Timings(**{name: float(stages[name]) for name in Timings.__dataclass_fields__})
    except (ValueError, KeyError, TypeError) as error:
        raise ServerError(f"timings: got {text!r}, expected JSON with every stage in milliseconds") from error


def _format_of(data: bytes) -> ImageFormat:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    raise ServerError(f"images: one starts with {data[:12]!r}, which is no PNG, JPEG or WebP file")
