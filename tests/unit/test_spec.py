"""The tables of fluxserve.spec against the published configurations, and how a folder's numbers are read."""

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE

from fluxserve.families.flux import models
from fluxserve.families.flux.configs import as_member, from_configs
from fluxserve.families.flux.models import (
    FLUX1_DEV,
    FLUX1_SCHNELL,
    FLUX2_DEV,
    FLUX2_DEV_TURBO,
    FLUX2_KLEIN_4B,
    FLUX2_KLEIN_9B,
    TINY,
)
from fluxserve.families.flux.parts import FluxSpec
from fluxserve.spec import Defaults

# What the published folders say.
DEV = {
    "_class_name": "FluxTransformer2DModel",
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}
SCHNELL = {**DEV, "guidance_embeds": False}
KLEIN_4B = {
    "_class_name": "Flux2Transformer2DModel",
    "attention_head_dim": 128,
    "axes_dims_rope": [32, 32, 32, 32],
    "eps": 1e-06,
    "guidance_embeds": False,
    "in_channels": 128,
    "joint_attention_dim": 7680,
    "mlp_ratio": 3.0,
    "num_attention_heads": 24,
    "num_layers": 5,
    "num_single_layers": 20,
    "out_channels": None,
    "patch_size": 1,
    "rope_theta": 2000,
    "timestep_guidance_channels": 256,
}
KLEIN_9B = {
    **KLEIN_4B,
    "joint_attention_dim": 12288,
    "num_attention_heads": 32,
    "num_layers": 8,
    "num_single_layers": 24,
}
FLUX2 = {
    **KLEIN_4B,
    "guidance_embeds": True,
    "joint_attention_dim": 15360,
    "num_attention_heads": 48,
    "num_layers": 8,
    "num_single_layers": 48,
}
KLEIN_VAE = {"block_out_channels": [128, 256, 512, 512], "latent_channels": 32}
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "latent_channels": 16,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}
DEV_SCHEDULE = {
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
SCHNELL_SCHEDULE = {**DEV_SCHEDULE, "shift": 1.0, "use_dynamic_shifting": False}


def without(config: dict[str, Any], name: str) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k != name}


