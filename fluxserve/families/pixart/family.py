"""PixArt-Σ, as families.base asks for it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fluxserve.engine import Signature
from fluxserve.families.base import Family
from fluxserve.families.pixart import folder as folders
from fluxserve.families.pixart import layout, signatures
from fluxserve.families.pixart import request as requests
from fluxserve.families.pixart.models import MEMBERS, PixArtSpec
from fluxserve.families.pixart.request import PixArtRequest
from fluxserve.families.pixart.tensors import tensors
from fluxserve.folders.tensor_list import TensorList
from fluxserve.job import Job
from fluxserve.request import Decode, Draft, Tokenize


class PixArt:
    """The family's half without torch."""

    pipelines: Sequence[str] = (folders.PIPELINE,)
    members: Sequence[PixArtSpec] = MEMBERS

    def read(self, folder: Path, index: Mapping[str, Any]) -> PixArtSpec:  # noqa: ARG002 (one pipeline, without options)
        return folders.read(folder)

    def named(self, spec: PixArtSpec, name: str) -> PixArtSpec:
        """No two members have one shape, so that a folder has one name."""
        if name != spec.name or spec not in MEMBERS:
            raise ValueError(f"{spec.name if spec in MEMBERS else 'no name'}, by its transformer's shape")
        return spec

    def folders(self, spec: PixArtSpec) -> tuple[str, ...]:
        return (spec.text.sequence.folder, "transformer", "vae")

    def tensors(self, spec: PixArtSpec, folder: str, module: str, config: Mapping[str, Any]) -> TensorList:  # noqa: ARG002 (all layers are read)
        return tensors(module, config)

    def signatures(self, spec: PixArtSpec) -> Mapping[str, Signature]:
        return signatures.signatures(spec)

    def draft(self, fields: Mapping[str, Any], spec: PixArtSpec) -> Draft:
        return requests.draft(fields, spec)

    def lay_out(self, request: PixArtRequest, spec: PixArtSpec, tokenize: Tokenize, decode: Decode) -> Job:
        return layout.lay_out(request, spec, tokenize, decode)

    def check(self, job: Job, spec: PixArtSpec) -> None:
        layout.check(job, spec)

    def parameters(self, job: Job, spec: PixArtSpec) -> Mapping[str, str]:  # noqa: ARG002 (they are the job's alone)
        return layout.parameters(job)

    def nothing(self, spec: PixArtSpec, side: int, image: bool) -> Job:  # noqa: ARG002 (none is taken)
        return layout.nothing(spec, side)


FAMILY: Family[PixArtSpec, PixArtRequest] = PixArt()
