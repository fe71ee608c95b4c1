"""Encoded images ↔ pixels. The border where a stranger's bytes are decoded; sizes are checked before a pixel is.

A file is read in two steps. `read_image` reads its header, in time that does not depend on its pixels. `decode` makes
the pixels that a model takes: `serving/decoder.py` runs it in a process of its own.

PNG is written by png/strips.py, on several threads; JPEG and WebP go through Pillow.
"""

import io
import math
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image, PngImagePlugin
from PIL.ExifTags import Base

from fluxserve.errors import InvalidRequest
from fluxserve.media.colour import in_srgb
from fluxserve.media.png import strips
from fluxserve.media.png.texts import without_texts
from fluxserve.media.provenance import Provenance
from fluxserve.spec import Limits

Pixels = npt.NDArray[np.uint8]

_READABLE = ("PNG", "JPEG", "WEBP")
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture upright, by its EXIF orientation. From 5 on height and width change places."""

PngImagePlugin.MAX_TEXT_MEMORY = PngImagePlugin.MAX_TEXT_CHUNK  # unpacked with the header: 1 MiB and not 64


@dataclass(frozen=True)
class Fit:
    """How a picture becomes a model's input: scaled by Lanczos, then cut to its middle. Heights and widths."""

    scaled: tuple[int, int]
    size: tuple[int, int]


@dataclass(frozen=True)
class InputImage:
    """A PNG, JPEG or WebP file whose header was read. Height and width are those of the upright picture, in pixels."""

    data: bytes = field(repr=False)
    height: int
    width: int

    def resized(self, height: int, width: int) -> Fit:
        """Stretch to a size, as diffusers' VaeImageProcessor does."""
        return Fit((height, width), (height, width))

    def reference(self, most: int, multiple: int) -> Fit:
        """Scale down to at most `most` pixels, then cut to sides that are multiples.

        As Flux2KleinPipeline.__call__ and Flux2ImageProcessor prepare one: never stretched, never enlarged.
        """
        height, width = self.height, self.width
        if height * width > most:
            scale = math.sqrt(most / (width * height))
            height, width = int(height * scale), int(width * scale)
        return Fit((height, width), (height // multiple * multiple, width // multiple * multiple))


def read_image(data: bytes, limits: Limits) -> InputImage:
    """Read the header of a PNG, JPEG or WebP file.

    Raises:
        InvalidRequest: too large, of another format, or a bomb.
    """
    if len(data) > limits.max_image_bytes:
        raise InvalidRequest("image", f"{len(data)} bytes", f"at most {limits.max_image_bytes} bytes")
    allowed = f"a whole {', '.join(_READABLE)} file of at most {limits.max_decoded_pixels} pixels"
    with _opened(data, allowed) as picture:
        if picture.format == "JPEG":  # decoded at a fraction of its size
            allowed = f"a whole JPEG file of at most {limits.max_image_pixels} pixels"
        most = limits.max_image_pixels if picture.format == "JPEG" else limits.max_decoded_pixels
        if picture.width * picture.height > most:
            raise InvalidRequest("image", f"an image of {picture.width} x {picture.height} pixels", allowed)
        width, height = picture.size if _orientation(picture) < 5 else picture.size[::-1]
        return InputImage(data, height, width)


def decode(data: bytes, fit: Fit) -> Pixels:
    """Decode a file that `read_image` took: uint8 RGB [height, width, 3], upright, alpha laid over white.

    A JPEG of more than twice the size that it is scaled to is decoded at 1/2, 1/4 or 1/8: libjpeg scales before the
    inverse DCT, and Lanczos the rest.

    Raises:
        InvalidRequest: damaged or truncated.
    """
    with _opened(data, "a whole file") as picture:
        orientation = _orientation(picture)
        height, width = fit.scaled if orientation < 5 else fit.scaled[::-1]
        if picture.format == "JPEG":
            picture.draft(None, (2 * width, 2 * height))
        picture.load()
        upright = picture.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else picture
        rgb = _rgb(upright)
        if rgb.size != fit.scaled[::-1]:
            rgb = rgb.resize(fit.scaled[::-1], Image.Resampling.LANCZOS)
        pixels = np.asarray(rgb)
        top, left = ((have - cut) // 2 for have, cut in zip(fit.scaled, fit.size, strict=True))
        return np.ascontiguousarray(pixels[top : top + fit.size[0], left : left + fit.size[1]])


@contextmanager
def _opened(data: bytes, allowed: str) -> Iterator[Image.Image]:
    """A file as Pillow opens it, its header read. Pillow's errors become ours."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows, on the header
            picture = Image.open(io.BytesIO(without_texts(data)), formats=_READABLE)
    except Image.DecompressionBombError as error:
        raise InvalidRequest("image", "an image of far too many pixels", allowed) from error
    except (OSError, ValueError, SyntaxError) as error:
        raise InvalidRequest("image", f"{len(data)} bytes of {_likely(data)}", allowed) from error
    try:
        yield picture
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


def _orientation(picture: Image.Image) -> int:
    """EXIF's, as far as it stands before the pixels: PNG's own method would decode them to look for more."""
    orientation = Image.Image.getexif(picture).get(Base.Orientation, 1)
    return orientation if isinstance(orientation, int) else 1


def _rgb(picture: Image.Image) -> Image.Image:
    picture = in_srgb(picture)
    if picture.mode == "I" or picture.mode.startswith("I;16"):  # 16-bit grey, which Pillow would clip and not scale
        return Image.fromarray((np.asarray(picture).astype(np.uint32) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return picture.convert("RGB")


def write_image(pixels: Pixels, output_format: str, quality: int, provenance: Provenance | None = None) -> bytes:
    """Encode uint8 [height, width, 3] as one of contract.OUTPUT_FORMATS. PNG and raw are exact, WebP and JPEG lossy.

    The file carries the provenance; raw pixels have no place for it. None is for pictures that no model drew.
    """
    if output_format == "raw":
        return pixels.tobytes()
    if output_format == "png":
        return strips.encode(pixels, provenance.png_chunks() if provenance else b"")
    out = io.BytesIO()
    Image.fromarray(pixels).save(
        out, format=output_format, quality=quality, **({"xmp": provenance.xmp()} if provenance else {})
    )
    return out.getvalue()
