"""The models as they are published: their modules at their real shapes, and what published.json says of them.

Transformers and VAEs come from the spec and the defaults of diffusers' classes, text encoders from published.json.
"""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin
from transformers import CLIPTextConfig, Mistral3Config, MistralConfig, PretrainedConfig, Qwen3Config, T5Config

from fluxserve.families.flux.models import MEMBERS, TINY
from fluxserve.families.flux.parts import FluxSpec, TransformerSpec
from fluxserve.families.registry import architectures

PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text())
MODELS = {spec.name: spec for spec in MEMBERS if spec is not TINY}
_CONFIGS = {"clip": CLIPTextConfig, "t5": T5Config, "qwen3": Qwen3Config}
_SHARED = {
    "flux.1-schnell": "flux.1-dev",
    "flux.2-klein-base-4b": "flux.2-klein-4b",
    "flux.2-klein-base-9b": "flux.2-klein-9b",
    "flux.2-dev-turbo": "flux.2-dev",
}
"""Model → the one whose text encoders it has."""
_CHANNELS = (128, 256, 512, 512)
"""Of each level of every VAE."""


def module(spec: FluxSpec, name: str) -> torch.nn.Module:
    """One component at its published shape. A language model is as deep as the last layer that is used."""
    cls = architectures(spec)[name].module
    if issubclass(cls, ConfigMixin):
        given = vae(spec) if name.startswith("vae") else transformer(spec.transformer)
        made: torch.nn.Module = cls(**given)
        return made
    layers = spec.text.named(name).layers
    return cls(text_config(spec, name, **({"num_hidden_layers": max(layers)} if layers else {})))


def transformer(shape: TransformerSpec) -> dict[str, Any]:
    """The configuration of diffusers' class."""
    names = ("num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim", "joint_attention_dim")
    given = {name: getattr(shape, name) for name in (*names, "guidance_embeds", "in_channels", "axes_dims_rope")}
    return given if shape.generation > 1 else {**given, "pooled_projection_dim": shape.pooled_projection_dim}


def vae(spec: FluxSpec, narrow: int = 1) -> dict[str, Any]:
    """Of AutoencoderKL, or AutoencoderKLFlux2, whose defaults are FLUX.2's. `narrow` divides channels, down to 32."""
    channels = tuple(max(32, whole // narrow) for whole in _CHANNELS)
    given = {"latent_channels": spec.vae.latent_channels, "block_out_channels": channels, "layers_per_block": 2}
    if spec.transformer.generation > 1:
        return given
    return {
        **given,
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


def encoder(spec: FluxSpec, name: str) -> dict[str, Any]:
    """What published.json says of a text encoder, which several models may share."""
    known: dict[str, Any] = PUBLISHED["text_encoders"][_SHARED.get(spec.name, spec.name)][name]
    return known


def text_config(spec: FluxSpec, name: str, **changed: Any) -> PretrainedConfig:
    """Of a text encoder; `changed` are entries of its own."""
    known = {**encoder(spec, name), **changed}
    if name == "mistral3":
        return Mistral3Config(text_config=MistralConfig(**known).to_dict())
    config: PretrainedConfig = _CONFIGS[name](**known)
    return config
