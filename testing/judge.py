"""Says what a picture shows: a small classifier names the object, the border's pixels name the background.

The classifier was trained on drawn pictures (``training.judge``), never on a generated one.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from training.grammar import COLOURS

WEIGHTS = Path(__file__).with_name("judge.safetensors")
_BORDER = 3  # pixels; no icon reaches them, at any size of the grammar


class ObjectNet(nn.Module):
    """Five strided convolutions and a mean: [B, 3, H, W] in -1..1 → logits [B, objects]."""

    def __init__(self, objects: int):
        super().__init__()
        widths = (3, 24, 48, 80, 112, 160)
        blocks = [
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(8, b), nn.SiLU())
            for a, b in itertools.pairwise(widths)
        ]
        self.body = nn.Sequential(*blocks, nn.Conv2d(160, 160, 3, 1, 1), nn.GroupNorm(8, 160), nn.SiLU())
        self.head = nn.Linear(160, objects)

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(images)
        return self.head(features.mean((2, 3)) + features.amax((2, 3)))


@dataclass(frozen=True)
class Verdict:
    """Accuracies in 0..1, and what was seen: indices of objects and of colours, [N] each."""

    object_accuracy: float
    colour_accuracy: float
    objects: Tensor
    colours: Tensor


def oklab(rgb: Tensor) -> Tensor:
    """sRGB in 0..1 → OKLab (B. Ottosson, 2020), where distances are close to seen differences: [..., 3]."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055).clamp(min=0) ** 2.4)
    lms = linear @ torch.tensor(
        [
            [0.41222147, 0.21190350, 0.08830246],
            [0.53633254, 0.68069955, 0.28171884],
            [0.05144599, 0.10739696, 0.62997870],
        ]
    )
    return lms.clamp(min=0) ** (1 / 3) @ torch.tensor(
        [
            [0.21045426, 1.97799850, 0.02590404],
            [0.79361779, -2.42859221, 0.78277177],
            [-0.00407205, 0.45059371, -0.80867577],
        ]
    )


def background_colours(images: Tensor) -> Tensor:
    """Nearest palette colour of each picture's border, by the median pixel: uint8 [N, H, W, 3] → int64 [N]."""
    b = _BORDER
    sides = (images[:, :b], images[:, -b:], images[:, :, :b], images[:, :, -b:])
    border = torch.cat([side.flatten(1, 2) for side in sides], 1).float() / 255
    palette = oklab(torch.tensor(list(COLOURS.values())).float() / 255)
    return torch.cdist(oklab(border.median(1).values), palette).argmin(1)


def load_judge(path: Path = WEIGHTS) -> ObjectNet:
    """Read the classifier, in float32 on the CPU."""
    weights = {name: tensor.float() for name, tensor in load_file(path).items()}
    net = ObjectNet(len(weights["head.bias"]))
    net.load_state_dict(weights)
    return net.eval()


@torch.inference_mode()
def name_objects(net: ObjectNet, images: Tensor) -> Tensor:
    """Most likely object of each picture: uint8 [N, H, W, 3] → int64 [N]."""
    pixels = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    return torch.cat([net(part).argmax(1) for part in pixels.split(64)])


def judge(net: ObjectNet, images: Tensor, asked: Sequence[tuple[int, int]]) -> Verdict:
    """Compare pictures with the (object, colour) pairs that were asked for: uint8 [N, H, W, 3]."""
    wanted = torch.tensor(asked)
    objects, colours = name_objects(net, images), background_colours(images)
    return Verdict(
        float((objects == wanted[:, 0]).double().mean()),
        float((colours == wanted[:, 1]).double().mean()),
        objects,
        colours,
    )
