"""All activations in one allocation, made when the model is loaded, for the largest shape that may come.

Every shape's buffers are cut from its beginning, so that CUDA graphs of many shapes share the memory: what one leaves
there is gone when the next runs. A shape that does not fit is refused before anything is launched.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxserve.errors import OutOfMemory

_ALIGNMENT = 256


@dataclass(frozen=True)
class Buffer:
    """What is wanted of a buffer."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Rounded up so that the next one is aligned."""
        return -(-math.prod(self.shape) * self.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


Layout = Mapping[str, Buffer]


def size(layout: Layout) -> int:
    """Bytes of an arena that this layout fills."""
    return sum(buffer.bytes for buffer in layout.values())


class Arena:
    """Raises OutOfMemory if the device has no room for it."""

    def __init__(self, bytes: int, device: torch.device) -> None:
        try:
            self._memory = torch.zeros(bytes, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory("activations", f"{bytes:,} bytes", f"what {device} has left") from error

    @property
    def bytes(self) -> int:
        return len(self._memory)

    def cut(self, layout: Layout) -> dict[str, Tensor]:
        """The buffers, by name. Raises OutOfMemory if the arena is too small."""
        if size(layout) > self.bytes:
            raise OutOfMemory(
                "activations", f"{size(layout):,} bytes", f"{self.bytes:,}, sized for the largest picture"
            )
        buffers, at = {}, 0
        for name, buffer in layout.items():
            raw = self._memory[at : at + math.prod(buffer.shape) * buffer.dtype.itemsize]
            buffers[name] = raw.view(buffer.dtype).view(buffer.shape)
            at += buffer.bytes
        return buffers
