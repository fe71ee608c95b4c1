"""PixArt-Σ's components as functions of their signatures' tensors, over the modules of diffusers and transformers."""

from collections.abc import Mapping

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from torch import Tensor
from transformers.models.t5.modeling_t5 import T5EncoderModel

from fluxserve.families.base import Architecture
from fluxserve.families.pixart.models import PixArtSpec
from fluxserve.families.shared.modules import T5, VaeDecoder, VaeEncoder, Wrapper


class Transformer(Wrapper):
    """signatures._transformer of a PixArtTransformer2DModel."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, encoder_attention_mask: Tensor, timestep: Tensor
    ) -> Tensor:
        noise: Tensor = self.module(
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            timestep=timestep,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return noise


def architectures(spec: PixArtSpec) -> Mapping[str, Architecture]:
    """Every component of a model."""
    return {
        "t5": Architecture(spec.text.sequence.folder, T5EncoderModel, T5),
        "transformer": Architecture("transformer", PixArtTransformer2DModel, Transformer),
        "vae_encoder": Architecture("vae", AutoencoderKL, VaeEncoder),
        "vae_decoder": Architecture("vae", AutoencoderKL, VaeDecoder),
    }