@pytest.mark.parametrize(
    ("transformer", "vae", "schedule", "model"),
    [
        (DEV, VAE, DEV_SCHEDULE, FLUX1_DEV),
        (SCHNELL, VAE, SCHNELL_SCHEDULE, FLUX1_SCHNELL),
        (KLEIN_4B, KLEIN_VAE, DEV_SCHEDULE, FLUX2_KLEIN_4B),
        (KLEIN_9B, KLEIN_VAE, DEV_SCHEDULE, FLUX2_KLEIN_9B),
        (FLUX2, KLEIN_VAE, DEV_SCHEDULE, FLUX2_DEV),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_the_tables_agree_with_the_published_configurations(
    transformer: dict[str, Any], vae: dict[str, Any], schedule: dict[str, Any], model: FluxSpec
) -> None:
    assert from_configs(transformer, vae, schedule) == model


def test_what_a_configuration_of_flux2_leaves_out_is_as_diffusers_has_it() -> None:
    bare = without(without(KLEIN_9B, "mlp_ratio"), "rope_theta")
    assert from_configs(bare, KLEIN_VAE, DEV_SCHEDULE) == FLUX2_KLEIN_9B


def test_the_family() -> None:
    assert (FLUX1_DEV.text.sequence.tokens, FLUX1_SCHNELL.text.sequence.tokens) == (512, 256)
    assert FLUX1_DEV.transformer.hidden_size == FLUX1_SCHNELL.transformer.hidden_size == 3072
    assert (FLUX2_KLEIN_4B.transformer.hidden_size, FLUX2_KLEIN_9B.transformer.hidden_size) == (3072, 4096)
    assert TINY.transformer.hidden_size == 256
    assert (FLUX1_DEV.transformer.mlp_width, FLUX2_KLEIN_4B.transformer.mlp_width) == (4 * 3072, 3 * 3072)
    assert (FLUX1_DEV.transformer.rope_theta, FLUX2_KLEIN_4B.transformer.rope_theta) == (10000, 2000)
    assert FLUX1_DEV.components == ("clip", "t5", "transformer", "vae_encoder", "vae_decoder")
    assert FLUX2_KLEIN_4B.components == ("qwen3", "transformer", "vae_encoder", "vae_decoder")
    assert FLUX1_DEV.defaults == Defaults(1024, 28, 3.5)
    assert FLUX1_SCHNELL.defaults == Defaults(1024, 4, 0.0)
    assert FLUX2_KLEIN_4B.defaults == FLUX2_KLEIN_9B.defaults == Defaults(1024, 4, 1.0)
    assert FLUX2_DEV_TURBO.defaults == Defaults(1024, 8, 2.5)
    assert len({m.name for m in models.MEMBERS}) == len(models.MEMBERS) == 9
    assert len({m.transformer for m in models.MEMBERS}) == 6, "dev's Turbo has dev's, a Base its klein's"


def test_turbo_is_dev_drawn_in_eight_steps() -> None:
    turbo = as_member(from_configs(FLUX2, KLEIN_VAE, {**DEV_SCHEDULE, "shift": 2.0}), FLUX2_DEV_TURBO)
    assert turbo == replace(FLUX2_DEV_TURBO, schedule=replace(FLUX2_DEV_TURBO.schedule, shift=2.0))
    assert (turbo.only_steps, turbo.limits.max_references) == (8, FLUX2_DEV.limits.max_references)
    assert as_member(turbo, FLUX2_DEV).schedule.base_sigmas == ()
    assert {m.name for m in models.MEMBERS if m.only_steps} == {"flux.2-dev-turbo"}


def test_base_sigmas_are_not_the_folders_to_say() -> None:
    assert from_configs(FLUX2, KLEIN_VAE, {**DEV_SCHEDULE, "base_sigmas": [1.0, 0.5]}) == FLUX2_DEV


@pytest.mark.parametrize("change", ["defaults", "limits"])
def test_other_steps_than_base_sigmas(change: str) -> None:
    with pytest.raises(ValueError, match="must be the 8 base sigmas'"):
        replace(FLUX2_DEV_TURBO, **{change: getattr(FLUX2_DEV, change)})


@pytest.mark.parametrize("model", models.MEMBERS, ids=lambda m: m.name)
def test_defaults_are_within_the_limits(model: FluxSpec) -> None:
    d, limits = model.defaults, model.limits
    assert limits.min_side <= d.side <= limits.max_side and d.side % model.size_multiple == 0
    assert d.side**2 <= limits.max_pixels
    assert 1 <= d.num_inference_steps <= limits.max_inference_steps
    assert 0 <= d.guidance_scale <= limits.max_guidance_scale
    assert 0 < d.strength <= 1
    assert limits.min_side % model.size_multiple == limits.max_side % model.size_multiple == 0
    assert limits.min_side * limits.max_side <= limits.max_pixels, "the most extreme aspect ratio must fit"


def test_the_text_is_as_wide_as_the_blocks_expect() -> None:
    """Qwen3-4B's, Qwen3-8B's and Mistral Small's hidden states, three of them one behind the other."""
    for model, width in ((FLUX2_KLEIN_4B, 2560), (FLUX2_KLEIN_9B, 4096), (FLUX2_DEV, 5120)):
        assert model.transformer.joint_attention_dim == width * len(model.text.sequence.layers)


def test_the_system_message_is_that_of_diffusers() -> None:
    assert FLUX2_DEV.text.sequence.system == SYSTEM_MESSAGE


def test_sizes() -> None:
    assert FLUX1_DEV.size_multiple == 16
    assert FLUX1_DEV.latent_size(1024, 768) == (128, 96)
    assert FLUX1_DEV.image_tokens(1024, 768) == 64 * 48


def test_a_fine_tune_keeps_its_bases_defaults_but_has_its_own_vae_and_schedule() -> None:
    vae = {**VAE, "scaling_factor": 0.5, "block_out_channels": [32, 64, 64]}
    model = from_configs(SCHNELL, vae, {**SCHNELL_SCHEDULE, "shift": 2.0})
    assert (model.name, model.defaults, model.text) == ("flux.1-schnell", FLUX1_SCHNELL.defaults, FLUX1_SCHNELL.text)
    assert (model.vae.scaling_factor, model.vae.downscale, model.size_multiple) == (0.5, 4, 8)
    assert model.schedule.shift == 2.0


@pytest.mark.parametrize(
    ("base", "like"), [(DEV, FLUX1_DEV), (SCHNELL, FLUX1_SCHNELL), (KLEIN_9B, FLUX2_KLEIN_9B), (FLUX2, FLUX2_DEV)]
)
def test_a_shape_nobody_published(base: dict[str, Any], like: FluxSpec) -> None:
    vae = KLEIN_VAE if base in (KLEIN_9B, FLUX2) else VAE
    model = from_configs({**base, "num_layers": 9}, vae, DEV_SCHEDULE)
    assert model.name == "custom"
    assert model.transformer == replace(like.transformer, num_layers=9)
    assert (model.defaults, model.limits, model.text) == (like.defaults, like.limits, like.text)


def test_a_flux2_that_does_not_name_its_axes() -> None:
    """The default is FLUX.1's, and sums to the same 128."""
    with pytest.raises(KeyError, match="axes_dims_rope"):
        from_configs(without(KLEIN_4B, "axes_dims_rope"), KLEIN_VAE, DEV_SCHEDULE)


def test_lists_become_tuples() -> None:
    model = from_configs({**DEV, "axes_dims_rope": [16, 56, 56]}, VAE, DEV_SCHEDULE)
    assert model.name == "flux.1-dev"
    assert hash(model) == hash(FLUX1_DEV)


@pytest.mark.parametrize("name", ["latent_channels", "block_out_channels", "scaling_factor", "shift_factor"])
def test_a_number_that_the_vae_lacks(name: str) -> None:
    with pytest.raises(KeyError, match=name):
        from_configs(DEV, without(VAE, name), DEV_SCHEDULE)


@pytest.mark.parametrize("name", ["num_layers", "num_attention_heads", "pooled_projection_dim", "guidance_embeds"])
def test_a_number_that_the_transformer_lacks(name: str) -> None:
    with pytest.raises(KeyError, match=name):
        from_configs(without(DEV, name), VAE, DEV_SCHEDULE)


@pytest.mark.parametrize(
    ("transformer", "vae"),
    [
        ({**DEV, "in_channels": 128}, VAE),
        (DEV, {**VAE, "latent_channels": 4}),
        ({**DEV, "axes_dims_rope": [16, 56, 57]}, VAE),
        ({**DEV, "attention_head_dim": 64}, VAE),
        (KLEIN_4B, VAE),
        ({**KLEIN_4B, "axes_dims_rope": [32, 32, 32]}, KLEIN_VAE),
    ],
)
def test_numbers_that_contradict_each_other(transformer: dict[str, Any], vae: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        from_configs(transformer, vae, DEV_SCHEDULE)


@pytest.mark.parametrize("name", ["scaling_factor", "shift_factor"])
def test_a_vae_number_that_is_null(name: str) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        from_configs(DEV, {**VAE, name: None}, DEV_SCHEDULE)


@pytest.mark.parametrize(
    "option",
    [
        {"use_karras_sigmas": True},
        {"use_beta_sigmas": True},
        {"use_exponential_sigmas": True},
        {"shift_terminal": 0.02},
        {"time_shift_type": "linear"},
        {"invert_sigmas": True},
        {"stochastic_sampling": True},
    ],
)
def test_a_schedule_that_is_not_implemented(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        from_configs(DEV, VAE, {**DEV_SCHEDULE, **option})


def test_a_spec_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        FLUX1_DEV.name = "mine"  # type: ignore[misc]
