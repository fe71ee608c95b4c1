"""The signature of each component of FLUX: what every engine, whatever it runs on, takes and gives."""

from collections.abc import Mapping
from math import isqrt

from fluxserve.engine import FLOATING, Dim, Signature, TensorSpec
from fluxserve.families.flux.parts import PATCH, FluxSpec
from fluxserve.families.shared import signatures as shared
from fluxserve.families.shared.signatures import rows


def clip(spec: FluxSpec) -> Signature:
    """Token ids → the pooled embedding, taken at the end-of-text token."""
    tokens, width = Dim("tokens", 1, spec.text.named("clip").tokens), spec.transformer.pooled_projection_dim
    assert width is not None, "a transformer beside CLIP has a pooled projection"
    return Signature(
        inputs=(TensorSpec("input_ids", "int64", (rows(), tokens)),),
        outputs=(TensorSpec("pooled", FLOATING, (rows(), width)),),
    )


def t5(spec: FluxSpec) -> Signature:
    """Token ids → the last hidden state of every token."""
    tokens = Dim("tokens", 1, spec.text.named("t5").tokens)
    return Signature(
        inputs=(TensorSpec("input_ids", "int64", (rows(), tokens)),),
        outputs=(TensorSpec("sequence", FLOATING, (rows(), tokens, spec.transformer.joint_attention_dim)),),
    )


def language_model(spec: FluxSpec) -> Signature:
    """Token ids, and 1 for each that is no padding → the hidden states of every token, padding too, after some layers.

    Those of the spec's `layers` are one behind the other.
    """
    tokens = Dim("tokens", 1, spec.text.sequence.tokens)
    return Signature(
        inputs=(
            TensorSpec("input_ids", "int64", (rows(), tokens)),
            TensorSpec("attention_mask", "int64", (rows(), tokens)),
        ),
        outputs=(TensorSpec("sequence", FLOATING, (rows(), tokens, spec.transformer.joint_attention_dim)),),
    )


def transformer(spec: FluxSpec) -> Signature:
    """Packed latents, conditioning, timestep (σ, in 0..1) → velocity; tokens of references are behind the picture's.

    FLUX.1 always takes `guidance`, and ignores it if it has no embedding for it; it alone takes a pooled embedding.
    """
    shape, axes = spec.transformer, len(spec.transformer.axes_dims_rope)
    limits = spec.limits
    most = (limits.max_pixels + limits.max_references * limits.max_reference_pixels) // spec.size_multiple**2
    image, text = Dim("image_tokens", 1, most), Dim("text_tokens", 1, spec.text.sequence.tokens)
    pooled, guidance = [], []
    if shape.pooled_projection_dim is not None:
        pooled = [TensorSpec("pooled_projections", FLOATING, (rows(), shape.pooled_projection_dim))]
    if shape.generation == 1 or shape.guidance_embeds:
        guidance = [TensorSpec("guidance", "float32", (rows(),))]
    return Signature(
        inputs=(
            TensorSpec("hidden_states", FLOATING, (rows(), image, shape.in_channels)),
            TensorSpec("encoder_hidden_states", FLOATING, (rows(), text, shape.joint_attention_dim)),
            *pooled,
            TensorSpec("timestep", FLOATING, (rows(),)),
            *guidance,
            TensorSpec("img_ids", "float32", (image, axes)),
            TensorSpec("txt_ids", "float32", (text, axes)),
        ),
        outputs=(TensorSpec("velocity", FLOATING, (rows(), image, shape.in_channels)),),
    )


def _sides(spec: FluxSpec) -> tuple[int, int]:
    """Least and most of a side in latent pixels; a long reference may be longer than any picture."""
    limits, longest = spec.limits, spec.limits.max_side
    if spec.takes_references:
        longest = max(longest, isqrt(limits.max_reference_pixels * limits.max_reference_aspect))
    return PATCH, longest // spec.vae.downscale


def vae_decoder(spec: FluxSpec) -> Signature:
    """See shared.signatures.vae_decoder."""
    return shared.vae_decoder(spec.vae, *_sides(spec))


def vae_encoder(spec: FluxSpec) -> Signature:
    """See shared.signatures.vae_encoder."""
    return shared.vae_encoder(spec.vae, *_sides(spec))


BY_COMPONENT = {
    "clip": clip,
    "t5": t5,
    "qwen3": language_model,
    "mistral3": language_model,
    "transformer": transformer,
    "vae_encoder": vae_encoder,
    "vae_decoder": vae_decoder,
}
"""Name of a component → its signature of a FluxSpec, which says what components it has."""


def signatures(spec: FluxSpec) -> Mapping[str, Signature]:
    """Return the signature of every component that a model has."""
    return {name: BY_COMPONENT[name](spec) for name in spec.components}
