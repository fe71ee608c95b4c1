"""FLUX's components as functions of their signatures' tensors, over the modules of diffusers and transformers.

This is what torch_eager runs and what the exporter traces.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPTextModel
from transformers.models.mistral3.configuration_mistral3 import Mistral3Config
from transformers.models.mistral3.modeling_mistral3 import Mistral3ForConditionalGeneration
from transformers.models.qwen3.modeling_qwen3 import Qwen3Config, Qwen3Model
from transformers.models.t5.modeling_t5 import T5EncoderModel

from fluxserve.families.base import Architecture
from fluxserve.families.flux.parts import PATCH, FluxSpec
from fluxserve.families.shared.modules import T5, Clip, VaeDecoder, VaeEncoder, Wrapper


class Qwen3Layers(Qwen3Model):  # type: ignore[misc]
    """The first `num_hidden_layers` of a Qwen3ForCausalLM's folder, without the norm that follows its last layer."""

    _keys_to_ignore_on_load_unexpected: ClassVar = [r"^(model\.)?(layers|norm)\.", r"^lm_head\."]

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__(config)
        self.norm = nn.Identity()


class Mistral3Layers(Mistral3ForConditionalGeneration):  # type: ignore[misc]
    """The first `text_config.num_hidden_layers` of a Mistral3ForConditionalGeneration's folder: it only reads words.

    Without the norm that follows its last layer, without eyes, and without the head that would guess the next word.
    """

    _keys_to_ignore_on_load_unexpected: ClassVar = [
        r"(^|\.)language_model\.(model\.)?(layers|norm)\.",
        r"(^|\.)(vision_tower|multi_modal_projector|lm_head)\.",
    ]
    _tied_weights_keys: ClassVar[dict[str, str]] = {}

    def __init__(self, config: Mistral3Config) -> None:
        super().__init__(config)
        self.model.language_model.norm = nn.Identity()
        self.model.vision_tower = self.model.multi_modal_projector = self.lm_head = nn.Identity()


class LanguageModel(Wrapper):
    """signatures.language_model of a model of transformers."""

    def __init__(self, module: nn.Module, layers: tuple[int, ...]) -> None:
        super().__init__(module)
        self.layers = layers

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        read = {"input_ids": input_ids, "attention_mask": attention_mask}
        states = self.module(**read, output_hidden_states=True, use_cache=False).hidden_states
        return torch.cat([states[layer] for layer in self.layers], dim=-1)


class Transformer(Wrapper):
    """signatures.transformer of a FluxTransformer2DModel; one without guidance ignores it."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        guidance: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
    ) -> Tensor:
        guided = self.module.config.guidance_embeds  # type: ignore[union-attr]
        velocity: Tensor = self.module(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep,
            guidance=guidance if guided else None,
            img_ids=img_ids,
            txt_ids=txt_ids,
            return_dict=False,
        )[0]
        return velocity


class Transformer2(Wrapper):
    """signatures.transformer of a Flux2Transformer2DModel."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
    ) -> Tensor:
        velocity: Tensor = self.module(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            timestep=timestep,
            guidance=guidance,
            img_ids=img_ids,
            txt_ids=txt_ids,
            return_dict=False,
        )[0]
        return velocity


class Vae2Encoder(VaeEncoder):
    """signatures.vae_encoder of an AutoencoderKLFlux2: the latents are those that the loop has."""

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = super().forward(pixels)
        shift, scale = _statistics(self.module, mean)
        return (mean - shift) / scale, std / scale


class Vae2Decoder(VaeDecoder):
    """signatures.vae_decoder of an AutoencoderKLFlux2, of latents as the loop has them."""

    def forward(self, latents: Tensor) -> Tensor:
        shift, scale = _statistics(self.module, latents)
        return super().forward(latents * scale + shift)


def _statistics(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of latents [B, C, h, w], as [C, h, w] (Flux2KleinPipeline._encode_vae_image).

    There is one of each for the channels of a token, which are the places of a square of latents.
    """
    shift, scale = vae.bn.running_mean, torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
    squares = 1, latents.shape[2] // PATCH, latents.shape[3] // PATCH
    return shift.view(-1, PATCH, PATCH).repeat(squares), scale.view(-1, PATCH, PATCH).repeat(squares)


ARCHITECTURES = {
    "clip": Architecture("text_encoder", CLIPTextModel, Clip),
    "t5": Architecture("text_encoder_2", T5EncoderModel, T5),
    "transformer": Architecture("transformer", FluxTransformer2DModel, Transformer),
    "vae_encoder": Architecture("vae", AutoencoderKL, VaeEncoder),
    "vae_decoder": Architecture("vae", AutoencoderKL, VaeDecoder),
}
"""Of FLUX.1."""


def architectures(spec: FluxSpec) -> Mapping[str, Architecture]:
    """Every component of a model."""
    if spec.transformer.generation == 1:
        return ARCHITECTURES
    encoder = spec.text.sequence
    reads, folder = partial(LanguageModel, layers=encoder.layers), encoder.folder
    depth = {"num_hidden_layers": max(encoder.layers)}
    texts = {
        "qwen3": Architecture(folder, Qwen3Layers, reads, depth),
        "mistral3": Architecture(folder, Mistral3Layers, reads, {"text_config": depth}),
    }
    return {
        encoder.name: texts[encoder.name],
        "transformer": Architecture("transformer", Flux2Transformer2DModel, Transformer2),
        "vae_encoder": Architecture("vae", AutoencoderKLFlux2, Vae2Encoder),
        "vae_decoder": Architecture("vae", AutoencoderKLFlux2, Vae2Decoder),
    }
