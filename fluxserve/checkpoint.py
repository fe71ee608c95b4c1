"""A diffusers-format folder, looked over before anything is loaded from it.

Nothing here reads weights: it reads the small JSON files and the headers of the safetensors, so that a folder that is
missing, truncated, pickled or of another architecture is refused in milliseconds with the file's name.
"""

import json
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fluxserve import spec as specs
from fluxserve.errors import CheckpointError, UnsafeWeights, UnsupportedArchitecture
from fluxserve.spec import ModelSpec

_FLUX1 = {
    "transformer": "FluxTransformer2DModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "T5EncoderModel",
}
_KLEIN = {
    "transformer": "Flux2Transformer2DModel",
    "vae": "AutoencoderKLFlux2",
    "text_encoder": "Qwen3ForCausalLM",
}
_FLUX2 = {**_KLEIN, "text_encoder": "Mistral3ForConditionalGeneration"}
_PIPELINES = {
    "FluxPipeline": _FLUX1,
    "FluxImg2ImgPipeline": _FLUX1,
    "Flux2KleinPipeline": _KLEIN,
    "Flux2Pipeline": _FLUX2,
}
"""Pipeline → the classes of its components, by their folders."""

_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class Checkpoint:
    """A folder that was looked over, and what it holds."""

    path: Path
    spec: ModelSpec

    def component(self, name: str) -> Path:
        return self.path / name

    def config(self, name: str) -> dict[str, Any]:
        """A component's config.json. Raises CheckpointError."""
        return _json(self.component(name) / "config.json")

    def class_name(self, component: str) -> str | None:
        """The class that model_index.json names for a component."""
        entry = _json(self.path / "model_index.json").get(component)
        return str(entry[1]) if isinstance(entry, list) and len(entry) == 2 else None


def read(path: Path, weights: bool = True, model: str = "") -> Checkpoint:
    """Look a checkpoint folder over.

    Args:
        weights: whether it must have them; an artifact keeps a copy of the folder without.
        model: which member of the family it is, where two have one shape; empty: what the folder says.

    Raises:
        CheckpointError: missing, unreadable, incomplete or truncated.
        UnsafeWeights: weights only as pickles.
        UnsupportedArchitecture: not a pipeline of FLUX.1 or FLUX.2, or not that of `model`.
    """
    try:
        found = _read(path, weights)
        return _named(found, model) if model else found
    except OSError as error:
        raise CheckpointError(f"{path}: unreadable ({error})") from error


def _read(path: Path, weights: bool) -> Checkpoint:
    if not path.is_dir():
        hint = "--checkpoint and FLUXSERVE_CHECKPOINT name one"
        raise CheckpointError(f"{path}: no such folder; expected a diffusers-format checkpoint ({hint})")
    index = _json(path / "model_index.json")
    pipeline = str(index.get("_class_name"))
    if pipeline not in _PIPELINES:
        raise UnsupportedArchitecture(f"{path / 'model_index.json'}: _class_name", pipeline, " or ".join(_PIPELINES))
    if _PIPELINES[pipeline] is _KLEIN and index.get("is_distilled") is not True:
        allowed = "true: a base model takes a second pass per step for its guidance, which the loop lacks"
        raise UnsupportedArchitecture(f"{path / 'model_index.json'}: is_distilled", index.get("is_distilled"), allowed)
    for name, architecture in _PIPELINES[pipeline].items():
        _check_architecture(path / name, architecture)
        if weights:
            _check_weights(path / name)
    return Checkpoint(path, _spec(path))


def _named(found: Checkpoint, model: str) -> Checkpoint:
    alike = {member.name: member for member in specs.FAMILY if member.transformer == found.spec.transformer}
    if model not in alike:
        expected = f"{' or '.join(alike) or 'no name'}, by its transformer's shape"
        raise UnsupportedArchitecture(f"{found.path}: model", model, expected)
    return replace(found, spec=specs.as_member(found.spec, alike[model]))


def _spec(path: Path) -> ModelSpec:
    transformer = _json(path / "transformer" / "config.json")
    vae = _json(path / "vae" / "config.json")
    scheduler = _json(path / "scheduler" / "scheduler_config.json")
    if scheduler.get("_class_name") != _SCHEDULER:
        where = f"{path / 'scheduler' / 'scheduler_config.json'}: _class_name"
        raise UnsupportedArchitecture(where, scheduler.get("_class_name"), _SCHEDULER)
    try:
        spec = specs.from_configs(transformer, vae, scheduler)
        text, width = spec.text, spec.transformer.joint_attention_dim
        for encoder in text.encoders:
            config = _json(path / encoder.folder / "config.json")
            config = config.get("text_config", config)  # of a model that has eyes as well
            if encoder.layers and config["hidden_size"] * len(encoder.layers) != width:
                got = f"{encoder.folder}: {len(encoder.layers)} states of {config['hidden_size']}"
                raise ValueError(f"{got} must be the {width} that the transformer reads")
            text = text.changed(encoder.name, vocabulary=config["vocab_size"])
        return replace(spec, text=text)
    except KeyError as error:
        raise CheckpointError(f"{path}: a config.json lacks {error}") from error
    except (TypeError, ValueError) as error:
        raise UnsupportedArchitecture(str(path), str(error), "the dimensions of a FLUX model") from error


def _check_architecture(folder: Path, architecture: str) -> None:
    config = _json(folder / "config.json")
    got = config.get("_class_name") or config.get("architectures")
    if got not in (architecture, [architecture]):
        raise UnsupportedArchitecture(f"{folder / 'config.json'}: architecture", got, architecture)


def _check_weights(folder: Path) -> None:
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickled = sorted(f for f in folder.iterdir() if f.suffix in _PICKLES)
        if pickled:
            raise UnsafeWeights(str(pickled[0]))
        raise CheckpointError(f"{folder}: no weights; expected .safetensors files")
    for index in folder.glob("*.safetensors.index.json"):
        for shard in _shards(index):
            if not (folder / shard).is_file():
                raise CheckpointError(f"{folder / shard}: missing; {index.name} lists it")
    for file in weights:
        _check_length(file)


def _shards(index: Path) -> list[str]:
    """The files that an index lists. They must lie beside it, where their lengths are checked."""
    listed = _json(index).get("weight_map")
    shards = sorted({str(name) for name in listed.values()}) if isinstance(listed, dict) else []
    if not shards or any(Path(s).name != s or not s.endswith(".safetensors") for s in shards):
        raise CheckpointError(f"{index}: expected a weight_map of .safetensors files beside it")
    return shards


def _check_length(file: Path) -> None:
    """A safetensors file says in its header how long it is; one that was cut short is shorter."""
    try:
        size = file.stat().st_size
        with file.open("rb") as f:
            (header_size,) = struct.unpack("<Q", f.read(8))
            if header_size > size - 8:
                raise ValueError("header longer than the file")
            header = json.loads(f.read(header_size))
        ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    except (OSError, struct.error, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: not a safetensors file, or truncated ({error})") from error
    expected = 8 + header_size + max(ends, default=0)
    if size != expected:
        raise CheckpointError(f"{file}: {size} bytes; its header expects {expected}. The file is truncated or damaged")


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: missing; expected a diffusers-format checkpoint") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: unreadable ({error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: got a JSON {type(value).__name__}; expected an object")
    return value
