"""The tensors of FLUX's components: which a model reads, with their shapes, and which may lie beside them.

A list follows from the component's config.json alone, as its class in diffusers or transformers builds its module. All
engines and the exporter hold a folder to it, so that no tensor is dropped or filled in by one of them in silence.
"""

from collections.abc import Callable, Mapping

from fluxserve.families.shared.tensors import (
    Config,
    Named,
    autoencoder,
    check_depths,
    clip,
    linear,
    norm,
    t5,
    vae,
)
from fluxserve.folders.tensor_list import TensorList


def tensors(class_name: str, config: Config, layers: int | None = None) -> TensorList:
    """The list of one component.

    Args:
        class_name: of diffusers or transformers.
        config: its config.json.
        layers: how many of a language model's layers are read; None: all.

    Raises:
        KeyError: the configuration lacks a number.
        TypeError, ValueError: a number is none.
    """
    check_depths(config)
    return _LISTS[class_name](config, layers)


# --- transformers ----------------------------------------------------------------------------------------------------


def _joint_attention(block: str, width: int, head: int, bias: bool) -> Named:
    """Attention of a double block: both streams' projections, and a norm for each stream's queries and keys."""
    parts = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    for part in parts:
        yield from linear(f"{block}.attn.{part}", width, width, bias)
    for part in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        yield from norm(f"{block}.attn.{part}", head)


def _embedders(config: Config, width: int, channels: int, time: str, bias: bool) -> Named:
    """What latents, text, timestep and guidance are embedded by; `time` is where the last two are."""
    yield from linear("x_embedder", config["in_channels"], width, bias)
    yield from linear("context_embedder", config["joint_attention_dim"], width, bias)
    for part in ("timestep", "guidance") if config.get("guidance_embeds") else ("timestep",):
        yield from linear(f"{time}.{part}_embedder.linear_1", channels, width, bias)
        yield from linear(f"{time}.{part}_embedder.linear_2", width, width, bias)


def _outputs(config: Config, width: int, bias: bool) -> Named:
    channels = config.get("out_channels") or config["in_channels"]
    yield from linear("norm_out.linear", width, 2 * width, bias)
    yield from linear("proj_out", width, config.get("patch_size", 1) ** 2 * channels, bias)


def _flux(config: Config, _: int | None) -> TensorList:
    """FluxTransformer2DModel."""
    head = config["attention_head_dim"]
    width = config["num_attention_heads"] * head

    def named() -> Named:
        yield from _embedders(config, width, _TIME_CHANNELS, "time_text_embed", True)
        yield from linear("time_text_embed.text_embedder.linear_1", config["pooled_projection_dim"], width)
        yield from linear("time_text_embed.text_embedder.linear_2", width, width)
        for index in range(config["num_layers"]):
            block = f"transformer_blocks.{index}"
            yield from _joint_attention(block, width, head, True)
            for modulation, mlp in (("norm1", "ff"), ("norm1_context", "ff_context")):
                yield from linear(f"{block}.{modulation}.linear", width, 6 * width)
                yield from linear(f"{block}.{mlp}.net.0.proj", width, 4 * width)
                yield from linear(f"{block}.{mlp}.net.2", 4 * width, width)
        for index in range(config["num_single_layers"]):
            block = f"single_transformer_blocks.{index}"
            yield from linear(f"{block}.norm.linear", width, 3 * width)
            yield from linear(f"{block}.proj_mlp", width, 4 * width)
            yield from linear(f"{block}.proj_out", 5 * width, width)
            for part in "qkv":
                yield from linear(f"{block}.attn.to_{part}", width, width)
            for part in "qk":
                yield from norm(f"{block}.attn.norm_{part}", head)
        yield from _outputs(config, width, True)

    return TensorList(dict(named()))


def _flux2(config: Config, _: int | None) -> TensorList:
    """Flux2Transformer2DModel."""
    head = config["attention_head_dim"]
    width = config["num_attention_heads"] * head
    hidden = int(width * config.get("mlp_ratio", 3.0))

    def named() -> Named:
        channels = config.get("timestep_guidance_channels", _TIME_CHANNELS)
        yield from _embedders(config, width, channels, "time_guidance_embed", False)
        for part, vectors in _MODULATION.items():
            yield from linear(f"{part}.linear", width, vectors * width, False)
        for index in range(config["num_layers"]):
            block = f"transformer_blocks.{index}"
            yield from _joint_attention(block, width, head, False)
            for mlp in ("ff", "ff_context"):
                yield from linear(f"{block}.{mlp}.linear_in", width, 2 * hidden, False)
                yield from linear(f"{block}.{mlp}.linear_out", hidden, width, False)
        for index in range(config["num_single_layers"]):
            attention = f"single_transformer_blocks.{index}.attn"
            yield from linear(f"{attention}.to_qkv_mlp_proj", width, 3 * width + 2 * hidden, False)
            yield from linear(f"{attention}.to_out", width + hidden, width, False)
            for part in "qk":
                yield from norm(f"{attention}.norm_{part}", head)
        yield from _outputs(config, width, False)

    return TensorList(dict(named()))


