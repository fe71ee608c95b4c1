"""PixArt-Σ in diffusers' folders: what a pipeline consists of, and the spec that its configurations amount to."""

import math
from pathlib import Path

from fluxserve.errors import CheckpointError, UnsupportedArchitecture
from fluxserve.families.pixart import models
from fluxserve.families.pixart.models import MEMBERS, PixArtSpec, TransformerSpec
from fluxserve.families.shared.parts import VaeSpec, downscale, pick, refuse_options
from fluxserve.families.shared.tensors import Config
from fluxserve.folders.files import check_config, read_json
from fluxserve.sampling.betas import BetaSchedule
from fluxserve.spec import TextSpec

PIPELINE = "PixArtSigmaPipeline"
_COMPONENTS = {"transformer": "PixArtTransformer2DModel", "vae": "AutoencoderKL", "text_encoder": "T5EncoderModel"}
_SCHEDULER = "DPMSolverMultistepScheduler"

# Options that the published models leave at these values, and that the loop or a list of tensors does not know.
_TRANSFORMER = {
    "norm_type": "ada_norm_single",
    "activation_fn": "gelu-approximate",
    "attention_type": "default",
    "attention_bias": True,
    "norm_elementwise_affine": False,
}
_VAE = {"latents_mean": None, "latents_std": None, "shift_factor": None}
_SCHEDULE = {
    "trained_betas": None,
    "solver_order": 2,
    "prediction_type": "epsilon",
    "thresholding": False,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "lower_order_final": True,
    "euler_at_final": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "use_dynamic_shifting": False,
    "final_sigmas_type": "zero",
    "lambda_min_clipped": -math.inf,
    "variance_type": None,
    "rescale_betas_zero_snr": False,
}
_CONDITIONED = 128
"""The sample size whose transformer takes additional conditions where its configuration is silent."""

_BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "timestep_spacing": "linspace"}
"""What the scheduler's class takes where its configuration is silent."""


def read(path: Path) -> PixArtSpec:
    """Read a folder's configurations; see families.base."""
    for name, architecture in _COMPONENTS.items():
        check_config(path / name, architecture)
    file = path / "scheduler" / "scheduler_config.json"
    scheduler = read_json(file)
    if scheduler.get("_class_name") != _SCHEDULER:
        raise UnsupportedArchitecture(f"{file}: _class_name", scheduler.get("_class_name"), _SCHEDULER)
    configs = {name: read_json(path / name / "config.json") for name in _COMPONENTS}
    try:
        return from_configs(**configs, scheduler=scheduler)
    except KeyError as error:
        raise CheckpointError(f"{path}: a config.json lacks {error}") from error
    except (TypeError, ValueError) as error:
        raise UnsupportedArchitecture(str(path), str(error), "numbers of one PixArt-Σ") from error


def from_configs(transformer: Config, vae: Config, text_encoder: Config, scheduler: Config) -> PixArtSpec:
    """Read a spec out of a folder's four config.json files; a shape that nobody published is called "custom".

    Raises:
        ValueError, TypeError: the numbers contradict each other, or an option is not implemented.
        KeyError: a number is missing.
    """
    shape = _transformer(transformer)
    refuse_options("vae", vae, _VAE)
    refuse_options("scheduler", scheduler, _SCHEDULE)
    if (width := text_encoder["d_model"]) != shape.caption_channels:
        raise ValueError(
            f"text_encoder d_model: got {width}; expected {shape.caption_channels}, as the transformer reads"
        )
    found = VaeSpec(vae["latent_channels"], downscale(vae), vae["scaling_factor"], 0.0)
    published = next((member for member in MEMBERS if member.transformer == shape), None)
    if published is not None and found != published.vae:
        raise ValueError(f"vae: got {found}; expected {published.vae}, which {published.name} draws in")
    side = shape.sample_size * found.downscale
    return PixArtSpec(
        name=published.name if published else "custom",
        transformer=shape,
        vae=found,
        schedule=BetaSchedule(**pick(BetaSchedule, {**_BETAS, **scheduler})),
        text=TextSpec((models.T5,)).changed("t5", vocabulary=text_encoder["vocab_size"]),
        defaults=models.defaults(side),
        limits=models.limits(side),
    )


def _transformer(config: Config) -> TransformerSpec:
    refuse_options("transformer", config, _TRANSFORMER)
    size = config["sample_size"]
    conditions = config.get("use_additional_conditions")
    if conditions or (conditions is None and size == _CONDITIONED):
        raise ValueError("transformer use_additional_conditions: got true; expected false: PixArt-α's are not drawn")
    if config.get("interpolation_scale") is None:
        config = {**config, "interpolation_scale": models.default_interpolation(size)}
    shape = TransformerSpec(**pick(TransformerSpec, config))
    width = shape.num_attention_heads * shape.attention_head_dim
    if config["cross_attention_dim"] != width:
        raise ValueError(f"transformer cross_attention_dim: got {config['cross_attention_dim']}; expected {width}")
    return shape
