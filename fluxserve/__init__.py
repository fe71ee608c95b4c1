"""fluxserve: diffusion transformers, the FLUX family first, behind Triton Inference Server.

from fluxserve import Model, Settings

with Model.open(Settings(checkpoint="/models/FLUX.1-dev")) as model:
    (drawing,) = model.draw(model.request("a fox on a blue background", seed=3))
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fluxserve.model import Model
    from fluxserve.request import Request
    from fluxserve.settings import Settings

__version__ = "0.1.0"
__all__ = ["Model", "Request", "Settings", "__version__"]

_HOMES = {"Model": "model", "Request": "request", "Settings": "settings"}


def __getattr__(name: str) -> object:
    """Import what is asked for when it is asked for: the supervisor does without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
