"""Several pictures on one sheet, and pictures to files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fluxserve_client.result import FORMAT_OF_SUFFIX


def grid(pictures: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """The pictures, all of one size, row by row on one RGB sheet; as square as it gets unless `columns` is given.

    Raises:
        ValueError: no pictures, or pictures of different sizes.
    """
    sizes = {picture.size for picture in pictures}
    if len(sizes) != 1:
        raise ValueError(f"pictures: got sizes {sorted(sizes)}, expected one or more pictures of one size")
    width, height = sizes.pop()
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    sheet = Image.new("RGB", (columns * width, math.ceil(len(pictures) / columns) * height))
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        sheet.paste(picture.convert("RGB"), (column * width, row * height))
    return sheet


def save(picture: Image.Image, path: Path, quality: int | None = None, xmp: bytes = b"") -> None:
    """Write `picture` in the format that the suffix of `path` names; `quality` is of jpeg and webp.

    `xmp` is a packet that says how the picture was made.

    Raises:
        ValueError: a suffix that names no format of pictures.
    """
    name = FORMAT_OF_SUFFIX.get(path.suffix.lower(), "raw")
    if name == "raw":
        raise ValueError(f"path: got {path.name!r}, expected a name ending in .png, .jpg or .webp")
    options: dict[str, Any] = {} if quality is None else {"quality": quality}
    if xmp and name == "png":
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", xmp.decode())
    elif xmp:
        options["xmp"] = xmp
    picture.save(path, name, **options)
