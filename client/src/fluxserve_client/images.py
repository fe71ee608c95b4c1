"""What is sent for an `image`: a file that shows what a viewer shows of whatever the caller has.

Files that the server reads go as they are, byte by byte; it applies their orientation and colour profile itself. What
Pillow holds, and files of other formats, become a PNG: upright, 8 bits, grey or RGB, perhaps with alpha.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageCms, ImageOps

ImageInput: TypeAlias = bytes | os.PathLike[str] | Image.Image | str

_OTHER_FORMATS = ("GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")  # where this Pillow reads them

# What PNG, JPEG and WebP files begin with, as they are and in base64.
_MAGIC = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|RIFF....WEBP", re.DOTALL)
_BASE64 = re.compile(r"(?:data:image/[\w.+-]+(?:;[\w=.-]+)*;base64,)?\s*(iVBORw0KGgo|/9j/|UklGR|R0lGOD|Qk0)")


def file_of(name: str, value: object) -> bytes:
    """The file to send for one picture.

    Args:
        name: the input's, for errors.
        value: the bytes of a file, a path, a Pillow image; or text: a data URI, or a file in base64.

    Raises:
        TypeError: something else, such as a URL, which is not fetched.
        ValueError: base64 that is damaged, or a picture that cannot be written.
        OSError: a path that cannot be read.
    """
    if isinstance(value, Image.Image):
        return _as_png(name, value)
    if isinstance(value, os.PathLike):
        return _readable(name, Path(value).read_bytes())
    if isinstance(value, bytes | bytearray | memoryview):
        return _readable(name, bytes(value))
    if isinstance(value, str):
        return _readable(name, _from_text(name, value))
    raise TypeError(f"{name}: got {type(value).__name__}, expected bytes, a pathlib.Path or a Pillow image")


def _from_text(name: str, text: str) -> bytes:
    if not _BASE64.match(text):
        shown = text if len(text) <= 40 else f"{text[:40]}…"
        raise TypeError(f"{name}: got the text {shown!r}, expected a pathlib.Path, or base64; URLs are not fetched")
    try:
        return base64.b64decode("".join(text.rpartition(",")[2].split()), validate=True)
    except binascii.Error as error:
        raise ValueError(f"{name}: damaged base64: {error}") from error


def _readable(name: str, data: bytes) -> bytes:
    """The same file if the server reads its format, or cannot be helped with it; else as a PNG."""
    if _MAGIC.match(data):
        return data
    if data[:64].isascii() and _BASE64.match(data[:64].decode()):
        return _readable(name, _from_text(name, data.decode("ascii", "replace")))
    Image.init()
    try:
        picture = Image.open(io.BytesIO(data), formats=[known for known in _OTHER_FORMATS if known in Image.OPEN])
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return data  # the server says what it allows
    return _as_png(name, picture)


def _as_png(name: str, picture: Image.Image) -> bytes:
    file = io.BytesIO()
    try:
        normal = _eight_bits(ImageOps.exif_transpose(picture))
        normal.save(file, "PNG", compress_level=1, icc_profile=normal.info.get("icc_profile"))
    except (ValueError, SyntaxError, EOFError, Image.DecompressionBombError, ImageCms.PyCMSError) as error:
        raise ValueError(f"{name}: a {picture.mode} picture of {picture.size} cannot be sent: {error}") from error
    return file.getvalue()


def _eight_bits(picture: Image.Image) -> Image.Image:
    """The picture in L, LA, RGB or RGBA. A profile stays with colours that stay what they were."""
    mode = picture.mode
    if mode == "CMYK":
        return _without_profile(_from_cmyk(picture))
    if mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return _without_profile(_converted(picture, ImageCms.ImageCmsProfile(lab), ImageCms.ImageCmsProfile(srgb)))
    if mode == "I" or mode.startswith("I;16"):
        return Image.fromarray(np.clip(np.asarray(picture).astype(np.int64) >> 8, 0, 255).astype(np.uint8))
    grey = mode in ("1", "L", "LA", "La", "F")
    if picture.has_transparency_data:
        return picture.convert("LA" if grey else "RGBA")
    return picture.convert("L" if grey else "RGB")


def _from_cmyk(picture: Image.Image) -> Image.Image:
    if profile := picture.info.get("icc_profile"):
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            return _converted(picture, source, ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")))
        except (OSError, ImageCms.PyCMSError):
            pass  # a profile that no viewer could use either
    return picture.convert("RGB")


def _converted(picture: Image.Image, source: ImageCms.ImageCmsProfile, target: ImageCms.ImageCmsProfile) -> Image.Image:
    converted = ImageCms.profileToProfile(picture, source, target, outputMode="RGB")
    assert converted is not None  # it is None only where the picture is changed in place
    return converted


def _without_profile(picture: Image.Image) -> Image.Image:
    picture.info.pop("icc_profile", None)
    return picture