_MODULATION = {"double_stream_modulation_img": 6, "double_stream_modulation_txt": 6, "single_stream_modulation": 3}
"""Vectors of modulation that FLUX.2's blocks of a kind share: shift, scale and gate, for attention and MLP."""

_TIME_CHANNELS = 256
"""Sines and cosines that a timestep is embedded by, where the configuration does not say."""


# --- VAEs ------------------------------------------------------------------------------------------------------------


def _vae2(config: Config, _: int | None) -> TensorList:
    """AutoencoderKLFlux2, with the statistics of a token's channels."""
    height, width = config.get("patch_size", (2, 2))
    channels = config["latent_channels"] * height * width
    statistics = {f"bn.running_{part}": (channels,) for part in ("mean", "var")}
    return TensorList({**dict(autoencoder(config)), **statistics}, unread=(r"bn\.num_batches_tracked",))


# --- text encoders ---------------------------------------------------------------------------------------------------


def _decoder_layers(config: Config, layers: int, head_norms: bool, bias: bool) -> Named:
    """Embedding and layers of a language model."""
    width, hidden, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head = config.get("head_dim") or width // heads
    inner, key_inner = heads * head, (config.get("num_key_value_heads") or heads) * head
    yield "embed_tokens.weight", (config["vocab_size"], width)
    for index in range(layers):
        layer = f"layers.{index}"
        for part, outputs in (("q", inner), ("k", key_inner), ("v", key_inner)):
            yield from linear(f"{layer}.self_attn.{part}_proj", width, outputs, bias)
        yield from linear(f"{layer}.self_attn.o_proj", inner, width, bias)
        for part in "qk" if head_norms else "":
            yield from norm(f"{layer}.self_attn.{part}_norm", head)
        for part in ("gate_proj", "up_proj"):
            yield from linear(f"{layer}.mlp.{part}", width, hidden, False)
        yield from linear(f"{layer}.mlp.down_proj", hidden, width, False)
        for part in ("input_layernorm", "post_attention_layernorm"):
            yield from norm(f"{layer}.{part}", width)


def _beyond(config: Config, layers: int) -> tuple[str, ...]:
    """What a language model's files hold that FLUX has no use for: later layers, last norm, head, buffers of RoPE."""
    later = (rf"layers\.{index}\..*" for index in range(layers, config["num_hidden_layers"]))
    return (*later, r"norm\.weight", r"lm_head\.weight", r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def _qwen3(config: Config, layers: int | None) -> TensorList:
    """Qwen3ForCausalLM, or the Qwen3Model inside."""
    depth = layers or config["num_hidden_layers"]
    named = _decoder_layers(config, depth, head_norms=True, bias=bool(config.get("attention_bias")))
    return TensorList(dict(named), ((r"^model\.", ""),), _beyond(config, depth))


def _mistral3(config: Config, layers: int | None) -> TensorList:
    """Mistral3ForConditionalGeneration, of which the words' part is read and not what sees."""
    text = config["text_config"]
    depth = layers or text["num_hidden_layers"]
    named = _decoder_layers(text, depth, head_norms=False, bias=False)
    spellings = ((r"^model\.(?=language_model|vision_tower|multi_modal)", ""), (r"^language_model\.(model\.)?", ""))
    unread = (*_beyond(text, depth), r"vision_tower\..*", r"multi_modal_projector\..*")
    return TensorList(dict(named), spellings, unread)


_LISTS: Mapping[str, Callable[[Config, int | None], TensorList]] = {
    "FluxTransformer2DModel": _flux,
    "Flux2Transformer2DModel": _flux2,
    "AutoencoderKL": lambda config, _: vae(config),
    "AutoencoderKLFlux2": _vae2,
    "CLIPTextModel": lambda config, _: clip(config),
    "T5EncoderModel": lambda config, _: t5(config),
    "Qwen3ForCausalLM": _qwen3,
    "Mistral3ForConditionalGeneration": _mistral3,
}
