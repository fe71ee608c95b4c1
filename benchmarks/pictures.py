"""Pictures to work on, where it matters how large they are and not what they show; and how sizes are spelled."""

import numpy as np
import numpy.typing as npt


def photograph(size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """uint8 [height, width, 3] with gradients and noise; its PNG is about as large as a photograph's."""
    y, x = np.mgrid[: size[0], : size[1]]
    noise = np.random.default_rng(0).normal(0, 4, (*size, 3))
    smooth = 128 + 100 * np.sin(x / 90)[..., None] * np.cos(y / 70)[..., None]
    image: npt.NDArray[np.uint8] = (smooth + noise).clip(0, 255).astype(np.uint8)
    return image


def sides(text: str) -> tuple[int, int]:
    """Height and width of "HxW"."""
    height, width = (int(side) for side in text.split("x"))
    return height, width
