"""Read a component's tensors from safetensors onto the device, one by one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fluxserve.engines.finite import extremes, refuse_infinite
from fluxserve.errors import CheckpointError
from fluxserve.folders.weights import Weights


class Reader:
    """The tensors of one component, by their canonical names.

    Args:
        prefix: only tensors whose names begin with it, and without it.
        opened: the component's files, where another reader has opened them.
    """

    def __init__(
        self, weights: Weights, device: torch.device, prefix: str = "", opened: Mapping[Path, Any] | None = None
    ) -> None:
        self._weights, self._folder, self._prefix, self.device = weights, weights.folder, prefix, device
        self._opened = opened or {
            file: safe_open(file, framework="pt", device=str(device)) for file in weights.set.files
        }
        self._extremes: dict[str, Tensor] = {}
        self._unread = {name.removeprefix(prefix) for name in weights.tensors if name.startswith(prefix)}

    def __call__(self, name: str) -> Tensor:
        """Return one tensor, as it was stored. Raises CheckpointError."""
        stored = self._weights.tensors.get(self._prefix + name)
        if stored is None:
            raise CheckpointError(f"{self._folder}: no weight {self._prefix + name!r}")
        self._unread.discard(name)
        try:
            tensor: Tensor = self._opened[stored.file].get_tensor(stored.name)
        except SafetensorError as error:
            raise CheckpointError(f"{self._folder}: {stored.name}: {error}") from error
        self._extremes[stored.name] = extremes(tensor)  # read once, by `finish`
        return tensor

    def shaped(self, name: str, *shape: int) -> Tensor:
        """Return one tensor, of the shape that the engine computes with; `Weights` holds it to its config.json."""
        tensor = self(name)
        assert tensor.shape == shape, (
            f"{self._prefix}{name}: config.json says {tuple(tensor.shape)}, the engine {shape}"
        )
        return tensor

    def below(self, prefix: str) -> "Reader":
        """Return a reader of the tensors whose names begin with `prefix`."""
        return Reader(self._weights, self.device, self._prefix + prefix, self._opened)

    def ignore_below(self, *prefixes: str) -> None:
        """Weights that another part of the engine reads: all whose names begin with one of these."""
        self._unread = {name for name in self._unread if not name.startswith(prefixes)}

    def finish(self) -> None:
        """Raise CheckpointError for weights that were not read, and for numbers that are not finite. Waits once."""
        if self._unread:
            few = ", ".join(sorted(self._unread)[:5])
            raise CheckpointError(f"{self._folder}: unexpected weights: {few} ({len(self._unread)} in all)")
        refuse_infinite(self._folder, self._extremes)
