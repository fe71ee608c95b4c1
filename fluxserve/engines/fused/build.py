"""What the fused engine's parts are built from: weights, precision, kernels and calibrated ranges."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fluxserve.engines.fused.scales import folded
from fluxserve.engines.fused.weights import Reader
from fluxserve.folders.artifact import Ranges
from fluxserve.folders.weights import Weights
from fluxserve.kernels.fp8 import E4M3
from fluxserve.kernels.gemm.layers import Linear
from fluxserve.kernels.operations import Operations, as_they_are


@dataclass(frozen=True)
class Precision:
    """Dtypes: `compute` of the residual stream, embedders and unquantised products, `linear` of products in blocks."""

    compute: torch.dtype
    linear: torch.dtype

    @property
    def quantised(self) -> bool:
        return self.linear == E4M3


BF16 = Precision(torch.bfloat16, torch.bfloat16)
FP8 = Precision(torch.bfloat16, E4M3)


@dataclass(frozen=True)
class Dense:
    """A linear layer in the compute dtype, which PyTorch runs: weight [N, K], bias [N] or None."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class Build:
    """Everything that a part of one component is built from.

    Attributes:
        read: the component's tensors.
        kernels: the operations that the part launches.
        ranges: what calibration measured; None unless static scales are needed.
    """

    read: Reader
    precision: Precision
    kernels: Operations
    ranges: Ranges | None = None

    @staticmethod
    def of(
        weights: Weights, device: torch.device, precision: Precision, kernels: Operations, ranges: Ranges | None = None
    ) -> "Build":
        """Return the build of one component's weights, opened on a device."""
        return Build(Reader(weights, device), precision, kernels, ranges)

    @property
    def device(self) -> torch.device:
        return self.read.device

    def below(self, prefix: str) -> "Build":
        """Return the same for the tensors whose names begin with `prefix`."""
        return replace(self, read=self.read.below(prefix))

    def dense(self, module: str, inputs: int, outputs: int, biased: bool = True) -> Dense:
        """Read a layer that stays in the compute dtype.

        Raises:
            CheckpointError: the weight is not [outputs, inputs], or the bias not [outputs].
        """
        weight = self.read.shaped(f"{module}.weight", outputs, inputs).to(self.precision.compute)
        return Dense(weight, self.read.shaped(f"{module}.bias", outputs).to(self.precision.compute) if biased else None)

    def linear(
        self,
        modules: Sequence[Sequence[str]],
        inputs: int,
        outputs: Sequence[int],
        input_scales: Sequence[Tensor | float] = (),
        order: Tensor | None = None,
        arrange: Callable[[Linear], Linear] = as_they_are,
        biased: bool = False,
    ) -> Linear:
        """Read linear layers as one: the outputs of several concatenated, in one or two streams.

        Args:
            modules: for each stream the modules whose outputs are concatenated.
            inputs: features that each takes.
            outputs: features that each module of a stream gives; every stream has the same.
            input_scales: for each stream the static scale of its quantised inputs, one or one per feature; none for
                inputs with a scale per row.
            order: permutation of the outputs.
            arrange: lays the weights out for the kernels.
            biased: whether the layers have a bias, all of them.

        Raises:
            CheckpointError: a tensor is missing or has another shape.
        """
        weights: Tensor | None = None
        scales, biases = [], []
        for index, stream in enumerate(modules):
            sized = tuple(zip(stream, outputs, strict=True))
            weight = torch.cat([self.read.shaped(f"{module}.weight", rows, inputs) for module, rows in sized])
            weight = weight if order is None else weight[order]
            if biased:
                bias = torch.cat([self.read.shaped(f"{module}.bias", rows) for module, rows in sized]).float()
                biases.append(bias if order is None else bias[order])
            if self.precision.quantised:
                weight, scale = folded(weight, input_scales[index] if input_scales else 1.0)
                scales.append(scale)
            if weights is None:
                weights = torch.empty(len(modules), *weight.shape, dtype=self.precision.linear, device=weight.device)
            weights[index].copy_(weight)
        assert weights is not None, "no streams"
        stacked = [torch.stack(rows) if rows else None for rows in (scales, biases)]
        return arrange(Linear(weights, *stacked))
