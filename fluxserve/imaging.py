"""Encoded images ↔ pixels. The border where a stranger's bytes are decoded; sizes are checked before a pixel is.

PNG is written by png/strips.py, on several threads; JPEG and WebP go through Pillow.
"""

import io
import math
import re
import struct
import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from fluxserve.colour import in_srgb
from fluxserve.errors import InvalidRequest
from fluxserve.png import strips
from fluxserve.png.texts import without_texts
from fluxserve.spec import Limits

Pixels = npt.NDArray[np.uint8]

_READABLE = ("PNG", "JPEG", "WEBP")


@dataclass(frozen=True)
class InputImage:
    """A decoded RGB image, upright, alpha laid over white."""

    picture: Image.Image

    @property
    def height(self) -> int:
        return self.picture.height

    @property
    def width(self) -> int:
        return self.picture.width

    def resized(self, height: int, width: int) -> Pixels:
        """uint8 [height, width, 3], by Lanczos as diffusers' VaeImageProcessor does it."""
        if (self.height, self.width) == (height, width):
            return np.asarray(self.picture)
        return np.asarray(self.picture.resize((width, height), Image.Resampling.LANCZOS))

    def reference_size(self, most: int, multiple: int) -> tuple[int, int]:
        """Height and width of `reference`."""
        height, width = self._capped(most)
        return height // multiple * multiple, width // multiple * multiple

    def reference(self, most: int, multiple: int) -> Pixels:
        """uint8 [height, width, 3]: scaled down to at most `most` pixels, then its middle, of sides that are multiples.

        As Flux2KleinPipeline.__call__ and Flux2ImageProcessor prepare one: never stretched, never enlarged.
        """
        capped, (height, width) = self.resized(*self._capped(most)), self.reference_size(most, multiple)
        top, left = (capped.shape[0] - height) // 2, (capped.shape[1] - width) // 2
        return np.ascontiguousarray(capped[top : top + height, left : left + width])

    def _capped(self, most: int) -> tuple[int, int]:
        if self.height * self.width <= most:
            return self.height, self.width
        scale = math.sqrt(most / (self.width * self.height))
        return int(self.height * scale), int(self.width * scale)


def read_image(data: bytes, limits: Limits) -> InputImage:
    """Decode a PNG, JPEG or WebP file.

    Raises:
        InvalidRequest: too large, of another format, truncated, or a bomb: its header is read before its pixels are.
    """
    if len(data) > limits.max_image_bytes:
        raise InvalidRequest("image", f"{len(data)} bytes", f"at most {limits.max_image_bytes} bytes")
    allowed = f"a whole {', '.join(_READABLE)} file of at most {limits.max_image_pixels} pixels"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows, on the header
            picture = Image.open(io.BytesIO(without_texts(data)), formats=_READABLE)
    except Image.DecompressionBombError as error:
        raise InvalidRequest("image", "an image of far too many pixels", allowed) from error
    except (OSError, ValueError, SyntaxError) as error:
        raise InvalidRequest("image", f"{len(data)} bytes of {_likely(data)}", allowed) from error
    if picture.width * picture.height > limits.max_image_pixels:
        raise InvalidRequest("image", f"an image of {picture.width} x {picture.height} pixels", allowed)
    try:
        return InputImage(_upright_rgb(picture))
    except (OSError, ValueError, SyntaxError, EOFError, struct.error) as error:
        raise InvalidRequest("image", f"a damaged or truncated {picture.format} file ({error})", allowed) from error


_LIKELY = (
    (rb"data:", "a data URI: decode its base64"),
    (rb"\s*(iVBORw0KGgo|/9j/|UklGR)", "an image in base64: decode it"),
    (rb"https?://|file://|/|[\w./~-]+\.(png|jpe?g|webp)\Z", "a URL or a path: send the file's bytes"),
    (rb"GIF8", "a GIF file"),
    (rb"....ftyp(avif|heic|heix|mif1|msf1)", "an AVIF or HEIC file"),
    (rb"BM|II\*\0|MM\0\*", "a BMP or TIFF file"),
)


def _likely(data: bytes) -> str:
    """What data looks like that is no image of ours."""
    named = (name for pattern, name in _LIKELY if re.match(pattern, data[:100], re.DOTALL))
    return next(named, "no known image format")


def _upright_rgb(picture: Image.Image) -> Image.Image:
    upright = in_srgb(ImageOps.exif_transpose(picture))
    if upright.mode == "I" or upright.mode.startswith("I;16"):  # 16-bit grey, which Pillow would clip and not scale
        return Image.fromarray((np.asarray(upright).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        rgba = upright.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return upright.convert("RGB")


def write_image(pixels: Pixels, output_format: str, quality: int) -> bytes:
    """Encode uint8 [height, width, 3] as one of contract.OUTPUT_FORMATS. PNG and raw are exact, WebP and JPEG lossy."""
    if output_format == "raw":
        return pixels.tobytes()
    if output_format == "png":
        return strips.encode(pixels)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format=output_format, quality=quality)
    return out.getvalue()
