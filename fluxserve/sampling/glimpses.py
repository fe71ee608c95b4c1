"""Glimpses: latents projected linearly to RGB, at the latents' own resolution.

A VAE's latents are nearly linear in the mean colour of the square of pixels that each of them stands for. The
projection is fitted by least squares when a model is loaded: from one synthetic image and what the VAE's encoder makes
of it. It has 3 · (C + 1) numbers.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

_SEED = 0
_GRIDS = (4, 16, 64)
"""Squares to a side: areas of one colour, details, and what is finer than most latents."""


def colours(side: int) -> npt.NDArray[np.uint8]:
    """Return an image of many colours, uint8 [side, side, 3]: smooth on its left half, with edges on its right."""
    generator = torch.Generator("cpu").manual_seed(_SEED)
    grids = [torch.rand(1, 3, n, n, generator=generator) for n in _GRIDS if n <= side]
    smooth = sum(interpolate(grid, (side, side), mode="bilinear") for grid in grids)
    edged = sum(interpolate(grid, (side, side)) for grid in grids)
    image = torch.cat([torch.as_tensor(smooth)[..., : side // 2], torch.as_tensor(edged)[..., side // 2 :]], dim=-1)
    spread = (image / len(grids) - 0.5) * len(grids) ** 0.5 + 0.5  # a mean of several is narrower than one
    pixels: npt.NDArray[np.uint8] = (spread.clamp(0, 1) * 255).round().to(torch.uint8)[0].permute(1, 2, 0).numpy()
    return np.ascontiguousarray(pixels)


def fit(latents: Tensor, image: npt.NDArray[np.uint8]) -> Tensor:
    """Fit the projection, float32 [C + 1, 3] on the latents' device; its last row is the constant.

    Args:
        latents: of the image, as the VAE's decoder reads them, [1, C, h, w].
        image: uint8 [H, W, 3].
    """
    downscale = image.shape[0] // latents.shape[2]
    means = avg_pool2d(torch.from_numpy(image).permute(2, 0, 1)[None].double() / 255, downscale)
    given = latents[0].flatten(1).T.double().cpu().numpy()
    solution = np.linalg.lstsq(np.c_[given, np.ones(len(given))], means[0].flatten(1).T.numpy(), rcond=None)[0]
    return torch.from_numpy(solution.astype(np.float32)).to(latents.device)


def project(latents: Tensor, projection: Tensor) -> Tensor:
    """Return latents [C, h, w] as pixels, uint8 [h, w, 3]."""
    rgb = torch.addmm(projection[-1], latents.flatten(1).T.to(projection.dtype), projection[:-1])
    return (rgb.clamp_(0, 1) * 255).round_().to(torch.uint8).view(*latents.shape[1:], 3)
