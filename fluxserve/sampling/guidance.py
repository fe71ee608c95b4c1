"""Guidance: how many passes of the network a step takes, and how their predictions are joined."""

from typing import Protocol

import torch
from torch import Tensor


class Guidance(Protocol):
    """A step's passes, as rows of one batch.

    Attributes:
        passes: rows of the network for each row of latents.
    """

    passes: int

    def write(self, window: Tensor, x: Tensor) -> None:
        """Write x [B, …] into the network's input [passes · B, …]."""

    def join(self, prediction: Tensor) -> Tensor:
        """Return the prediction [B, …] that the solver steps along, of the network's [passes · B, …]."""


class OnePass:
    """No guidance, or guidance that was distilled into the network and is one of its inputs."""

    passes = 1

    def write(self, window: Tensor, x: Tensor) -> None:
        window.copy_(x)

    def join(self, prediction: Tensor) -> Tensor:
        return prediction


class ClassifierFree:
    """Classifier-free guidance (arXiv 2207.12598): rows of the prompts first, then rows of the negative prompts.

    The joined prediction is negative + scale · (prompt − negative), in float32. A scale of 1 is the prompt alone.
    Rows of a batch may have different scales.
    """

    passes = 2

    def __init__(self, scales: Tensor) -> None:
        """
        Args:
            scales: float32 [B] on the device.
        """
        self._scales, self._rest = scales, 1 - scales
        self._joined: Tensor | None = None

    def write(self, window: Tensor, x: Tensor) -> None:
        window.view(self.passes, *x.shape).copy_(x)

    def join(self, prediction: Tensor) -> Tensor:
        prompt, negative = prediction.chunk(self.passes)
        if self._joined is None:
            self._joined = torch.empty_like(prompt, dtype=torch.float32, memory_format=torch.contiguous_format)
        shape = (-1, *(1,) * (prompt.ndim - 1))
        return self._joined.copy_(negative).mul_(self._rest.view(shape)).addcmul_(prompt, self._scales.view(shape))
