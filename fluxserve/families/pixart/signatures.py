"""The signature of each component of PixArt-Σ."""

from collections.abc import Mapping

from fluxserve.engine import FLOATING, Dim, Signature, TensorSpec
from fluxserve.families.pixart.models import PixArtSpec
from fluxserve.families.shared import signatures as shared
from fluxserve.families.shared.signatures import rows


def signatures(spec: PixArtSpec) -> Mapping[str, Signature]:
    """Return the signature of every component."""
    least, most = (side // spec.vae.downscale for side in (spec.limits.min_side, spec.limits.max_side))
    return {
        "t5": _t5(spec),
        "transformer": _transformer(spec),
        "vae_encoder": shared.vae_encoder(spec.vae, least, most),
        "vae_decoder": shared.vae_decoder(spec.vae, least, most),
    }


def _t5(spec: PixArtSpec) -> Signature:
    """Token ids, and 1 for each that is no padding → the last hidden state of every token."""
    tokens = Dim("tokens", 1, spec.text.sequence.tokens)
    read = [TensorSpec(name, "int64", (rows(), tokens)) for name in ("input_ids", "attention_mask")]
    states = TensorSpec("sequence", FLOATING, (rows(), tokens, spec.transformer.caption_channels))
    return Signature(inputs=tuple(read), outputs=(states,))


def _transformer(spec: PixArtSpec) -> Signature:
    """Latents, text, its mask and a training step → the noise, with the channels of a variance behind it."""
    shape, patch = spec.transformer, spec.transformer.patch_size
    least, most = (side // spec.size_multiple for side in (spec.limits.min_side, spec.limits.max_side))
    sides = Dim("token_rows", least, most, patch), Dim("token_columns", least, most, patch)
    tokens = Dim("text_tokens", 1, spec.text.sequence.tokens)
    return Signature(
        inputs=(
            TensorSpec("hidden_states", FLOATING, (rows(), shape.in_channels, *sides)),
            TensorSpec("encoder_hidden_states", FLOATING, (rows(), tokens, shape.caption_channels)),
            TensorSpec("encoder_attention_mask", "int64", (rows(), tokens)),
            TensorSpec("timestep", "int64", (rows(),)),
        ),
        outputs=(TensorSpec("noise", FLOATING, (rows(), shape.out_channels, *sides)),),
    )
