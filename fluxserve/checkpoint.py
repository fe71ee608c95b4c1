"""A diffusers-format folder, looked over before anything is loaded from it.

Nothing here reads weights: it reads the small JSON files and the headers of the safetensors, so that a folder that is
missing, truncated, pickled or of another architecture is refused in milliseconds with the file's name.
"""

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxserve import spec as specs
from fluxserve.errors import CheckpointError, UnsafeWeights, UnsupportedArchitecture
from fluxserve.spec import ModelSpec

_PIPELINES = ("FluxPipeline", "FluxImg2ImgPipeline")
_COMPONENTS = {
    "transformer": "FluxTransformer2DModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "T5EncoderModel",
}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class Checkpoint:
    """A folder that was looked over, and what it holds."""

    path: Path
    spec: ModelSpec

    def component(self, name: str) -> Path:
        return self.path / name


def read(path: Path) -> Checkpoint:
    """Look a checkpoint folder over.

    Raises:
        CheckpointError: missing, incomplete or truncated.
        UnsafeWeights: weights only as pickles.
        UnsupportedArchitecture: not a FLUX.1 pipeline.
    """
    if not path.is_dir():
        hint = "--checkpoint and FLUXSERVE_CHECKPOINT name one"
        raise CheckpointError(f"{path}: no such folder; expected a diffusers-format checkpoint ({hint})")
    pipeline = _json(path / "model_index.json").get("_class_name")
    if pipeline not in _PIPELINES:
        raise UnsupportedArchitecture(f"{path / 'model_index.json'}: _class_name", pipeline, " or ".join(_PIPELINES))
    for name, architecture in _COMPONENTS.items():
        _check_component(path / name, architecture)
    return Checkpoint(path, _spec(path))


def _spec(path: Path) -> ModelSpec:
    transformer = _json(path / "transformer" / "config.json")
    vae = _json(path / "vae" / "config.json")
    scheduler = _json(path / "scheduler" / "scheduler_config.json")
    try:
        return specs.from_configs(transformer, vae, scheduler)
    except KeyError as error:
        raise CheckpointError(f"{path}: a config.json lacks {error}") from error
    except (TypeError, ValueError) as error:
        raise UnsupportedArchitecture(str(path), str(error), "the dimensions of a FLUX.1 model") from error


def _check_component(folder: Path, architecture: str) -> None:
    config = _json(folder / "config.json")
    got = config.get("_class_name") or next(iter(config.get("architectures") or []), None)
    if got != architecture:
        raise UnsupportedArchitecture(f"{folder / 'config.json'}: architecture", got, architecture)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickled = sorted(f for f in folder.iterdir() if f.suffix in _PICKLES)
        if pickled:
            raise UnsafeWeights(str(pickled[0]))
        raise CheckpointError(f"{folder}: no weights; expected .safetensors files")
    for index in folder.glob("*.safetensors.index.json"):
        for shard in sorted(set(_json(index)["weight_map"].values())):
            if not (folder / shard).is_file():
                raise CheckpointError(f"{folder / shard}: missing; {index.name} lists it")
    for file in weights:
        _check_length(file)


def _check_length(file: Path) -> None:
    """A safetensors file says in its header how long it is; one that was cut short is shorter."""
    size = file.stat().st_size
    try:
        with file.open("rb") as f:
            (header_size,) = struct.unpack("<Q", f.read(8))
            if header_size > size:
                raise ValueError("header longer than the file")
            header = json.loads(f.read(header_size))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: not a safetensors file, or truncated ({error})") from error
    expected = 8 + header_size + max(ends, default=0)
    if size != expected:
        raise CheckpointError(f"{file}: {size} bytes; its header expects {expected}. The file is truncated or damaged")


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: missing; expected a diffusers-format checkpoint") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: unreadable ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: got a JSON {type(value).__name__}; expected an object")
    return value
