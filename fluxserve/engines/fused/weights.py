"""Weights on their way from safetensors to the device: read one by one, put together, quantised, never held twice."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fluxserve.engines.finite import extremes, refuse_infinite
from fluxserve.errors import CheckpointError
from fluxserve.kernels.fp8 import E4M3, quantise_rows
from fluxserve.kernels.gemm.layers import Linear
from fluxserve.kernels.operations import as_they_are
from fluxserve.weights import Weights


@dataclass(frozen=True)
class Precision:
    """compute: what residual stream, embedders and unquantised products are in; linear: what blocks multiply in."""

    compute: torch.dtype
    linear: torch.dtype

    @property
    def quantised(self) -> bool:
        return self.linear == E4M3


class Reader:
    """The tensors of one component, by diffusers' and transformers' names.

    Args:
        weights: of the component's folder.
        prefix: only tensors whose names begin with it, and without it; all of them, if none does.
    """

    def __init__(self, weights: Weights, device: torch.device, prefix: str = "") -> None:
        self._folder, self._prefix, self.device = weights.folder, prefix, device
        opened: dict[Path, Any] = {
            file: safe_open(file, framework="pt", device=str(device)) for file in weights.set.files
        }
        self._files = {name: opened[tensor.file] for name, tensor in weights.tensors.items()}
        self._extremes: dict[str, Tensor] = {}
        if not any(name.startswith(prefix) for name in self._files):
            self._prefix = ""
        self._unread = {name.removeprefix(prefix) for name in self._files if name.startswith(self._prefix)}

    def __contains__(self, name: str) -> bool:
        return self._prefix + name in self._files

    def __call__(self, name: str) -> Tensor:
        """One tensor, as it was stored. Raises CheckpointError."""
        full = self._prefix + name
        if full not in self._files:
            raise CheckpointError(f"{self._folder}: no weight {full!r}")
        self._unread.discard(name)
        try:
            tensor: Tensor = self._files[full].get_tensor(full)
        except SafetensorError as error:
            raise CheckpointError(f"{self._folder}: {full}: {error}") from error
        self._extremes[full] = extremes(tensor)  # read once, by `finish`
        return tensor

    def first(self, *names: str) -> Tensor:
        """One tensor that may have any of these names, or several of them."""
        present = [name for name in names if name in self]
        self._unread -= set(present)
        return self(present[0] if present else names[0])

    def shaped(self, name: str, *shape: int) -> Tensor:
        """One tensor that must have this shape. Raises CheckpointError."""
        tensor = self(name)
        if tensor.shape != shape:
            raise CheckpointError(f"{self._folder}: {name}: got {tuple(tensor.shape)}; expected {shape}")
        return tensor

    def ignore_below(self, *prefixes: str) -> None:
        """Weights that another part of the engine reads: all whose names begin with one of these."""
        self._unread = {name for name in self._unread if not name.startswith(prefixes)}

    def finish(self) -> None:
        """Raise CheckpointError for weights that were not read, and for numbers that are not finite. Waits once."""
        if self._unread:
            few = ", ".join(sorted(self._unread)[:5])
            raise CheckpointError(f"{self._folder}: unexpected weights: {few} ({len(self._unread)} in all)")
        refuse_infinite(self._folder, self._extremes)


def stack(
    read: Reader,
    names: Sequence[Sequence[str]],
    inputs: int,
    outputs: Sequence[int],
    precision: Precision,
    factors: Sequence[Tensor | float] = (),
    order: Tensor | None = None,
    arrange: Callable[[Linear], Linear] = as_they_are,
    biased: bool = False,
) -> Linear:
    """Linear layers as one: outputs of several behind each other, in one or two streams.

    Args:
        names: for each stream the modules whose outputs lie behind each other.
        inputs: features that each takes.
        outputs: features that each module of a stream gives; every stream has the same.
        factors: for each stream what its inputs were divided by when they were quantised with a static scale, one
            number or one per feature; the weights are multiplied by it before they are quantised themselves.
        order: which output comes where; None: as they are.
        arrange: how a set of operations wants weights to lie.
        biased: whether they have a bias, all of them.
    """
    weights: Tensor | None = None
    scales, biases = [], []
    for index, modules in enumerate(names):
        sized = tuple(zip(modules, outputs, strict=True))
        weight = torch.cat([read.shaped(f"{module}.weight", rows, inputs) for module, rows in sized])
        weight = weight if order is None else weight[order]
        if biased:
            bias = torch.cat([read.shaped(f"{module}.bias", rows) for module, rows in sized]).float()
            biases.append(bias if order is None else bias[order])
        if precision.quantised:
            weight, scale = quantise_rows(weight * factors[index] if factors else weight)
            scales.append(scale)
        if weights is None:
            weights = torch.empty(len(names), *weight.shape, dtype=precision.linear, device=weight.device)
        weights[index].copy_(weight)
    assert weights is not None, "no streams"
    stacked = [torch.stack(rows) if rows else None for rows in (scales, biases)]
    return arrange(Linear(weights, *stacked))


@dataclass(frozen=True)
class Dense:
    """A linear that stays in the compute dtype, and is left to the library: weight [N, K], bias [N] or none."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)


def dense(read: Reader, module: str, precision: Precision, inputs: int, outputs: int, biased: bool = True) -> Dense:
    """Raises CheckpointError if the weight is not [outputs, inputs], or the bias not [outputs]."""
    weight = read.shaped(f"{module}.weight", outputs, inputs).to(precision.compute)
    return Dense(weight, read.shaped(f"{module}.bias", outputs).to(precision.compute) if biased else None)
