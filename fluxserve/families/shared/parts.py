"""What specs of several families are made of, and how they are read out of a config.json."""

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from fluxserve.spec import Numbers


@dataclass(frozen=True)
class VaeSpec(Numbers):
    """A VAE: `downscale` pixels to a latent pixel; the loop's latents are (z - shift) * scaling.

    One that scales by statistics among its weights has the factors 1 and 0.
    """

    latent_channels: int
    downscale: int
    scaling_factor: float
    shift_factor: float


def downscale(vae: Mapping[str, Any]) -> int:
    """Return the pixels of a latent pixel's side, of an AutoencoderKL's config.json. Raises KeyError, TypeError."""
    return int(2 ** (len(vae["block_out_channels"]) - 1))


def pick(spec: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of `config` that `spec` has fields for; lists become tuples, so that specs compare and hash.

    Raises:
        KeyError: an entry is missing.
    """
    for field in fields(spec):
        if field.default is MISSING and field.name not in config:
            raise KeyError(field.name)
    named = {f.name: config[f.name] for f in fields(spec) if config.get(f.name) is not None}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in named.items()}


def refuse_options(kind: str, config: Mapping[str, Any], neutral: Mapping[str, Any]) -> None:
    """Refuse options of a class that nothing here implements. Raises ValueError.

    Args:
        kind: what the configuration is of, for the message.
        neutral: the value of each option that changes nothing.
    """
    for name, value in neutral.items():
        if config.get(name, value) != value:
            raise ValueError(f"{kind} {name}: got {config[name]!r}; expected {value!r}")
