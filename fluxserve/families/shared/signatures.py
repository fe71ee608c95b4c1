"""The signatures of components that several families have."""

from fluxserve.engine import FLOATING, Dim, Signature, TensorSpec
from fluxserve.families.shared.parts import VaeSpec

MAX_ROWS = 64
_RGB = 3


def rows(most: int = MAX_ROWS) -> Dim:
    """Return the dimension of a batch."""
    return Dim("rows", 1, most)


def _sides(least: int, most: int, multiple: int) -> tuple[Dim, Dim]:
    """Height and width; the symbols are in latent pixels."""
    return Dim("latent_height", least, most, multiple), Dim("latent_width", least, most, multiple)


def vae_decoder(vae: VaeSpec, least: int, most: int) -> Signature:
    """Latents as the VAE has them (already unscaled) → pixels in −1..1.

    Args:
        least, most: of a side, in latent pixels.
    """
    latents, pixels = _sides(least, most, 1), _sides(least, most, vae.downscale)
    return Signature(
        inputs=(TensorSpec("latents", FLOATING, (rows(), vae.latent_channels, *latents)),),
        outputs=(TensorSpec("pixels", FLOATING, (rows(), _RGB, *pixels)),),
    )


def vae_encoder(vae: VaeSpec, least: int, most: int) -> Signature:
    """Pixels in −1..1 → mean and standard deviation of the latents, as the VAE has them."""
    latents = (rows(), vae.latent_channels, *_sides(least, most, 1))
    pixels = _sides(least, most, vae.downscale)
    return Signature(
        inputs=(TensorSpec("pixels", FLOATING, (rows(), _RGB, *pixels)),),
        outputs=(TensorSpec("mean", FLOATING, latents), TensorSpec("std", FLOATING, latents)),
    )
