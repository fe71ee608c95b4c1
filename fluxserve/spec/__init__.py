"""What a model IS: frozen facts about each member of the FLUX family. No I/O, no torch.

`parts` are what a model is described by, `models` the published ones and the only home of their numbers, `configs`
reads those of a folder.
"""

from fluxserve.spec.configs import as_member, from_configs
from fluxserve.spec.models import (
    FAMILY,
    FLUX1_DEV,
    FLUX1_SCHNELL,
    FLUX2_DEV,
    FLUX2_DEV_TURBO,
    FLUX2_KLEIN_4B,
    FLUX2_KLEIN_9B,
    TINY,
)
from fluxserve.spec.parts import (
    PATCH,
    Defaults,
    EncoderSpec,
    Limits,
    ModelSpec,
    ScheduleSpec,
    TextSpec,
    TransformerSpec,
    VaeSpec,
)

__all__ = [
    "FAMILY",
    "FLUX1_DEV",
    "FLUX1_SCHNELL",
    "FLUX2_DEV",
    "FLUX2_DEV_TURBO",
    "FLUX2_KLEIN_4B",
    "FLUX2_KLEIN_9B",
    "PATCH",
    "TINY",
    "Defaults",
    "EncoderSpec",
    "Limits",
    "ModelSpec",
    "ScheduleSpec",
    "TextSpec",
    "TransformerSpec",
    "VaeSpec",
    "as_member",
    "from_configs",
]
