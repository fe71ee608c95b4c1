"""The modules of the tiny FLUX.1: 9.9 M parameters in four parts, all in diffusers' own classes."""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel, TokenizersBackend

LATENT_CHANNELS = 16
VAE_STRIDE = 8
T5_TOKENS = 32  # what training pads to; every caption of the grammar fits
TEXT_WIDTH = 128


def make_vae() -> AutoencoderKL:
    """×8 autoencoder with 16 latent channels, 1.15 M parameters."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 48, 64, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=128,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def make_transformer() -> FluxTransformer2DModel:
    """One double and five single blocks of width 256: 7.9 M parameters.

    A double block spends half of its weights on the text stream; at this size depth buys more.
    """
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=5,
        attention_head_dim=128,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(16, 56, 56),
    )


def make_t5(tokenizer: TokenizersBackend) -> T5EncoderModel:
    """Two layers, 2 heads × 64."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_WIDTH,
            d_kv=64,
            d_ff=256,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            is_encoder_decoder=False,
            use_cache=False,
            tie_word_embeddings=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def make_clip(tokenizer: TokenizersBackend) -> CLIPTextModel:
    """Two layers, 2 heads × 64, 77 positions."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=256,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The schedule of FLUX.1-dev."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def parameter_count(*modules: torch.nn.Module) -> int:
    """Parameters of all modules together, shared ones once."""
    return sum(p.numel() for p in {p for m in modules for p in m.parameters()})
