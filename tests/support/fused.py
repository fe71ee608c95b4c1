"""The fused engine with its kernels, and on a CPU: its own arithmetic, every kernel replaced by its plain reference."""

from pathlib import Path

import torch

from fluxserve.engine import Components
from fluxserve.engines.fused.build import Precision
from fluxserve.engines.fused.open import assemble
from fluxserve.folders.checkpoint import Checkpoint
from fluxserve.kernels.operations import LAUNCHED, PLAIN
from tests.support.random_flux import RandomFlux

KERNELS = LAUNCHED if torch.cuda.is_available() else PLAIN
"""Launched where that can be."""
EXACT = Precision(torch.float32, torch.float32)


class FusedOf:
    """Opens random weights: saved as a checkpoint is, read as one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._saved: dict[int, Checkpoint] = {}

    def __call__(self, flux: RandomFlux) -> Components:
        if id(flux) not in self._saved:
            folder = self._folder / str(len(self._saved))
            flux.save(folder)
            self._saved[id(flux)] = Checkpoint(folder, flux.spec)
        return assemble(self._saved[id(flux)], torch.device("cpu"), EXACT, None, PLAIN)
