"""Activations' ranges, measured on real prompts along real trajectories.

PyTorch draws every prompt of the calibration file; hooks see each quantised linear's input and each FP8 attention's
q, k, v at every timestep, as they are. Kept is a histogram of log2|x| for each tensor, from which any method reads its
amax; fluxserve_export.fp8 and fluxserve.engines.fused.scales turn amax into scales. The same prompts, seed and steps
give the same numbers on one kind of device.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fluxserve.errors import ExportError
from fluxserve.families import registry
from fluxserve.folders.artifact import Ranges
from fluxserve.media.images import write_image
from fluxserve.pipeline import Pipeline
from fluxserve.request import DEFAULT_QUALITY
from fluxserve.text import Tokenizers
from fluxserve_export.fp8 import (
    ATTENTION,
    KEPT,
    attention_modules,
    quantised_linears,
    watched_attention,
)

METHODS = ("max", "percentile-99.999", "percentile-99.99")
"""The first is the default: nothing that was tried beats it (benchmarks/calibration.py)."""
_BINS_PER_OCTAVE, _LEAST, _MOST = 16, -40, 40
BIN_WIDTH = 1 / _BINS_PER_OCTAVE
"""Of a histogram of log2|x|."""

Progress = Callable[[int, int], None]


def dtype_on(device: str) -> torch.dtype:
    """What the model computes in while it is watched: ranges need no more digits than bfloat16 has, and a GPU is ten
    times as fast in it."""
    return torch.float32 if device == "cpu" else torch.bfloat16


@dataclass(frozen=True)
class Prompts:
    """A calibration file: one prompt a line, empty lines and lines that begin with # left out."""

    lines: tuple[str, ...]
    sha256: str


