"""Write pictures in OpenAI's shapes: one JSON object, or server-sent events."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fluxserve_client import Preview, Progress, Result

from fluxserve_gateway.errors import GatewayError

_PATCH = 16 * 16  # pixels; what the models draw at once, and so the nearest thing to OpenAI's tokens
_PLACE = b'"b64_json": ""'  # no text can hold these characters once JSON has escaped its quotes


@dataclass(frozen=True)
class Echo:
    """Holds what an answer repeats of its request.

    Attributes:
        operation: the prefix of its events: image_generation or image_edit.
        safety_identifier: as OpenAI echoes it.
        input_pixels: of all input images.
    """

    operation: str
    safety_identifier: str | None
    input_pixels: int


def description(result: Result, echo: Echo) -> dict[str, Any]:
    """Describe an answer without its pictures."""
    return {
        "created": int(time.time()),
        "background": "opaque",
        "output_format": result.format,
        "size": _size(result),
        "safety_identifier": echo.safety_identifier,
        "usage": _usage(result, echo, len(result.images)),
    }


def linked(result: Result, echo: Echo, urls: Sequence[str]) -> bytes:
    """Write the body that answers a request without `stream`, with the URLs of its pictures."""
    data = [{"url": url, "seed": seed} for url, seed in zip(urls, result.seeds, strict=True)]
    return json.dumps({**description(result, echo), "data": data}).encode()


def response(result: Result, echo: Echo) -> bytes:
    """Write the body that answers a request without `stream`, with its pictures."""
    answer = {**description(result, echo), "data": [{"b64_json": "", "seed": seed} for seed in result.seeds]}
    return _with_pictures(answer, result.images)


def events(event: Progress | Preview | Result, echo: Echo) -> Iterator[bytes]:
    """Write what happened to a request as events of its stream."""
    if isinstance(event, Progress):
        yield progressed(event)
    elif isinstance(event, Preview):
        yield partial(event, echo)
    else:
        yield from completed(event, echo)


def partial(preview: Preview, echo: Echo) -> bytes:
    """Write the event of a picture that is not finished."""
    name = f"{echo.operation}.partial_image"
    event = {
        "type": name,
        "b64_json": "",
        "partial_image_index": preview.index,
        "created_at": int(time.time()),
        "size": f"{preview.width}x{preview.height}",
        "quality": "auto",
        "background": "opaque",
        "output_format": preview.format,
    }
    return _event(name, _with_pictures(event, (preview.image,)))


def completed(result: Result, echo: Echo) -> Iterator[bytes]:
    """Write the events that end a stream: one for each picture, in the order of their seeds."""
    for image, seed in zip(result.images, result.seeds, strict=True):
        name = f"{echo.operation}.completed"
        event = {
            "type": name,
            "b64_json": "",
            "created_at": int(time.time()),
            "size": _size(result),
            "quality": "auto",
            "background": "opaque",
            "output_format": result.format,
            "usage": _usage(result, echo, 1),
            "seed": seed,
        }
        yield _event(name, _with_pictures(event, (image,)))


def progressed(progress: Progress) -> bytes:
    """Write a comment: readers of events skip it, and a proxy sees that the connection is alive."""
    return f": {progress.state} {progress.step}/{progress.steps}\n\n".encode()


def failed(error: GatewayError) -> bytes:
    """Write the event that ends a stream early: OpenAI's SDK raises where an event's data has an `error`."""
    return _event("error", json.dumps(error.body()).encode())


def _event(name: str, data: bytes) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), data)


def _size(result: Result) -> str:
    return f"{result.width}x{result.height}"


def _usage(result: Result, echo: Echo, pictures: int) -> dict[str, Any]:
    """Count patches of pixels in the place of tokens, and the prompt's as 0: only the server tokenises."""
    read = echo.input_pixels // _PATCH
    drawn = pictures * result.width * result.height // _PATCH
    return {
        "input_tokens": read,
        "input_tokens_details": {"text_tokens": 0, "image_tokens": read},
        "output_tokens": drawn,
        "total_tokens": read + drawn,
    }


def _with_pictures(answer: dict[str, Any], images: tuple[bytes, ...]) -> bytes:
    """Write the JSON of `answer` with a picture in each empty `b64_json`.

    A JSON writer would look through megabytes of base64 for characters to escape, of which it has none.
    """
    parts = json.dumps(answer).encode().split(_PLACE)
    pieces = [parts[0]]
    for image, rest in zip(images, parts[1:], strict=True):
        pieces += (_PLACE[:-1], base64.b64encode(image), b'"', rest)
    return b"".join(pieces)
