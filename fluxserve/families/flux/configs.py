"""The numbers in a diffusers folder → a FluxSpec: which member of the family it is, or what it is nearest to."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fluxserve.families.flux.models import (
    FLUX1_DEV,
    FLUX1_SCHNELL,
    FLUX2_DEV,
    FLUX2_KLEIN_4B,
    FLUX2_KLEIN_BASE_4B,
    MEMBERS,
)
from fluxserve.families.flux.parts import FluxSpec, TransformerSpec
from fluxserve.families.shared.parts import VaeSpec, downscale, pick, refuse_options
from fluxserve.sampling.schedule import ScheduleSpec


def from_configs(transformer: Mapping[str, Any], vae: Mapping[str, Any], scheduler: Mapping[str, Any]) -> FluxSpec:
    """Read a FluxSpec out of a diffusers folder's three config.json files.

    A fine-tune keeps its base's transformer shape, and with it the base's defaults and limits; the schedule's numbers
    are the folder's own. A shape nobody published gets FLUX.1-dev's or -schnell's defaults, by whether it has a
    guidance embedding; one of generation 2 FLUX.2-dev's or -klein's.

    Raises:
        ValueError: the numbers contradict each other, or a component is another model's.
        KeyError: a number is missing.
    """
    refuse_options("scheduler", scheduler, _NOT_IMPLEMENTED)
    shape = _transformer(transformer)
    base = next((m for m in MEMBERS if m.transformer == shape), None)
    published = base
    if base is None:
        guided, unguided = (FLUX2_DEV, FLUX2_KLEIN_4B) if shape.generation == 2 else (FLUX1_DEV, FLUX1_SCHNELL)
        base = replace(guided if shape.guidance_embeds else unguided, name="custom")
    factors = (1.0, 0.0) if shape.generation == 2 else (vae["scaling_factor"], vae["shift_factor"])
    schedule = ScheduleSpec(**pick(ScheduleSpec, scheduler))
    found = replace(
        base,
        transformer=shape,
        vae=VaeSpec(vae["latent_channels"], downscale(vae), *factors),
        schedule=replace(schedule, empirical_shift=shape.generation == 2, base_sigmas=base.schedule.base_sigmas),
    )
    if published is not None:
        _check_companions(found, published)
    return found


def _check_companions(found: FluxSpec, published: FluxSpec) -> None:
    """A published transformer comes with its own kind of schedule, and a VAE of its latents. Raises ValueError.

    Other models' have the same shapes (SD3's VAE in FLUX.1, schnell's transformer with dev's scheduler), and only the
    picture would tell. A VAE of another resolution was trained for the purpose, and has factors of its own.
    """
    held = [("schedule", "use_dynamic_shifting")]
    if found.vae.downscale == published.vae.downscale:
        held += [("vae", "scaling_factor"), ("vae", "shift_factor")]
    for part, name in held:
        got, expected = (getattr(getattr(spec, part), name) for spec in (found, published))
        if got != expected:
            whose = f"beside a transformer of {published.name}: one of the two is another model's"
            raise ValueError(f"{part} {name}: got {got}; expected {expected} {whose}")


def as_member(found: FluxSpec, member: FluxSpec) -> FluxSpec:
    """What a folder holds, taken for a member of the family whose transformer has the same shape.

    Defaults, limits and base sigmas are the member's; the VAE's scale and the schedule's shift stay the folder's own.
    """
    assert found.transformer == member.transformer, "another shape is another model"
    schedule = replace(found.schedule, base_sigmas=member.schedule.base_sigmas)
    return replace(
        found,
        name=member.name,
        schedule=schedule,
        defaults=member.defaults,
        limits=member.limits,
        classifier_free=member.classifier_free,
    )


def as_base(found: FluxSpec) -> FluxSpec:
    """Return a klein's spec as that of the base model of its shape, which is not distilled."""
    alike = (member for member in MEMBERS if member.classifier_free and member.transformer == found.transformer)
    custom = replace(FLUX2_KLEIN_BASE_4B, name=found.name, transformer=found.transformer)
    return as_member(found, next(alike, custom))


def _transformer(config: Mapping[str, Any]) -> TransformerSpec:
    generation = 2 if config.get("_class_name") == "Flux2Transformer2DModel" else 1
    needed = "axes_dims_rope" if generation == 2 else "pooled_projection_dim"  # without a default that would fit
    if config.get(needed) is None:
        raise KeyError(needed)
    klein = FLUX2_KLEIN_4B.transformer
    usual = {name: getattr(klein, name) for name in ("rope_theta", "mlp_ratio")} if generation == 2 else {}
    return replace(TransformerSpec(**pick(TransformerSpec, {**usual, **config})), generation=generation)


# Options of FlowMatchEulerDiscreteScheduler that FLUX does not use and sampling/schedule.py lacks: neutral values.
_NOT_IMPLEMENTED = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "invert_sigmas": False,
    "stochastic_sampling": False,
    "shift_terminal": None,
    "time_shift_type": "exponential",
}
