"""The name of an engine → the engine, imported only now. Nothing falls back: a name that can't be opened raises."""

from importlib import import_module

from fluxserve.checkpoint import Checkpoint
from fluxserve.engines.base import Components
from fluxserve.errors import UnknownEngine

ENGINES = {
    "torch_eager": "fluxserve.engines.torch_eager",
}


def open_components(name: str, checkpoint: Checkpoint, device: str, dtype: str) -> Components:
    """Load every component of a checkpoint.

    Args:
        name: a key of ENGINES.
        device: as torch spells it: "cpu", "cuda:0".
        dtype: "float32", "bfloat16", "float16", or "auto".

    Raises:
        UnknownEngine: lists the valid names.
        CheckpointError: the weights do not fit the architecture.
    """
    if name not in ENGINES:
        raise UnknownEngine(name, ENGINES)
    components: Components = import_module(ENGINES[name]).open_components(checkpoint, device, dtype)
    return components
