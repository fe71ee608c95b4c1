"""What a family of models is to everything else: pure functions of a request, a job and a spec.

A family has two halves. `Family` reads folders and requests, and is imported without torch. `Recipe` says what the
loop does with a job. Neither binds an engine, runs it or waits for it: the pipeline does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from fluxserve.engine import Signature
from fluxserve.folders.tensor_list import TensorList
from fluxserve.job import Array, Arrays, Job
from fluxserve.request import Decode, Draft, Request, Tokenize
from fluxserve.spec import ModelSpec

if TYPE_CHECKING:
    from torch import Tensor, dtype, nn

    from fluxserve.sampling.guidance import Guidance
    from fluxserve.sampling.solvers import Solver

Spec = TypeVar("Spec", bound=ModelSpec)
Asked = TypeVar("Asked", bound=Request, contravariant=True)
SpecOf = TypeVar("SpecOf", bound=ModelSpec, contravariant=True)

Draw = Callable[[tuple[int, ...]], "Tensor"]
"""Draws standard normal noise of a shape, float32 on the device, from the generator of one picture."""

Send = Callable[[Array], "Tensor"]
"""Sends an array of the host to the device."""


class Family(Protocol[Spec, Asked]):
    """Folders, requests and jobs of one family.

    Attributes:
        pipelines: names of diffusers' pipelines, as a folder's model_index.json has them.
        members: the published models.
    """

    pipelines: Sequence[str]
    members: Sequence[Spec]

    def read(self, folder: Path, index: Mapping[str, Any]) -> Spec:
        """Read the configurations of a diffusers-format folder.

        Args:
            index: its model_index.json.

        Raises:
            CheckpointError, UnsupportedArchitecture.
        """

    def named(self, spec: Spec, name: str) -> Spec:
        """Return what a folder holds as the member called `name`. Raises ValueError, which says what it may be."""

    def folders(self, spec: Spec) -> tuple[str, ...]:
        """Return the subfolders that hold weights."""

    def tensors(self, spec: Spec, folder: str, module: str, config: Mapping[str, Any]) -> TensorList:
        """List the tensors of a component's module. Raises KeyError, TypeError, ValueError, AttributeError."""

    def signatures(self, spec: Spec) -> Mapping[str, Signature]:
        """Return what each component takes and gives."""

    def draft(self, fields: Mapping[str, Any], spec: Spec) -> Draft:
        """Validate all fields that cost nothing to look at: every one but the images.

        Args:
            fields: by contract name; see request.common.

        Raises:
            InvalidRequest: names the field, what came and what is allowed.
        """

    def lay_out(self, request: Asked, spec: Spec, tokenize: Tokenize, decode: Decode) -> Job:
        """Tokenise, decode images and lay out the schedule. Raises InvalidRequest: an image is damaged."""

    def check(self, job: Job, spec: Spec) -> None:
        """Check a job that anybody may have sent. Raises InvalidRequest, which names the array."""

    def parameters(self, job: Job, spec: Spec) -> Mapping[str, str]:
        """Return what files say about a checked job beside seed, size and steps: its `task`, `guidance`, …

        Names are those of XML elements; see media/provenance.py.
        """

    def nothing(self, spec: Spec, side: int, image: bool) -> Job:
        """Return a square job of no words and one step, to warm up with; `image`: with a black input image."""


@dataclass(frozen=True)
class Inputs:
    """What the network is given and stays the same from step to step.

    Attributes:
        fixed: by the names of the network's inputs; of one row, or without rows where the signature has none.
        beside: tokens behind the picture's own, [1, n, C].
    """

    fixed: Mapping[str, "Tensor"]
    beside: "Tensor | None" = None


class Recipe(Protocol[SpecOf]):
    """How a job is drawn.

    Attributes:
        latents, prediction: the network's input and output that the loop works on.
    """

    latents: str
    prediction: str

    def prompts(self, job: Job, spec: SpecOf) -> Sequence[Mapping[str, Arrays]]:
        """Return what the text encoders read, by encoder and input; one entry for each pass of the network."""

    def images(self, job: Job) -> Sequence[Array]:
        """Return the images that the VAE encodes before the loop, uint8 [height, width, 3] each."""

    def start(self, job: Job, spec: SpecOf, draw: Draw, images: Sequence[tuple["Tensor", "Tensor"]]) -> "Tensor":
        """Return the latents that the loop begins with, float32 of one row.

        Args:
            images: mean and standard deviation of each encoded image's latents, float32 [1, C, h, w].
        """

    def inputs(
        self,
        job: Job,
        spec: SpecOf,
        states: Mapping[str, "Tensor"],
        images: Sequence[tuple["Tensor", "Tensor"]],
        send: Send,
        which: int,
    ) -> Inputs:
        """Return what the network is given for one pass.

        Args:
            states: outputs of all text encoders, by name, of one row.
            which: the pass, an index of `prompts`.
        """

    def solver(self, job: Job, spec: SpecOf, dtype: "dtype", send: Send, draw: Callable[[], "Tensor"]) -> "Solver":
        """Return the solver of a job's loop.

        Args:
            dtype: of the network's timestep.
            draw: noise of the latents' shape, for all rows.
        """

    def guidance(self, jobs: Sequence[Job], send: Send) -> "Guidance":
        """Return how the passes of a step are joined.

        Args:
            jobs: one for each row, alike but for what their arrays hold: each row has a scale of its own.
        """

    def decoded(self, latents: "Tensor", job: Job, spec: SpecOf) -> "Tensor":
        """Return what the VAE decodes, [rows, C, h, w], of the loop's latents."""


@dataclass(frozen=True)
class Architecture:
    """Where a component's weights are in a diffusers folder, their class, and how it is called."""

    folder: str
    module: "type[nn.Module]"
    wrapper: "Callable[[nn.Module], nn.Module]"
    configuration: Mapping[str, Any] = field(default_factory=dict)
    """What is loaded other than the folder's config.json says."""
