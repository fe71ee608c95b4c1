"""How far pictures are from each other, picture by picture: in pixels, in structure, in a network's features.

Three measures, because they disagree: of a shade that is off everywhere and noise, at one PSNR, MS-SSIM calls the noise
worse and the judge's features the shade.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fluxserve_export.metrics import EQUAL_DB, psnr
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fluxserve.errors import SettingsError
from testing.judge import ObjectNet, load_judge

Taps = Callable[[Tensor], list[Tensor]]
"""Pixels, [N, 3, H, W] in -1..1 → features at several depths, [N, C, h, w] each."""


@dataclass(frozen=True)
class Measure:
    """One way of comparing: uint8 [H, W, 3] twice, on one device → a number. Their order makes no difference."""

    key: str
    title: str
    """What exactly it is, for whoever reads a result."""
    larger_is_closer: bool
    of: Callable[[Tensor, Tensor], float]


def measures(features: "Features | None") -> list[Measure]:
    """All there are; the last is the one that is most like an eye."""
    found = [
        Measure("psnr", f"PSNR, dB ({EQUAL_DB:.0f}: equal)", True, _psnr),
        Measure("ms_ssim", "MS-SSIM, mean of R, G, B (1: equal)", True, ms_ssim),
    ]
    if features:
        found.append(Measure("features", f"{features.title} (0: equal)", False, features.distance))
    return found


def _psnr(a: Tensor, b: Tensor) -> float:
    return psnr(a.cpu().numpy(), b.cpu().numpy())


def as_pixels(picture: Tensor) -> Tensor:
    """uint8 [H, W, 3] → float32 [1, 3, H, W] in -1..1."""
    return picture.permute(2, 0, 1)[None].float() / 127.5 - 1


# --- structure -------------------------------------------------------------------------------------------------------

_SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang, Simoncelli, Bovik (2003)
_WINDOW, _SIGMA = 11, 1.5
_STABLE = (0.01**2, 0.03**2)


def ms_ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity at up to five scales: as many as the window fits into, their weights made to add up to 1.

    Negative terms count as 0, as everybody has it: they have no real power.
    """
    x, y = ((p.permute(2, 0, 1)[:, None].double() / 255) for p in (a, b))
    side = min(a.shape[:2])
    count = sum(side >> k >= _WINDOW for k in range(len(_SCALES)))
    if not count:
        raise ValueError(f"MS-SSIM: got {a.shape[0]}x{a.shape[1]}; expected sides of {_WINDOW} pixels or more")
    product = torch.ones(3, dtype=x.dtype, device=x.device)
    for index, weight in enumerate(_SCALES[:count]):
        if index:
            x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
        whole, contrast = _ssim(x, y)
        term = whole if index == count - 1 else contrast
        product *= term.clamp(min=0) ** (weight / sum(_SCALES[:count]))
    return float(product.mean())


def _ssim(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Similarity, and its part that is contrast and structure, of each channel: [3, 1, H, W] in 0..1 → [3] twice."""
    offsets = torch.arange(_WINDOW, dtype=x.dtype, device=x.device) - _WINDOW // 2
    line = torch.exp(-(offsets**2) / (2 * _SIGMA**2))
    line /= line.sum()

    def blur(z: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(z, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    light = (2 * mean_x * mean_y + _STABLE[0]) / (mean_x**2 + mean_y**2 + _STABLE[0])
    contrast = (2 * covariance + _STABLE[1]) / (var_x + var_y + _STABLE[1])
    return (light * contrast).mean((1, 2, 3)), contrast.mean((1, 2, 3))


# --- features --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Features:
    """A network by whose features pictures are compared, as LPIPS does it (Zhang et al., 2018).

    Features are brought to unit length over the channels; the squared differences are added up over channels and
    depths, and averaged over places. LPIPS weighs channels with what it learned from people's judgements; here they
    count alike, unless such weights are there.
    """

    title: str
    taps: Taps
    weights: Sequence[Tensor] | None = None
    """Of each depth's channels, [1, C, 1, 1]; None: all 1."""

    @torch.inference_mode()
    def distance(self, a: Tensor, b: Tensor) -> float:
        """uint8 [H, W, 3] twice."""
        total = 0.0
        for depth, (x, y) in enumerate(zip(self.taps(as_pixels(a)), self.taps(as_pixels(b)), strict=True)):
            difference = (_unit(x) - _unit(y)).square()
            if self.weights:
                difference = difference * self.weights[depth]
            total += float(difference.sum(1).mean())
        return total


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)


def judges_features(device: str = "cpu") -> Features:
    """Those of the classifier that judges the tiny model: it knows that model's pictures, and nothing else."""
    net = load_judge().to(device)
    return Features("LPIPS-style, unweighted, features of tests/quality/judge", lambda pixels: _judge_taps(net, pixels))


def _judge_taps(net: ObjectNet, pixels: Tensor) -> list[Tensor]:
    """Behind each of its six activations."""
    found, blocks = [], list(net.body)
    for block in (*blocks[:5], torch.nn.Sequential(*blocks[5:])):
        pixels = block(pixels)
        found.append(pixels)
    return found


