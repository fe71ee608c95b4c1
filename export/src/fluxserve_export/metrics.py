"""How far one set of numbers is from another. No library of an engine is needed for it."""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fluxserve.engine import FLOATING, Signature

Tensors = Mapping[str, Tensor]

EQUAL_DB = 99.0


def relative_error(got: Tensor, expected: Tensor) -> float:
    """‖got − expected‖ / ‖expected‖ in float64; infinite where a number is not finite."""
    a, b = got.double(), expected.double()
    error = float((a - b).norm() / b.norm().clamp(min=1e-30))
    return error if math.isfinite(error) else math.inf


def cosine(got: Tensor, expected: Tensor) -> float:
    a, b = got.double().flatten(), expected.double().flatten()
    return float(torch.dot(a, b) / (a.norm() * b.norm()).clamp(min=1e-30))


def psnr(got: npt.NDArray[np.uint8], expected: npt.NDArray[np.uint8]) -> float:
    """Of 8-bit images, in dB; at most EQUAL_DB, which equal ones get."""
    error = float(np.mean((got.astype(np.float64) - expected.astype(np.float64)) ** 2))
    return min(10 * math.log10(255**2 / error), EQUAL_DB) if error else EQUAL_DB


def outputs_of(module: nn.Module, signature: Signature, inputs: Tensors) -> dict[str, Tensor]:
    """A wrapper of torch_eager called on tensors, FLOATING ones in the dtype and on the device of its weights."""
    weight = next(module.parameters())
    dtypes = {t.name: weight.dtype if t.dtype == FLOATING else getattr(torch, t.dtype) for t in signature.inputs}
    with torch.inference_mode():
        results = module(**{name: inputs[name].to(weight.device, dtype) for name, dtype in dtypes.items()})
    results = (results,) if isinstance(results, Tensor) else results
    return {t.name: r.float().cpu() for t, r in zip(signature.outputs, results, strict=True)}
