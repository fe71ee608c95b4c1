"""Whether a device has room for what is allocated only while the engine runs: asked once, when all weights are loaded.

What fails then fails before anybody waits for a picture, and says what would help.
"""

import torch

from fluxserve.errors import OutOfMemory


def free_bytes(device: torch.device) -> int | None:
    """What the driver has left, and what PyTorch's pool holds unused; None where nobody counts."""
    if device.type != "cuda":
        return None
    left, _ = torch.cuda.mem_get_info(device)
    return left + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def require(what: str, needed: int, device: torch.device) -> None:
    """Raises OutOfMemory, which names what is needed, what there is, and what to do."""
    free = free_bytes(device)
    if free is not None and free < needed:
        there = f"{free:,} bytes, which {device} has left beside the weights"
        remedy = "export an artifact for smaller pictures (fluxserve export --max-size), or free the device's memory"
        raise OutOfMemory(what, f"{needed:,} bytes", f"{there}; {remedy}")
