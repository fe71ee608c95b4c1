"""A diffusers-format folder, looked over before anything is loaded from it.

Nothing here reads weights: it reads the small JSON files and the headers of the safetensors, so that a folder that is
missing, truncated, pickled, quantised or of another architecture is refused in milliseconds with the file's name.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fluxserve import spec as specs
from fluxserve.errors import CheckpointError, UnsupportedArchitecture
from fluxserve.folders import foreign
from fluxserve.folders import weights as component_weights
from fluxserve.folders.files import MODEL_INDEX, locate, read_json
from fluxserve.folders.weights import Weights
from fluxserve.spec import EncoderSpec, ModelSpec, TransformerSpec
from fluxserve.spec.tensors import tensors

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

_DIFFUSERS, _TRANSFORMERS = "diffusion_pytorch_model", "model"
"""What the names of weights begin with in the folders of either library."""

_SCHEDULER = "FlowMatchEulerDiscreteScheduler"


@dataclass(frozen=True)
class Checkpoint:
    """A folder that was looked over, and what it holds."""

    path: Path
    spec: ModelSpec

    @property
    def folders(self) -> tuple[str, ...]:
        """The components' folders that hold weights."""
        return (*(encoder.folder for encoder in self.spec.text.encoders), "transformer", "vae")

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
        read = [max(encoder.layers) for encoder in self.spec.text.encoders if encoder.folder == name and encoder.layers]
        try:
            listed = tensors(str(module), config, *read)
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
        UnsupportedArchitecture: not a pipeline of FLUX.1 or FLUX.2, or not that of `model`.
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
    if pipeline not in _PIPELINES:
        raise UnsupportedArchitecture(f"{path / MODEL_INDEX}: _class_name", pipeline, " or ".join(_PIPELINES))
    if _PIPELINES[pipeline] is _KLEIN and index.get("is_distilled") is not True:
        allowed = "true: a base model takes a second pass per step for its guidance, which the loop lacks"
        raise UnsupportedArchitecture(f"{path / MODEL_INDEX}: is_distilled", index.get("is_distilled"), allowed)
    for name, architecture in _PIPELINES[pipeline].items():
        _check_config(path / name, architecture)
    found = Checkpoint(path, _spec(path))
    for name in found.folders if weights else ():
        files = found.weights(name).set
        if len(files.files) > 1 and files.index is None:
            raise CheckpointError(f"{path / name}: shards without their index; expected a .safetensors.index.json")
    return found


def _named(found: Checkpoint, model: str) -> Checkpoint:
    alike = {member.name: member for member in specs.FAMILY if member.transformer == found.spec.transformer}
    if model not in alike:
        expected = f"{' or '.join(alike) or 'no name'}, by its transformer's shape"
        raise UnsupportedArchitecture(f"{found.path}: model", model, expected)
    return replace(found, spec=specs.as_member(found.spec, alike[model]))


def _spec(path: Path) -> ModelSpec:
    transformer = read_json(path / "transformer" / "config.json")
    vae = read_json(path / "vae" / "config.json")
    scheduler = read_json(path / "scheduler" / "scheduler_config.json")
    if scheduler.get("_class_name") != _SCHEDULER:
        where = f"{path / 'scheduler' / 'scheduler_config.json'}: _class_name"
        raise UnsupportedArchitecture(where, scheduler.get("_class_name"), _SCHEDULER)
    try:
        spec = specs.from_configs(transformer, vae, scheduler)
        text = spec.text
        for encoder in text.encoders:
            config = read_json(path / encoder.folder / "config.json")
            config = config.get("text_config", config)  # of a model that has eyes as well
            _check_width(encoder, config, spec.transformer, encoder is spec.text.sequence)
            text = text.changed(encoder.name, vocabulary=config["vocab_size"])
        return replace(spec, text=text)
    except KeyError as error:
        raise CheckpointError(f"{path}: a config.json lacks {error}") from error
    except (TypeError, ValueError) as error:
        raise UnsupportedArchitecture(str(path), str(error), "numbers of one FLUX model") from error


def _check_width(encoder: EncoderSpec, config: dict[str, Any], transformer: TransformerSpec, sequence: bool) -> None:
    """A text encoder's states are as wide as the transformer's input that they go to. Raises ValueError, KeyError."""
    width = config["d_model"] if "d_model" in config else config["hidden_size"]
    states = len(encoder.layers) or 1
    expected = transformer.joint_attention_dim if sequence else transformer.pooled_projection_dim
    if width * states != expected:
        got = f"{encoder.folder}: {states} states of {width}"
        raise ValueError(f"{got} must be the {expected} that the transformer reads; it is another model's")


def _check_config(folder: Path, architecture: str) -> None:
    """A component's class, and that nothing of it is quantised."""
    file = folder / "config.json"
    config = read_json(file)
    expected: str | list[str] = architecture if "_class_name" in config else [architecture]
    if (got := config.get("_class_name", config.get("architectures"))) != expected:
        raise UnsupportedArchitecture(f"{file}: architecture", got, architecture)
    beside = folder / "hf_quant_config.json"
    for source, values in ((file, config), *([(beside, read_json(beside))] if beside.exists() else [])):
        if quantiser := foreign.quantiser(values):
            raise CheckpointError(f"{source}: got {quantiser}")
