"""Weights that hold NaN or infinity: one pass over a tensor where it lies, one read for a whole component."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from fluxserve.errors import CheckpointError
from fluxserve.folders.weights import Weights

_FEW = 5


def extremes(tensor: Tensor) -> Tensor:
    """The least and the largest value, float32 [2], on the tensor's device; NaN if there is one."""
    return torch.stack(tensor.aminmax()).float()


def check(weights: Weights, dtype: str = "auto") -> None:
    """Read a component's tensors one by one. Raises CheckpointError.

    Args:
        dtype: that they are converted to where they are served; auto holds whatever the files hold.
    """
    found: dict[str, Tensor] = {}
    for file in weights.set.files:
        with safe_open(file, framework="pt") as opened:
            for name in (stored.name for stored in weights.tensors.values() if stored.file == file):
                tensor = opened.get_tensor(name)
                found[name] = extremes(tensor if dtype == "auto" else tensor.to(getattr(torch, dtype)))
    refuse_infinite(weights.folder, found)


def refuse_infinite(folder: Path, found: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError for tensors whose extremes are not finite. Waits for the device once."""
    if not found:
        return
    finite = torch.stack(list(found.values())).isfinite().all(dim=1).tolist()
    names = [name for name, good in zip(found, finite, strict=True) if not good]
    if names:
        few = ", ".join(names[:_FEW])
        raise CheckpointError(f"{folder}: NaN or infinity in {few} ({len(names)} in all); expected finite numbers")
