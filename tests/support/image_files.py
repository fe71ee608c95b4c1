"""Image files for tests, good and damaged, and how they are read or refused."""

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fluxserve.errors import InvalidRequest
from fluxserve.families.flux.models import FLUX1_DEV
from fluxserve.media.images import decode, read_image
from fluxserve.spec import Limits

LIMITS = FLUX1_DEV.limits
RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (48, 40, 3), dtype=np.uint8)
SMOOTH = np.stack(np.broadcast_arrays(np.arange(48)[:, None] * 5, np.arange(40) * 6, 128), axis=-1).astype(np.uint8)


def encoded(picture: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(out, kind, **options)
    return out.getvalue()


def whole(data: bytes, limits: Limits) -> np.ndarray:
    image = read_image(data, limits)
    return decode(data, image.resized(image.height, image.width))


def pixels(data: bytes) -> np.ndarray:
    image, decoded = read_image(data, LIMITS), whole(data, LIMITS)
    assert decoded.shape == (image.height, image.width, 3) and decoded.dtype == np.uint8
    return decoded


def refusal(data: bytes, limits: Any = LIMITS) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        whole(data, limits)
    assert caught.value.field == "image"
    assert caught.value.allowed.endswith(("bytes", "pixels", "a whole file"))
    return caught.value


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG by hand: any bit depth, any lie in its header."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}
