"""A contact sheet: rows of pictures under their titles, because people would rather look."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

AMPLIFIED = 8
_LEAST_SIDE = 256  # pixels; smaller pictures are shown enlarged, pixel by pixel
_GAP, _TEXT = 8, 14


@dataclass(frozen=True)
class Row:
    """title: what is shown, on a line above; pictures: uint8 [H, W, 3] each, all of one size."""

    title: str
    pictures: Sequence[Tensor]


def difference(a: Tensor, b: Tensor) -> Tensor:
    """|a − b| × AMPLIFIED, cut off at white: uint8 [H, W, 3]."""
    return ((a.int() - b.int()).abs() * AMPLIFIED).clamp(max=255).to(torch.uint8)


def sheet(columns: Sequence[str], rows: Sequence[Row]) -> Image.Image:
    """Rows below one another, under the columns' names."""
    height, width = rows[0].pictures[0].shape[:2]
    factor = max(1, -(-_LEAST_SIDE // min(height, width)))
    height, width = height * factor, width * factor
    line = _TEXT + _GAP
    whole = (_GAP + len(columns) * (width + _GAP), line + len(rows) * (line + height + _GAP))
    canvas = Image.new("RGB", whole, "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(_TEXT)
    for index, name in enumerate(columns):
        pen.text((_GAP + index * (width + _GAP), _GAP // 2), name, "black", font)
    for number, row in enumerate(rows):
        top = line + number * (line + height + _GAP)
        pen.text((_GAP, top + _GAP // 2), row.title, "black", font)
        for index, picture in enumerate(row.pictures):
            shown = Image.fromarray(picture.numpy()).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(shown, (_GAP + index * (width + _GAP), top + line))
    return canvas
