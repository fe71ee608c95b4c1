"""What only a running engine allocates must have room when it is loaded."""

from dataclasses import replace

import pytest
import torch

from fluxserve import settings
from fluxserve.engines.fused import headroom, open, vae
from fluxserve.engines.fused.build import Precision
from fluxserve.errors import OutOfMemory
from fluxserve.families.flux.models import FLUX1_DEV
from fluxserve.folders import checkpoint
from fluxserve.folders.checkpoint import Checkpoint
from fluxserve.kernels.operations import PLAIN

CPU = torch.device("cpu")
GIB = 2**30


def test_a_device_without_room_for_the_largest_picture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint.read(settings.default_checkpoint())
    needed = vae.peak(folder, torch.float32)
    exact = Precision(torch.float32, torch.float32)
    monkeypatch.setattr(headroom, "free_bytes", lambda device: needed - 1)
    with pytest.raises(
        OutOfMemory,
        match=f"262,144 pixels in the VAE: needs {needed:,} bytes .* allowed: {needed - 1:,} bytes.*--max-size",
    ):
        open.assemble(folder, CPU, exact, None, PLAIN)
    monkeypatch.setattr(headroom, "free_bytes", lambda device: needed)
    open.assemble(folder, CPU, exact, None, PLAIN).close()


def test_a_cpu_is_not_asked() -> None:
    headroom.require("anything", 2**80, CPU)


@pytest.mark.parametrize(("side", "least", "most"), [(1024, 1.5, 2.5), (2048, 6, 7)])
def test_flux1_takes_so_much(side: int, least: float, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """256 channels of every pixel come to the last level, 512 bytes in BF16; two and a half such pictures are held."""
    monkeypatch.setattr(Checkpoint, "config", lambda self, name: {"block_out_channels": [128, 256, 512, 512]})
    limits = replace(FLUX1_DEV.limits, max_pixels=side * side)
    folder = Checkpoint(settings.default_checkpoint(), replace(FLUX1_DEV, limits=limits))
    assert least * GIB < vae.peak(folder, torch.bfloat16) < most * GIB
