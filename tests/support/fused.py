"""The fused engine on a CPU: its own arithmetic, with every kernel replaced by its plain reference."""

from dataclasses import replace
from pathlib import Path

import torch

from fluxserve.artifact import Scales
from fluxserve.checkpoint import Checkpoint
from fluxserve.engines.base import Components
from fluxserve.engines.fused.transformer import FusedTransformer
from fluxserve.engines.fused.weights import Precision
from fluxserve.kernels.operations import PLAIN
from tests.support.random_flux import RandomFlux

EXACT = Precision(torch.float32, torch.float32)
MOST = (1024, 512, 4)


class FusedOf:
    """Opens random weights: saved as a checkpoint is, read as one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._saved: dict[int, Checkpoint] = {}

    def __call__(self, flux: RandomFlux) -> Components:
        return replace(flux.components(), transformer=self.transformer(flux))

    def transformer(
        self, flux: RandomFlux, precision: Precision = EXACT, found: Scales | None = None
    ) -> FusedTransformer:
        if id(flux) not in self._saved:
            folder = self._folder / str(len(self._saved))
            flux.transformer.save_pretrained(folder / "transformer")
            self._saved[id(flux)] = Checkpoint(folder, flux.spec)
        return FusedTransformer(self._saved[id(flux)], torch.device("cpu"), precision, found, PLAIN, MOST)
