"""FLUX.1 and FLUX.2, as families.base asks for it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fluxserve.engine import Signature
from fluxserve.families.base import Family
from fluxserve.families.flux import folder as folders
from fluxserve.families.flux import layout, signatures
from fluxserve.families.flux import request as requests
from fluxserve.families.flux.models import MEMBERS
from fluxserve.families.flux.parts import FluxSpec
from fluxserve.families.flux.request import FluxRequest
from fluxserve.families.flux.tensors import tensors
from fluxserve.folders.tensor_list import TensorList
from fluxserve.job import Job
from fluxserve.request import Decode, Draft, Tokenize


class Flux:
    """The family's half without torch."""

    pipelines: Sequence[str] = tuple(folders.PIPELINES)
    members: Sequence[FluxSpec] = MEMBERS

    def read(self, folder: Path, index: Mapping[str, Any]) -> FluxSpec:
        return folders.read(folder, index)

    def named(self, spec: FluxSpec, name: str) -> FluxSpec:
        return folders.named(spec, name)

    def folders(self, spec: FluxSpec) -> tuple[str, ...]:
        return (*(encoder.folder for encoder in spec.text.encoders), "transformer", "vae")

    def tensors(self, spec: FluxSpec, folder: str, module: str, config: Mapping[str, Any]) -> TensorList:
        read = [max(encoder.layers) for encoder in spec.text.encoders if encoder.folder == folder and encoder.layers]
        return tensors(module, config, *read)

    def signatures(self, spec: FluxSpec) -> Mapping[str, Signature]:
        return signatures.signatures(spec)

    def draft(self, fields: Mapping[str, Any], spec: FluxSpec) -> Draft:
        return requests.draft(fields, spec)

    def lay_out(self, request: FluxRequest, spec: FluxSpec, tokenize: Tokenize, decode: Decode) -> Job:
        return layout.lay_out(request, spec, tokenize, decode)

    def check(self, job: Job, spec: FluxSpec) -> None:
        layout.check(job, spec)

    def parameters(self, job: Job, spec: FluxSpec) -> Mapping[str, str]:
        return layout.parameters(job, spec)

    def nothing(self, spec: FluxSpec, side: int, image: bool) -> Job:
        return layout.nothing(spec, side, image)


FAMILY: Family[FluxSpec, FluxRequest] = Flux()
