"""A diffusers-format folder, looked over before anything is loaded from it.

Nothing here reads weights: it reads the small JSON files and the headers of the safetensors, so that a folder that is
missing, truncated, pickled, quantised or of another architecture is refused in milliseconds with the file's name.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fluxserve.errors import CheckpointError, UnsupportedArchitecture
from fluxserve.families import registry
from fluxserve.folders import weights as component_weights
from fluxserve.folders.files import MODEL_INDEX, locate, read_json
from fluxserve.folders.weights import Weights
from fluxserve.spec import ModelSpec

_DIFFUSERS, _TRANSFORMERS = "diffusion_pytorch_model", "model"
"""What the names of weights begin with in the folders of either library."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder that was looked over, and what it holds."""

    path: Path
    spec: ModelSpec

    @property
    def folders(self) -> tuple[str, ...]:
        """The components' folders that hold weights."""
        return registry.of(self.spec).folders(self.spec)

    def component(self, name: str) -> Path:
        return self.path / name

    def config(self, name: str) -> dict[str, Any]:
        """A component's config.json. Raises CheckpointError."""
        return read_json(self.component(name) / "config.json")

    def class_name(self, component: str) -> str | None:
        """The class that model_index.json names for a component."""
        entry = read_json(self.path / MODEL_INDEX).get(component)
        return str(entry[1]) if isinstance(entry, list) and len(entry) == 2 else None

    def weights(self, name: str) -> Weights:
        """The tensors that are read of a component's folder: its module's, all of them and no others.

        Raises:
            CheckpointError, UnsafeWeights: see weights.read.
        """
        folder, config = self.component(name), self.config(name)
        of_diffusers = "_class_name" in config
        module = config["_class_name"] if of_diffusers else (config.get("architectures") or [None])[0]
        try:
            listed = registry.of(self.spec).tensors(self.spec, name, str(module), config)
        except KeyError as error:
            raise CheckpointError(f"{folder / 'config.json'}: lacks {error}") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise UnsupportedArchitecture(
                str(folder / "config.json"), str(error), f"the numbers of {module}"
            ) from error
        return component_weights.read(folder, _DIFFUSERS if of_diffusers else _TRANSFORMERS, str(module), listed)


def read(path: Path, weights: bool = True, model: str = "") -> Checkpoint:
    """Look a checkpoint folder over.

    Args:
        weights: whether it must have them; an artifact keeps a copy of the folder without.
        model: which member of the family it is, where two have one shape; empty: what the folder says.

    Raises:
        CheckpointError: missing, unreadable, incomplete or truncated.
        UnsafeWeights: weights only as pickles.
        UnsupportedArchitecture: of no family that is known, or not what `model` says.
    """
    try:
        found = _read(path, weights)
        return _named(found, model) if model else found
    except OSError as error:
        raise CheckpointError(f"{path}: unreadable ({error})") from error


def _read(path: Path, weights: bool) -> Checkpoint:
    path = locate(path)
    index = read_json(path / MODEL_INDEX)
    pipeline = str(index.get("_class_name"))
    family = registry.by_pipeline(pipeline)
    if family is None:
        raise UnsupportedArchitecture(f"{path / MODEL_INDEX}: _class_name", pipeline, " or ".join(registry.pipelines()))
    found = Checkpoint(path, family.read(path, index))
    for name in found.folders if weights else ():
        files = found.weights(name).set
        if len(files.files) > 1 and files.index is None:
            raise CheckpointError(f"{path / name}: shards without their index; expected a .safetensors.index.json")
    return found


def _named(found: Checkpoint, model: str) -> Checkpoint:
    try:
        return replace(found, spec=registry.of(found.spec).named(found.spec, model))
    except ValueError as error:
        raise UnsupportedArchitecture(f"{found.path}: model", model, str(error)) from error
