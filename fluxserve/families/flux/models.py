"""The members of the family, and their numbers.

They are those of the published diffusers configurations (transformer/config.json, vae/config.json,
scheduler/scheduler_config.json of FLUX.1-dev and -schnell, FLUX.2-klein and -dev) and of the pipelines' defaults.
"""

from dataclasses import replace

from fluxserve.families.flux.parts import FluxSpec, TransformerSpec
from fluxserve.families.shared.parts import VaeSpec
from fluxserve.sampling.schedule import ScheduleSpec
from fluxserve.spec import Defaults, EncoderSpec, Limits, TextSpec

_FLUX1 = TransformerSpec(
    num_layers=19,
    num_single_layers=38,
    num_attention_heads=24,
    attention_head_dim=128,
    joint_attention_dim=4096,
    pooled_projection_dim=768,
    guidance_embeds=True,
)
_FLUX1_VAE = VaeSpec(latent_channels=16, downscale=8, scaling_factor=0.3611, shift_factor=0.1159)


def _flux1_text(tokens: int) -> TextSpec:
    """CLIP, whose pooled embedding modulates the blocks, and T5 with so many tokens."""
    clip = EncoderSpec("clip", "text_encoder", "tokenizer", tokens=77, vocabulary=49408)
    return TextSpec((clip, EncoderSpec("t5", "text_encoder_2", "tokenizer_2", tokens, vocabulary=32128)))


_FLUX1_LIMITS = Limits(min_side=64, max_side=2048, max_pixels=2048 * 2048)

FLUX1_DEV = FluxSpec(
    name="flux.1-dev",
    transformer=_FLUX1,
    vae=_FLUX1_VAE,
    schedule=ScheduleSpec(use_dynamic_shifting=True, shift=3.0),
    text=_flux1_text(512),
    defaults=Defaults(side=1024, num_inference_steps=28, guidance_scale=3.5),
    limits=_FLUX1_LIMITS,
)
FLUX1_SCHNELL = FluxSpec(
    name="flux.1-schnell",
    transformer=replace(_FLUX1, guidance_embeds=False),
    vae=_FLUX1_VAE,
    schedule=ScheduleSpec(use_dynamic_shifting=False, shift=1.0),
    text=_flux1_text(256),
    defaults=Defaults(side=1024, num_inference_steps=4, guidance_scale=0.0),
    limits=_FLUX1_LIMITS,
)

# A klein is distilled to 4 steps, beyond twice as many it gains nothing; and guidance has no input to go to.
_KLEIN_4B = TransformerSpec(
    num_layers=5,
    num_single_layers=20,
    num_attention_heads=24,
    attention_head_dim=128,
    joint_attention_dim=7680,
    guidance_embeds=False,
    in_channels=128,
    axes_dims_rope=(32, 32, 32, 32),
    rope_theta=2000.0,
    mlp_ratio=3.0,
    generation=2,
)
_QWEN3 = EncoderSpec("qwen3", "text_encoder", "tokenizer", tokens=512, vocabulary=151936, layers=(9, 18, 27))

FLUX2_KLEIN_4B = FluxSpec(
    name="flux.2-klein-4b",
    transformer=_KLEIN_4B,
    vae=VaeSpec(latent_channels=32, downscale=8, scaling_factor=1.0, shift_factor=0.0),
    schedule=ScheduleSpec(use_dynamic_shifting=True, shift=3.0, empirical_shift=True),
    text=TextSpec((_QWEN3,)),
    defaults=Defaults(side=1024, num_inference_steps=4, guidance_scale=1.0),
    limits=replace(_FLUX1_LIMITS, max_inference_steps=8, max_guidance_scale=1.0, max_references=4),
)
FLUX2_KLEIN_9B = replace(
    FLUX2_KLEIN_4B,
    name="flux.2-klein-9b",
    transformer=replace(
        _KLEIN_4B, num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12288
    ),
)
# A base model is what a klein was distilled from, of the same shape: its folder differs in model_index.json alone.
FLUX2_KLEIN_BASE_4B = replace(
    FLUX2_KLEIN_4B,
    name="flux.2-klein-base-4b",
    classifier_free=True,
    defaults=Defaults(side=1024, num_inference_steps=50, guidance_scale=4.0),
    limits=replace(_FLUX1_LIMITS, max_references=4),
)
FLUX2_KLEIN_BASE_9B = replace(FLUX2_KLEIN_BASE_4B, name="flux.2-klein-base-9b", transformer=FLUX2_KLEIN_9B.transformer)
# The words that the model was trained behind (diffusers' flux2/system_messages.py); the line break is one of them.
_MISTRAL3 = EncoderSpec(
    name="mistral3",
    folder="text_encoder",
    tokenizer="tokenizer",
    tokens=512,
    vocabulary=131072,
    layers=(10, 20, 30),
    system="You are an AI that reasons about image descriptions. You give structured responses focusing on object"
    " relationships, object\nattribution and actions without speculation.",
)
FLUX2_DEV = replace(
    FLUX2_KLEIN_4B,
    name="flux.2-dev",
    transformer=replace(
        _KLEIN_4B,
        num_layers=8,
        num_single_layers=48,
        num_attention_heads=48,
        joint_attention_dim=15360,
        guidance_embeds=True,
    ),
    text=TextSpec((_MISTRAL3,)),
    defaults=Defaults(side=1024, num_inference_steps=28, guidance_scale=4.0),
    limits=replace(_FLUX1_LIMITS, max_references=4),
)
# fal's FLUX.2-dev Turbo: dev's network with a LoRA merged into it, so that its folder looks like dev's. Its makers call
# these sigmas shifted already; the call that they publish has diffusers shift them, so that is how it is drawn.
_TURBO_SIGMAS = (1.0, 0.6509, 0.4374, 0.2932, 0.1893, 0.1108, 0.0495, 0.00031)
FLUX2_DEV_TURBO = replace(
    FLUX2_DEV,
    name="flux.2-dev-turbo",
    schedule=replace(FLUX2_DEV.schedule, base_sigmas=_TURBO_SIGMAS),
    defaults=Defaults(side=1024, num_inference_steps=len(_TURBO_SIGMAS), guidance_scale=2.5),
    limits=replace(FLUX2_DEV.limits, max_inference_steps=len(_TURBO_SIGMAS)),
)
TINY = FluxSpec(
    name="tiny",
    transformer=TransformerSpec(
        num_layers=1,
        num_single_layers=5,
        num_attention_heads=2,
        attention_head_dim=128,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        guidance_embeds=True,
    ),
    vae=VaeSpec(latent_channels=16, downscale=8, scaling_factor=1.0194, shift_factor=0.0004),
    schedule=ScheduleSpec(use_dynamic_shifting=True, shift=3.0),
    text=_flux1_text(32),
    defaults=Defaults(side=128, num_inference_steps=20, guidance_scale=3.0),
    limits=Limits(min_side=64, max_side=512, max_pixels=512 * 512),
)

MEMBERS: tuple[FluxSpec, ...] = (
    FLUX1_DEV,
    FLUX1_SCHNELL,
    FLUX2_KLEIN_4B,
    FLUX2_KLEIN_9B,
    FLUX2_KLEIN_BASE_4B,
    FLUX2_KLEIN_BASE_9B,
    FLUX2_DEV,
    FLUX2_DEV_TURBO,
    TINY,
)
"""Of two whose transformers have one shape, a folder is taken for the first, unless somebody says otherwise."""
