"""Compositing: the right icon, where it should be, on the right ground."""

import numpy as np
import pytest
import torch

from training.grammar import COLOURS
from training.scenes import SHIFT, Scenes, as_bytes


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    icons = np.zeros((2, 64, 64, 4), np.uint8)
    icons[0, ..., 3] = 255  # an opaque black square
    icons[1, 16:48, 16:48] = 255  # a white square in the middle, transparent around
    return Scenes(icons, "cpu")


def draw(scenes: Scenes, thing: int, colour: int, ratio: float, size: tuple[int, int], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scenes.draw(torch.tensor([thing] * 4), torch.tensor([colour] * 4), ratio, size, generator)


@pytest.mark.parametrize("colour", range(len(COLOURS)))
def test_the_ground_is_a_shade_of_its_colour(scenes: Scenes, colour: int) -> None:
    corner = as_bytes(draw(scenes, 1, colour, 0.5, (128, 128)))[:, 0, 0].float()
    wanted = torch.tensor(list(COLOURS.values())[colour]).float()
    assert (corner - wanted).abs().max() <= 0.05 * 255 + 5 + 1


@pytest.mark.parametrize("size", [(128, 128), (96, 160), (192, 128)])
def test_an_icon_has_its_size_and_lies_near_the_centre(scenes: Scenes, size: tuple[int, int]) -> None:
    black = draw(scenes, 0, list(COLOURS).index("white"), 0.5, size).amax(1) < -0.99  # [4, H, W]
    side = round(0.5 * min(size))
    for picture in black:
        rows, cols = picture.any(1).nonzero(), picture.any(0).nonzero()
        assert len(rows) == len(cols) == side
        for line, length in ((rows, size[0]), (cols, size[1])):
            centre = float(line.float().mean()) + 0.5
            assert abs(centre - length / 2) <= SHIFT * min(size) + 1


def test_transparent_pixels_show_the_ground_and_no_fringe(scenes: Scenes) -> None:
    red = draw(scenes, 1, list(COLOURS).index("red"), 0.5, (128, 128))
    assert red[:, 0].min() > 0.5  # white over red: the red channel never darkens at an edge


def test_the_same_seed_draws_the_same_picture(scenes: Scenes) -> None:
    first, again, other = (draw(scenes, 0, 3, 0.5, (128, 128), seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