def read_prompts(file: Path) -> Prompts:
    """Raises ExportError."""
    try:
        content = file.read_bytes()
        lines = [line.strip() for line in content.decode("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"{file}: unreadable ({error}); expected a text file, one prompt a line") from error
    prompts = tuple(line for line in lines if line and not line.startswith("#"))
    if not prompts:
        raise ExportError(f"{file}: no prompts; expected one a line")
    return Prompts(prompts, hashlib.sha256(content).hexdigest())


@dataclass(frozen=True)
class Calibration:
    """How ranges are measured."""

    prompts: Prompts
    count: int
    """How many of the prompts are drawn, from the first."""
    steps: int
    seed: int
    """Prompt k is drawn from seed + k."""
    method: str
    device: str


class Histogram:
    """How large a tensor's values get: their maximum, and a histogram of log2|x|."""

    def __init__(self) -> None:
        self._largest = 0.0
        self._counts = torch.zeros((_MOST - _LEAST) * _BINS_PER_OCTAVE, dtype=torch.int64)

    @property
    def seen(self) -> bool:
        return bool(self._counts.sum())

    def see(self, x: Tensor) -> None:
        """Raises ValueError if a value is not finite."""
        magnitude = x.detach().abs().float()
        largest = float(magnitude.max())
        if not math.isfinite(largest):
            raise ValueError(f"got {largest}; expected finite values")
        self._largest = max(self._largest, largest)
        bins = ((magnitude.clamp(min=2.0**_LEAST).log2() - _LEAST) * _BINS_PER_OCTAVE).long()
        counted = torch.bincount(bins.flatten().clamp_(max=len(self._counts) - 1), minlength=len(self._counts))
        self._counts += counted.cpu()

    def amax(self, method: str) -> float:
        """By a method of METHODS; never more than the maximum, and above 0."""
        if method == "max":
            return max(self._largest, 1e-12)
        share = float(method.removeprefix("percentile-")) / 100
        reached = (self._counts.cumsum(0) >= share * self._counts.sum()).nonzero()[0]
        upper = 2.0 ** (_LEAST + (float(reached) + 1) / _BINS_PER_OCTAVE)
        return float(max(min(upper, self._largest), 1e-12))

    def bins(self) -> tuple[Tensor, Tensor]:
        """Bins that were hit: how often, int64, and where each begins, as log2|x|; BIN_WIDTH wide."""
        hit = self._counts.nonzero().flatten()
        return self._counts[hit], _LEAST + hit / _BINS_PER_OCTAVE


@dataclass(frozen=True)
class Histograms:
    """Of one component: each quantised linear's input; each FP8 attention's q, k, v, and v less its mean over
    tokens."""

    linears: Mapping[str, Histogram]
    attention: Mapping[str, tuple[Histogram, Histogram, Histogram]]
    centred: Mapping[str, Histogram]

    def ranges(self, method: str) -> Ranges:
        """Return the amax of each tensor by a method of METHODS."""
        q_k_v = {name: tuple(h.amax(method) for h in each) for name, each in self.attention.items()}
        linears, centred = ({name: h.amax(method) for name, h in each.items()} for each in (self.linears, self.centred))
        return Ranges(linears, q_k_v, centred)  # type: ignore[arg-type]


@contextmanager
def watched(component: str, module: nn.Module) -> Iterator[Histograms]:
    """Within, every call of the module adds to the histograms."""
    linears = {name: Histogram() for name in quantised_linears(component, module)}
    attention: dict[str, tuple[Histogram, Histogram, Histogram]] = {}
    centred: dict[str, Histogram] = {}

    def see(name: str, q: Tensor, k: Tensor, v: Tensor) -> None:
        seen = attention.setdefault(name, (Histogram(), Histogram(), Histogram()))
        for histogram, x in zip(seen, (q, k, v), strict=True):
            note(name, histogram, x)
        note(name, centred.setdefault(name, Histogram()), v - v.mean(dim=-2, keepdim=True))

    def note(name: str, histogram: Histogram, x: Tensor) -> None:
        try:
            histogram.see(x)
        except ValueError as error:
            raise ExportError(f"calibrate: {component}.{name}: {error}") from error

    with ExitStack() as stack:
        for name, linear in quantised_linears(component, module).items():
            hook = linear.register_forward_pre_hook(lambda _, x, name=name: note(name, linears[name], x[0]))
            stack.callback(hook.remove)
        stack.enter_context(watched_attention(component, module, see))
        yield Histograms(linears, attention, centred)


def calibrate(
    pipeline: Pipeline,
    tokenizers: Tokenizers,
    modules: Mapping[str, nn.Module],
    asked: Calibration,
    size: tuple[int, int],
    progress: Progress = lambda *_: None,
) -> dict[str, Histograms]:
    """Draw every prompt and watch; with a model that takes references, each picture once more with itself as one.

    Args:
        pipeline: over torch_eager's components of `modules`, so that the hooks see what it runs.
        size: height, width in pixels.

    Returns:
        component → histograms, for the components that FP8 is for.
    """
    assert set(ATTENTION) <= set(KEPT)
    with ExitStack() as stack:
        found = (name for name in KEPT if name in modules)
        histograms = {name: stack.enter_context(watched(name, modules[name])) for name in found}
        prompts = asked.prompts.lines[: asked.count]
        for index, prompt in enumerate(prompts):
            fields = {
                "prompt": prompt.encode(),
                "height": size[0],
                "width": size[1],
                "num_inference_steps": asked.steps,
                "seed": asked.seed + index,
            }
            picture = _draw(pipeline, tokenizers, fields)
            if pipeline.spec.takes_references:
                _draw(pipeline, tokenizers, {**fields, "image": [write_image(picture, "png", DEFAULT_QUALITY)]})
            progress(index + 1, len(prompts))
    for name, seen in histograms.items():
        _refuse_unseen(name, seen, modules[name])
    return histograms


def _draw(pipeline: Pipeline, tokenizers: Tokenizers, fields: Mapping[str, Any]) -> npt.NDArray[np.uint8]:
    """What a caller would get, uint8 [height, width, 3]."""
    (drawing,) = pipeline.draw([registry.plan(fields, pipeline.spec, tokenizers)])
    assert drawing is not None, "nobody can cancel it"
    image: npt.NDArray[np.uint8] = drawing.images[0]
    return image


def _refuse_unseen(component: str, seen: Histograms, module: nn.Module) -> None:
    """Raise ExportError for what was never called: it would be quantised by nothing, or quietly not at all."""
    missing = set(attention_modules(component, module)) - set(seen.attention)
    missing |= {name for name, histogram in seen.linears.items() if not histogram.seen}
    if missing:
        names = ", ".join(sorted(missing)[:5])
        raise ExportError(
            f"calibrate: {component}: nothing passed through {names} ({len(missing)} in all); attention has to go"
            " through torch's scaled_dot_product_attention, which diffusers' other backends do not call"
        )