Pool = tuple[int, int] | None
"""Window and stride of the maximum before a stage's convolutions."""

_SAME = (1, 1)
_STAGES: dict[str, list[tuple[Pool, tuple[tuple[int, int], ...]]]] = {
    "AlexNet": [(None, ((4, 2),)), ((3, 2), ((1, 2),)), ((3, 2), (_SAME,)), (None, (_SAME,)), (None, (_SAME,))],
    "VGG16": [(None, (_SAME,) * 2), ((2, 2), (_SAME,) * 2), *[((2, 2), (_SAME,) * 3)] * 3],
}
"""Where LPIPS listens: behind each of these. A convolution is its stride and padding; a ReLU follows it."""

_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # LPIPS' own, for pixels in -1..1


def read_features(file: Path, device: str = "cpu") -> Features:
    """A network of torchvision's, with LPIPS' weights of channels if they are in the same file.

    Args:
        file: safetensors with torchvision's names, `features.N.weight` and `features.N.bias` of AlexNet or VGG16 (a
            classifier may be there, and is left alone), and with lpips' names, `lin0.model.1.weight` to `lin4.…`.

    Raises:
        SettingsError: no such file, or one of another network.
    """
    expected = "safetensors of torchvision's AlexNet (5 convolutions features.N.weight) or VGG16 (13)"
    try:
        tensors = {name: tensor.float() for name, tensor in load_file(file, device).items()}
    except (OSError, SafetensorError) as error:
        raise SettingsError("features", f"{file} ({error})", expected) from error
    numbers = sorted(int(n.split(".")[1]) for n in tensors if n.startswith("features.") and n.endswith(".weight"))
    convolutions = [(tensors[f"features.{n}.weight"], tensors[f"features.{n}.bias"]) for n in numbers]
    counts = {name: sum(len(each) for _, each in stages) for name, stages in _STAGES.items()}
    name = next((name for name, count in counts.items() if count == len(convolutions)), None)
    chained = all(a.shape[0] == b.shape[1] for (a, _), (b, _) in pairwise(convolutions))
    if name is None or not chained:
        raise SettingsError("features", f"{file} with {len(convolutions)} of them", expected)
    listed = [f"lin{depth}.model.1.weight" for depth in range(len(_STAGES[name]))]
    weights = [tensors[key] for key in listed] if set(listed) <= set(tensors) else None
    title = f"LPIPS, {name}" if weights else f"LPIPS-style, unweighted, features of {name}"
    return Features(title, lambda pixels: _network_taps(_STAGES[name], convolutions, pixels), weights)


def _network_taps(
    stages: Sequence[tuple[Pool, tuple[tuple[int, int], ...]]],
    convolutions: Sequence[tuple[Tensor, Tensor]],
    pixels: Tensor,
) -> list[Tensor]:
    shift, scale = (pixels.new_tensor(values).view(1, 3, 1, 1) for values in (_SHIFT, _SCALE))
    x = (pixels - shift) / scale
    left, found = iter(convolutions), []
    for pool, layers in stages:
        if pool:
            x = F.max_pool2d(x, *pool)
        for stride, padding in layers:
            weight, bias = next(left)
            x = F.relu(F.conv2d(x, weight, bias, stride, padding))
        found.append(x)
    return found


# --- many pictures ---------------------------------------------------------------------------------------------------

NUMBERS = ("median", "p10", "p90", "worst")


def compare(a: Tensor, b: Tensor, ways: Sequence[Measure], device: str) -> dict[str, list[float]]:
    """Picture by picture, by measure: uint8 [N, H, W, 3] twice."""
    found: dict[str, list[float]] = {way.key: [] for way in ways}
    for x, y in zip(a, b, strict=True):
        x, y = x.to(device), y.to(device)
        for way in ways:
            found[way.key].append(way.of(x, y))
    return found


def summary(values: Sequence[float], way: Measure, prompts: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """Median, the deciles at either end, and the picture that is farthest off."""
    levels = torch.tensor(values).double().quantile(torch.tensor([0.5, 0.1, 0.9]).double())
    worst = by_distance(values, way)[-1]
    numbers = dict(zip(NUMBERS, [*levels.tolist(), values[worst]], strict=True))
    return {k: round(v, 5) for k, v in numbers.items()} | {"prompt": prompts[worst], "seed": seeds[worst]}


def strayed(values: Sequence[float], way: Measure, yardstick: Mapping[str, Any]) -> int:
    """How many pictures are as far off as the closest tenth of the yardstick's: other pictures, and not worse ones."""
    if way.larger_is_closer:
        return sum(value <= yardstick["p90"] for value in values)
    return sum(value >= yardstick["p10"] for value in values)


def by_distance(values: Sequence[float], way: Measure) -> list[int]:
    """Indices of pictures, the closest first."""
    return sorted(range(len(values)), key=values.__getitem__, reverse=way.larger_is_closer)
