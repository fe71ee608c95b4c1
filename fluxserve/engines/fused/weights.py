"""Read a component's tensors from safetensors onto the device, one by one."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fluxserve.engines.finite import extremes, refuse_infinite
from fluxserve.errors import CheckpointError
from fluxserve.weights import Weights


class Reader:
    """The tensors of one component, by diffusers' and transformers' names.

    Args:
        weights: of the component's folder.
        prefix: only tensors whose names begin with it, and without it; all of them, if none does.
    """

    def __init__(self, weights: Weights, device: torch.device, prefix: str = "") -> None:
        self._weights, self._folder, self._prefix, self.device = weights, weights.folder, prefix, device
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

    def below(self, prefix: str) -> "Reader":
        """Return a reader of the tensors whose names begin with `prefix`; of all, if none does."""
        return Reader(self._weights, self.device, self._prefix + prefix)

    def ignore_below(self, *prefixes: str) -> None:
        """Weights that another part of the engine reads: all whose names begin with one of these."""
        self._unread = {name for name in self._unread if not name.startswith(prefixes)}

    def finish(self) -> None:
        """Raise CheckpointError for weights that were not read, and for numbers that are not finite. Waits once."""
        if self._unread:
            few = ", ".join(sorted(self._unread)[:5])
            raise CheckpointError(f"{self._folder}: unexpected weights: {few} ({len(self._unread)} in all)")
        refuse_infinite(self._folder, self._extremes)
