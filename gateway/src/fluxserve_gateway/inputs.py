"""Take the input images out of an edit's body: a form's files, or the data URLs of a JSON body. Nothing is fetched."""

from __future__ import annotations

import base64
import binascii
import io
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fluxserve_gateway.bodies import MAX_JSON, json_object
from fluxserve_gateway.config import Config
from fluxserve_gateway.errors import InvalidField, TooLarge
from fluxserve_gateway.headers import size_of

_DATA_URL = re.compile(r"data:image/(?:png|jpeg|jpg|webp);base64,", re.IGNORECASE)
_IN_JSON = re.compile(rb'"image_url"\s*:\s*"data:[^",]{0,64},')
_ESCAPED = re.compile(rb"\\(?:(/)|u00([0-7][0-9A-Fa-f]))")  # writers of JSON may escape "/", "+" and "="
_PIECE = 1 << 20  # of base64, decoded at a time: a multiple of four


@dataclass(frozen=True)
class Picture:
    """Holds an input image as it came, and its size in pixels by its header."""

    data: bytes
    pixels: int


def uploaded(files: Sequence[tuple[str, bytes]]) -> list[bytes]:
    """Return the files of the parts `image` and `image[]`; refuse any other part with a file by name."""
    for name, _ in files:
        if name in ("mask", "markup"):
            message = f"{name}: got a file; allowed: nothing: no server here takes a mask yet"
            raise InvalidField(message, param=name, code="unsupported_parameter")
        if name not in ("image", "image[]"):
            raise InvalidField(f"{name[:60]}: got a file; allowed: image, image[]", param=name[:60])
    return [data for _, data in files]


def edit_of_json(body: bytearray, most: int) -> tuple[dict[str, Any], list[bytes]]:
    """Read the fields and the files of a JSON edit; see `of_json`."""
    fields, files = of_json(body, most)
    if files is None:
        raise InvalidField("images: got nothing; it is required", param="images", code="missing_required_parameter")
    return fields, files


def of_json(body: bytearray, most: int) -> tuple[dict[str, Any], list[bytes] | None]:
    """Read the fields of a JSON body, and the files in its `images`; None if it has no such field.

    The base64 is taken out of the body first: what the parser sees is as small as a body without images, and the
    images are decoded piece by piece, so that other threads have their turn.

    Args:
        body: it may hold megabytes of data URLs.
        most: how many of them it may have.
    """
    skeleton, files = _without_data_urls(body, most)
    fields = json_object(skeleton)
    return fields, _referenced(fields.pop("images"), files) if "images" in fields else None


def _without_data_urls(body: bytearray, most: int) -> tuple[bytes, dict[str, bytes]]:
    """Put a name that nobody can guess in the place of each `image_url`'s data; return the files by these names.

    A quote inside of a JSON string is escaped, so the pattern cannot begin in a prompt.
    """
    kept: list[bytes | bytearray] = []
    files: dict[str, bytes] = {}
    at = 0
    while found := _IN_JSON.search(body, at, at + MAX_JSON):
        end = body.find(b'"', found.end())
        if end < 0:
            break
        if len(files) == most:
            raise InvalidField(f"images: got more than {most} images; allowed: 1 to {most}", param="images")
        name = secrets.token_hex(16)
        kept += (body[at : found.end()], name.encode())
        data: bytes | memoryview = memoryview(body)[found.end() : end]
        if body.find(b"\\", found.end(), end) >= 0:
            data = _ESCAPED.sub(lambda each: each[1] or bytes.fromhex(each[2].decode()), data)
        files[name] = _decoded(data)
        at = end
    kept.append(body[at : at + MAX_JSON + 1])
    skeleton = b"".join(kept)
    if len(skeleton) > MAX_JSON:
        raise TooLarge(f"body: got more than {MAX_JSON} bytes beside the data URLs; allowed: at most {MAX_JSON}")
    return skeleton, files


def _decoded(data: bytes | memoryview) -> bytes:
    file = io.BytesIO()
    try:
        for start in range(0, len(data), _PIECE):
            file.write(base64.b64decode(data[start : start + _PIECE], validate=True))
    except (binascii.Error, ValueError) as error:
        raise InvalidField(f"images: got damaged base64 ({error})", param="images") from error
    return file.getvalue()


def _referenced(images: object, files: Mapping[str, bytes]) -> list[bytes]:
    """Return the files in `images` of a JSON body: objects whose `image_url` is a data URL."""
    if not isinstance(images, list):
        raise InvalidField("images: allowed: a list of objects with image_url", param="images")
    return [_of_reference(image, files) for image in images]


def _of_reference(image: object, files: Mapping[str, bytes]) -> bytes:
    allowed = "allowed: an object with image_url, a data URL of PNG, JPEG or WebP in base64"
    if isinstance(image, Mapping) and "file_id" in image:
        raise InvalidField(f"images: got a file_id, and no files are kept here; {allowed}", param="images")
    if not isinstance(image, Mapping) or set(image) != {"image_url"} or not isinstance(image["image_url"], str):
        raise InvalidField(f"images: got {type(image).__name__}; {allowed}", param="images")
    head = _DATA_URL.match(image["image_url"])
    if head is None:
        shown = image["image_url"][:40]
        raise InvalidField(f"images: got {shown!r}, and no URL is fetched; {allowed}", param="images")
    data = image["image_url"][head.end() :]
    return files[data] if data in files else _decoded(data.encode("utf-8", "surrogatepass"))


def pictures(files: Sequence[bytes], param: str, config: Config) -> tuple[Picture, ...]:
    """Check number, kind and size in pixels of input images, by their headers; nothing is decoded."""
    if not 1 <= len(files) <= config.max_images:
        got = f"{param}: got {len(files)} images"
        raise InvalidField(f"{got}; allowed: 1 to {config.max_images}", param=param)
    return tuple(_picture(data, param, config.max_image_pixels) for data in files)


def _picture(data: bytes, param: str, most: int) -> Picture:
    size = size_of(data)
    if size is None:
        raise InvalidField(f"{param}: got {len(data)} bytes; allowed: a PNG, JPEG or WebP file", param=param)
    width, height = size
    if width * height > most:
        raise InvalidField(f"{param}: got {width} x {height} pixels; allowed: at most {most}", param=param)
    return Picture(data, width * height)
