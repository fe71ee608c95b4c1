"""A FLUX.1 of random weights, small enough for a CPU: two double and two single blocks, hidden size 64."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from fluxserve.engine import Components
from fluxserve.engines import torch_eager
from fluxserve.families.flux.configs import from_configs
from fluxserve.families.flux.parts import FluxSpec

VOCABULARY = 512
SCHEDULER = {
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


@dataclass(frozen=True)
class RandomFlux:
    """The modules as diffusers' pipelines take them, and the spec that describes them."""

    clip: CLIPTextModel
    t5: T5EncoderModel
    transformer: FluxTransformer2DModel
    vae: AutoencoderKL
    scheduler: dict[str, object]
    spec: FluxSpec

    def components(self) -> Components:
        modules = {"clip": self.clip, "t5": self.t5, "transformer": self.transformer}
        return torch_eager.from_modules(self.spec, {**modules, "vae_encoder": self.vae, "vae_decoder": self.vae})

    def save(self, folder: Path) -> None:
        """The weights as diffusers lays them out; neither scheduler nor tokenizers."""
        modules = {
            "text_encoder": self.clip,
            "text_encoder_2": self.t5,
            "transformer": self.transformer,
            "vae": self.vae,
        }
        for name, module in modules.items():
            module.save_pretrained(folder / name)

    def new_scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        return FlowMatchEulerDiscreteScheduler(**self.scheduler)


@cache
def make(guidance_embeds: bool = True, dynamic: bool = True, seed: int = 0) -> RandomFlux:
    """The same weights for the same arguments; without guidance and dynamic shifting, a FLUX.1-schnell."""
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=48,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(8, 12, 12),
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        layers_per_block=1,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    scheduler = {**SCHEDULER, "use_dynamic_shifting": dynamic, "shift": 3.0 if dynamic else 1.0}
    spec = from_configs(transformer.config, vae.config, scheduler)
    spec = replace(spec, text=spec.text.changed("t5", tokens=24))
    modules = (_clip(), _t5(), transformer, vae)
    return RandomFlux(*(m.eval().requires_grad_(False) for m in modules), scheduler=scheduler, spec=spec)


def _clip() -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=VOCABULARY,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=VOCABULARY - 2,
            eos_token_id=VOCABULARY - 1,
        )
    )


def _t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    )
