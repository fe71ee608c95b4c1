"""Draw icons onto coloured backgrounds, in batches, on the GPU if there is one.

All resizing is done once a size, with antialiasing, on premultiplied alpha; placing an icon is then a
gather at whole pixels, which blurs nothing.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from training.grammar import COLOURS

SHIFT = 0.035  # an icon lies off the centre by at most this part of the shorter side
_SHADE, _TINT = 0.05, 5.0  # a background varies by ±5% in brightness and ±5/255 in each channel


class Scenes:
    """Icons held on a device, ready to be drawn.

    Args:
        icons: uint8 [N, S, S, 4], straight alpha.
    """

    def __init__(self, icons: np.ndarray, device: torch.device | str):
        rgba = torch.from_numpy(np.ascontiguousarray(icons)).to(device).permute(0, 3, 1, 2).float() / 255
        self.icons = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)  # premultiplied
        self.palette = torch.tensor(list(COLOURS.values()), device=device, dtype=torch.float32) / 255
        self.device = self.icons.device
        self._sized: dict[int, Tensor] = {}

    @classmethod
    def load(cls, path: Path, device: torch.device | str) -> "Scenes":
        """Read the file that ``training.icons`` wrote."""
        with np.load(path) as data:
            return cls(data["icons"], device)

    def sized(self, side: int) -> Tensor:
        """All icons at one size: float16 [N, 4, side, side], premultiplied."""
        if side not in self._sized:
            small = F.interpolate(self.icons, (side, side), mode="bicubic", antialias=True, align_corners=False)
            self._sized[side] = small.clamp_(0, 1).half()
        return self._sized[side]

    def backgrounds(self, colours: Tensor, generator: torch.Generator) -> Tensor:
        """Jittered shades of palette colours: [B] int64 → [B, 3] float32 in 0..1."""
        rgb = self.palette[colours]
        noise = torch.rand(len(rgb), 4, device=self.device, generator=generator) * 2 - 1
        return (rgb * (1 + _SHADE * noise[:, :1]) + noise[:, 1:] * (_TINT / 255)).clamp(0, 1)

    def place(self, count: int, side: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Top-left corners near the centre, inside the picture: int64 [count, 2] (y, x)."""
        room = torch.tensor([height - side, width - side], device=self.device)
        reach = torch.minimum(room // 2, torch.tensor(round(SHIFT * min(height, width)), device=self.device))
        step = torch.rand(count, 2, device=self.device, generator=generator) * (2 * reach + 1)
        return room // 2 - reach + step.long()

    def draw(
        self, things: Tensor, colours: Tensor, ratio: float, size: tuple[int, int], generator: torch.Generator
    ) -> Tensor:
        """Draw a batch.

        Args:
            things: [B] int64, icons; colours: [B] int64, palette entries.
            ratio: side of the icon over the shorter side of the picture.
            size: height and width in pixels.
        Returns: float32 [B, 3, H, W] in -1..1.
        """
        height, width = size
        side = 2 * round(ratio * min(size) / 2)
        corner = self.place(len(things), side, height, width, generator)
        rows = torch.arange(height, device=self.device) - corner[:, :1]  # [B, H]
        cols = torch.arange(width, device=self.device) - corner[:, 1:]  # [B, W]
        inside = ((rows >= 0) & (rows < side))[:, :, None] & ((cols >= 0) & (cols < side))[:, None, :]
        icon = self.sized(side)[
            things[:, None, None], :, rows.clamp(0, side - 1)[:, :, None], cols.clamp(0, side - 1)[:, None, :]
        ]  # [B, H, W, 4]
        icon = (icon.float() * inside[..., None]).permute(0, 3, 1, 2)
        ground = self.backgrounds(colours, generator)[:, :, None, None]
        return (icon[:, :3] + (1 - icon[:, 3:]) * ground) * 2 - 1


def as_bytes(images: Tensor) -> Tensor:
    """[B, 3, H, W] in -1..1 → uint8 [B, H, W, 3] on the CPU."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu()
