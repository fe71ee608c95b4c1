"""The library's front door: a model that draws in this process, without Triton and without the wire's types."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from fluxserve import source
from fluxserve.families import registry
from fluxserve.job import Job
from fluxserve.media.images import decode
from fluxserve.pipeline import Drawing, Pipeline
from fluxserve.request import Request
from fluxserve.settings import Settings
from fluxserve.source import Source
from fluxserve.spec import ModelSpec
from fluxserve.text import Tokenizers


@dataclass(frozen=True)
class Model:
    """A model that was opened, with its weights on a device.

        with Model.open(Settings(checkpoint="/models/FLUX.1-dev")) as model:
            (drawing,) = model.draw(model.request("a fox", seed=3))
            drawing.images  # uint8 [1, height, width, 3]

    Attributes:
        source: the folder that was read, and the engine that runs it.
        pipeline: the loop over the engines.
    """

    source: Source
    pipeline: Pipeline
    tokenizers: Tokenizers

    @staticmethod
    def open(config: Settings | None = None, device: str = "", max_rows: int = 0) -> "Model":
        """Load a model.

        Args:
            config: what is served; the tiny model by default.
            device: as torch spells it; by default the first GPU if there is one.
            max_rows: pictures that go through the network together, at most what the engine takes; 0: as the
                settings say.

        Raises:
            SettingsError, CheckpointError, ArtifactError, EngineError: it can't be served.
        """
        config = config or Settings()
        return Model.of(source.find(config), config, device, max_rows)

    @staticmethod
    def of(found: Source, config: Settings, device: str = "", max_rows: int = 0) -> "Model":
        """Load a model whose folder was looked over already; see `open`."""
        if config.threads:
            torch.set_num_threads(config.threads)
        place = found.device(device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
        tokenizers = Tokenizers(found.checkpoint)  # what may be refused early comes before the weights
        components = found.open_components(place, config.dtype)
        rows = min(max_rows, components.network.signature.most("rows")) if max_rows else config.max_rows
        return Model(found, Pipeline(found.spec, components, place, rows), tokenizers)

    def request(self, prompt: str, images: Sequence[bytes] = (), **fields: Any) -> Request:
        """Return a request of this model; see `request`."""
        return request(self.source.spec, prompt, images, **fields)

    def job(self, asked: Request) -> Job:
        """Return a request as the pipeline takes it. Raises InvalidRequest: an image is damaged."""
        return registry.of(self.source.spec).lay_out(asked, self.source.spec, self.tokenizers, decode)

    def draw(self, *requests: Request) -> list[Drawing]:
        """Draw requests of one likeness together: of equal size and steps, with equal kinds of images.

        Raises:
            InvalidRequest: an image is damaged.
        """
        drawings = self.pipeline.draw([self.job(asked) for asked in requests])
        return [drawing for drawing in drawings if drawing is not None]  # nobody can call one off

    def close(self) -> None:
        """Free the weights."""
        self.pipeline.close()

    def __enter__(self) -> "Model":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def request(spec: ModelSpec, prompt: str, images: Sequence[bytes] = (), **fields: Any) -> Request:
    """Return a request with nothing left to default. No weights are needed.

    Args:
        images: files to redraw, or to draw after.
        fields: as the inputs of the Triton model are called: height, width, seed, num_inference_steps and so on.

    Raises:
        InvalidRequest: names the field, what came and what is allowed.
    """
    given = {name: value.encode() if isinstance(value, str) else value for name, value in fields.items()}
    given |= {"image": list(images)} if images else {}
    given["prompt"] = prompt.encode(errors="surrogateescape")  # bytes of a command line that are no text are refused
    return registry.of(spec).draft(given, spec).complete()
