"""What comes back: pictures with their seeds and timings, and the state of a request in flight."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

ImageFormat = Literal["png", "jpeg", "webp", "raw"]

FORMAT_OF_SUFFIX: dict[str, ImageFormat] = {
    ".png": "png",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".jpe": "jpeg",
    ".jfif": "jpeg",
    ".webp": "webp",
    ".raw": "raw",
}


def format_named(name: str) -> str:
    """The contract's name of a format that people write as "JPEG", "jpg" or ".jpg"; an unknown name as it is."""
    plain = name.strip().lower().removeprefix(".")
    return FORMAT_OF_SUFFIX.get(f".{plain}", plain)


class State(StrEnum):
    """Where a request is; UNKNOWN before it reached the server and after it was answered."""

    UNKNOWN = "unknown"
    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"


@dataclass(frozen=True)
class Progress:
    """How far a request is: `step` of `steps` denoising steps are done; both are 0 while unknown."""

    state: State
    step: int
    steps: int


@dataclass(frozen=True)
class Preview:
    """A picture on its way: what the model would draw by its estimate at `step` of the request's steps.

    Attributes:
        image: an encoded file, small for a glimpse, of the picture's own size for a partial image.
        width, height: of `image`, pixels.
        index: 0, 1, … in the order of arrival.
    """

    image: bytes
    format: ImageFormat
    width: int
    height: int
    step: int
    index: int

    def pil(self) -> Image.Image:
        """Return the picture as a loaded Pillow image."""
        picture = Image.open(io.BytesIO(self.image))
        picture.load()
        return picture


@dataclass(frozen=True)
class Timings:
    """How long each stage took, in milliseconds, as the server measured it.

    Attributes:
        queue: waiting for the GPU.
        encode: text encoders, noise, and the VAE's encoder for an input image.
        denoise: the loop.
        decode: the VAE's decoder.
        total: the three before it, on the device's clock.
        image: writing the files, with the copy to the host.
    """

    queue: float
    encode: float
    denoise: float
    decode: float
    total: float
    image: float


@dataclass(frozen=True)
class Result:
    """The pictures of one request.

    Attributes:
        images: one encoded file each; with format "raw" the bare pixels, uint8, height × width × 3, RGB.
        seeds: the seed that draws each picture again, one per picture.
        timings: stage times in milliseconds.
        height, width: pixels.
        format: how `images` are encoded.
        request_id: the id the request ran under.
    """

    images: tuple[bytes, ...]
    seeds: tuple[int, ...]
    timings: Timings
    height: int
    width: int
    format: ImageFormat
    request_id: str

    @property
    def image(self) -> bytes:
        """The first picture."""
        return self.images[0]

    @property
    def seed(self) -> int:
        """The seed of the first picture."""
        return self.seeds[0]

    def pil(self, index: int = 0) -> Image.Image:
        """Picture `index` as a loaded Pillow image; raises `IndexError` beyond the last."""
        data = self.images[index]
        if self.format == "raw":
            return Image.frombytes("RGB", (self.width, self.height), data)
        picture = Image.open(io.BytesIO(data))
        picture.load()
        return picture

    def numpy(self, index: int = 0) -> npt.NDArray[np.uint8]:
        """Picture `index` as uint8, height × width × 3, RGB; raises `IndexError` beyond the last."""
        return np.asarray(self.pil(index).convert("RGB"))

    def save(self, path: str | os.PathLike[str], index: int = 0) -> Path:
        """Write picture `index` exactly as it came, and return the path.

        Raises:
            ValueError: the suffix of `path` names another format than the picture has.
            IndexError: there is no picture `index`.
        """
        target = Path(path)
        named = FORMAT_OF_SUFFIX.get(target.suffix.lower())
        if named is not None and named != self.format:
            raise ValueError(
                f"path: got {target.name!r} for a {self.format} picture; "
                f"ask for output_format={named!r}, or convert it with .pil().save(…)"
            )
        target.write_bytes(self.images[index])
        return target
