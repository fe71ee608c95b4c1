"""FLUX in diffusers' folders: which components a pipeline has, and which member of the family it is."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fluxserve.errors import CheckpointError, UnsupportedArchitecture
from fluxserve.families.flux.configs import as_base, as_member, from_configs
from fluxserve.families.flux.models import MEMBERS
from fluxserve.families.flux.parts import FluxSpec, TransformerSpec
from fluxserve.folders.files import MODEL_INDEX, check_config, read_json
from fluxserve.spec import EncoderSpec

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
PIPELINES = {
    "FluxPipeline": _FLUX1,
    "FluxImg2ImgPipeline": _FLUX1,
    "Flux2KleinPipeline": _KLEIN,
    "Flux2Pipeline": _FLUX2,
}
"""Pipeline → the classes of its components, by their folders."""

_SCHEDULER = "FlowMatchEulerDiscreteScheduler"


def read(path: Path, index: Mapping[str, Any]) -> FluxSpec:
    """Read a folder's configurations; see families.base."""
    components = PIPELINES[index["_class_name"]]
    distilled = index.get("is_distilled", False)  # diffusers' default
    if components is _KLEIN and not isinstance(distilled, bool):
        raise UnsupportedArchitecture(
            f"{path / MODEL_INDEX}: is_distilled", distilled, "true, or false of a base model"
        )
    for name, architecture in components.items():
        check_config(path / name, architecture)
    spec = _spec(path)
    return as_base(spec) if components is _KLEIN and not distilled else spec


def named(spec: FluxSpec, name: str) -> FluxSpec:
    """Take a folder for a member of its shape. Raises ValueError, which says what it may be."""
    alike = {
        member.name: member
        for member in MEMBERS
        if member.transformer == spec.transformer and member.classifier_free == spec.classifier_free
    }
    if name not in alike:
        raise ValueError(f"{' or '.join(alike) or 'no name'}, by its transformer and whether it is distilled")
    return as_member(spec, alike[name])


def _spec(path: Path) -> FluxSpec:
    transformer = read_json(path / "transformer" / "config.json")
    vae = read_json(path / "vae" / "config.json")
    scheduler = read_json(path / "scheduler" / "scheduler_config.json")
    if scheduler.get("_class_name") != _SCHEDULER:
        where = f"{path / 'scheduler' / 'scheduler_config.json'}: _class_name"
        raise UnsupportedArchitecture(where, scheduler.get("_class_name"), _SCHEDULER)
    try:
        spec = from_configs(transformer, vae, scheduler)
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
