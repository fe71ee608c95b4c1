"""The tensors of every component's weights: which a model reads, with their shapes, and which may lie beside them.

A list follows from the component's config.json alone, as its class in diffusers or transformers builds its module. All
engines and the exporter hold a folder to it, so that no tensor is dropped or filled in by one of them in silence.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fluxserve.folders.tensor_list import Shape, TensorList

Config = Mapping[str, Any]
_Named = Iterator[tuple[str, Shape]]


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
    for name in ("num_layers", "num_single_layers", "num_hidden_layers", "layers_per_block"):
        if name in config and not (type(config[name]) is int and 0 <= config[name] <= _MOST_LAYERS):
            raise ValueError(f"{name}: got {config[name]!r}; expected 0 to {_MOST_LAYERS}")
    return _LISTS[class_name](config, layers)


_MOST_LAYERS = 1000
"""Far beyond any published model: a list of more would only fill the memory."""


# --- parts that several classes have ---------------------------------------------------------------------------------


def _linear(name: str, inputs: int, outputs: int, bias: bool = True) -> _Named:
    yield f"{name}.weight", (outputs, inputs)
    if bias:
        yield f"{name}.bias", (outputs,)


def _norm(name: str, width: int, bias: bool = False) -> _Named:
    yield f"{name}.weight", (width,)
    if bias:
        yield f"{name}.bias", (width,)


def _convolution(name: str, inputs: int, outputs: int, side: int = 3) -> _Named:
    yield f"{name}.weight", (outputs, inputs, side, side)
    yield f"{name}.bias", (outputs,)


# --- transformers ----------------------------------------------------------------------------------------------------


def _joint_attention(block: str, width: int, head: int, bias: bool) -> _Named:
    """Attention of a double block: both streams' projections, and a norm for each stream's queries and keys."""
    parts = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    for part in parts:
        yield from _linear(f"{block}.attn.{part}", width, width, bias)
    for part in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        yield from _norm(f"{block}.attn.{part}", head)


def _embedders(config: Config, width: int, channels: int, time: str, bias: bool) -> _Named:
    """What latents, text, timestep and guidance are embedded by; `time` is where the last two are."""
    yield from _linear("x_embedder", config["in_channels"], width, bias)
    yield from _linear("context_embedder", config["joint_attention_dim"], width, bias)
    for part in ("timestep", "guidance") if config.get("guidance_embeds") else ("timestep",):
        yield from _linear(f"{time}.{part}_embedder.linear_1", channels, width, bias)
        yield from _linear(f"{time}.{part}_embedder.linear_2", width, width, bias)


def _outputs(config: Config, width: int, bias: bool) -> _Named:
    channels = config.get("out_channels") or config["in_channels"]
    yield from _linear("norm_out.linear", width, 2 * width, bias)
    yield from _linear("proj_out", width, config.get("patch_size", 1) ** 2 * channels, bias)


def _flux(config: Config, _: int | None) -> TensorList:
    """FluxTransformer2DModel."""
    head = config["attention_head_dim"]
    width = config["num_attention_heads"] * head

    def named() -> _Named:
        yield from _embedders(config, width, _TIME_CHANNELS, "time_text_embed", True)
        yield from _linear("time_text_embed.text_embedder.linear_1", config["pooled_projection_dim"], width)
        yield from _linear("time_text_embed.text_embedder.linear_2", width, width)
        for index in range(config["num_layers"]):
            block = f"transformer_blocks.{index}"
            yield from _joint_attention(block, width, head, True)
            for norm, mlp in (("norm1", "ff"), ("norm1_context", "ff_context")):
                yield from _linear(f"{block}.{norm}.linear", width, 6 * width)
                yield from _linear(f"{block}.{mlp}.net.0.proj", width, 4 * width)
                yield from _linear(f"{block}.{mlp}.net.2", 4 * width, width)
        for index in range(config["num_single_layers"]):
            block = f"single_transformer_blocks.{index}"
            yield from _linear(f"{block}.norm.linear", width, 3 * width)
            yield from _linear(f"{block}.proj_mlp", width, 4 * width)
            yield from _linear(f"{block}.proj_out", 5 * width, width)
            for part in "qkv":
                yield from _linear(f"{block}.attn.to_{part}", width, width)
            for part in "qk":
                yield from _norm(f"{block}.attn.norm_{part}", head)
        yield from _outputs(config, width, True)

    return TensorList(dict(named()))


def _flux2(config: Config, _: int | None) -> TensorList:
    """Flux2Transformer2DModel."""
    head = config["attention_head_dim"]
    width = config["num_attention_heads"] * head
    hidden = int(width * config.get("mlp_ratio", 3.0))

    def named() -> _Named:
        channels = config.get("timestep_guidance_channels", _TIME_CHANNELS)
        yield from _embedders(config, width, channels, "time_guidance_embed", False)
        for part, vectors in _MODULATION.items():
            yield from _linear(f"{part}.linear", width, vectors * width, False)
        for index in range(config["num_layers"]):
            block = f"transformer_blocks.{index}"
            yield from _joint_attention(block, width, head, False)
            for mlp in ("ff", "ff_context"):
                yield from _linear(f"{block}.{mlp}.linear_in", width, 2 * hidden, False)
                yield from _linear(f"{block}.{mlp}.linear_out", hidden, width, False)
        for index in range(config["num_single_layers"]):
            attention = f"single_transformer_blocks.{index}.attn"
            yield from _linear(f"{attention}.to_qkv_mlp_proj", width, 3 * width + 2 * hidden, False)
            yield from _linear(f"{attention}.to_out", width + hidden, width, False)
            for part in "qk":
                yield from _norm(f"{attention}.norm_{part}", head)
        yield from _outputs(config, width, False)

    return TensorList(dict(named()))


_MODULATION = {"double_stream_modulation_img": 6, "double_stream_modulation_txt": 6, "single_stream_modulation": 3}
"""Vectors of modulation that FLUX.2's blocks of a kind share: shift, scale and gate, for attention and MLP."""

_TIME_CHANNELS = 256
"""Sines and cosines that a timestep is embedded by, where the configuration does not say."""


# --- VAEs ------------------------------------------------------------------------------------------------------------


def _resnet(name: str, inputs: int, outputs: int) -> _Named:
    yield from _norm(f"{name}.norm1", inputs, True)
    yield from _convolution(f"{name}.conv1", inputs, outputs)
    yield from _norm(f"{name}.norm2", outputs, True)
    yield from _convolution(f"{name}.conv2", outputs, outputs)
    if inputs != outputs:
        yield from _convolution(f"{name}.conv_shortcut", inputs, outputs, 1)


def _middle(name: str, width: int, attention: bool) -> _Named:
    for index in range(2):
        yield from _resnet(f"{name}.resnets.{index}", width, width)
    if attention:
        yield from _norm(f"{name}.attentions.0.group_norm", width, True)
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            yield from _linear(f"{name}.attentions.0.{part}", width, width)


def _levels(name: str, depths: list[int], resnets: int, sampler: str) -> _Named:
    for level, outputs in enumerate(depths):
        for index in range(resnets):
            inputs = depths[max(level - 1, 0)] if index == 0 else outputs
            yield from _resnet(f"{name}.{level}.resnets.{index}", inputs, outputs)
        if level + 1 < len(depths):
            yield from _convolution(f"{name}.{level}.{sampler}.0.conv", outputs, outputs)


def _networks(config: Config) -> _Named:
    down = list(config["block_out_channels"])
    up = list(config.get("decoder_block_out_channels") or down)[::-1]
    resnets, latent = config.get("layers_per_block", 1), config["latent_channels"]
    attention = config.get("mid_block_add_attention", True)
    yield from _convolution("encoder.conv_in", config.get("in_channels", 3), down[0])
    yield from _levels("encoder.down_blocks", down, resnets, "downsamplers")
    yield from _middle("encoder.mid_block", down[-1], attention)
    yield from _norm("encoder.conv_norm_out", down[-1], True)
    yield from _convolution("encoder.conv_out", down[-1], 2 * latent)
    yield from _convolution("decoder.conv_in", latent, up[0])
    yield from _middle("decoder.mid_block", up[0], attention)
    yield from _levels("decoder.up_blocks", up, resnets + 1, "upsamplers")
    yield from _norm("decoder.conv_norm_out", up[-1], True)
    yield from _convolution("decoder.conv_out", up[-1], config.get("out_channels", 3))
    if config.get("use_quant_conv", True):
        yield from _convolution("quant_conv", 2 * latent, 2 * latent, 1)
    if config.get("use_post_quant_conv", True):
        yield from _convolution("post_quant_conv", latent, latent, 1)


def _vae(config: Config, _: int | None) -> TensorList:
    """AutoencoderKL."""
    return TensorList(dict(_networks(config)))


def _vae2(config: Config, _: int | None) -> TensorList:
    """AutoencoderKLFlux2, with the statistics of a token's channels."""
    height, width = config.get("patch_size", (2, 2))
    channels = config["latent_channels"] * height * width
    statistics = {f"bn.running_{part}": (channels,) for part in ("mean", "var")}
    return TensorList({**dict(_networks(config)), **statistics}, unread=(r"bn\.num_batches_tracked",))


# --- text encoders ---------------------------------------------------------------------------------------------------


def _clip(config: Config, _: int | None) -> TensorList:
    """CLIPTextModel. Old files hold its position ids; files of other classes the projection behind the pooled state."""
    width, hidden = config["hidden_size"], config["intermediate_size"]

    def named() -> _Named:
        yield "embeddings.token_embedding.weight", (config["vocab_size"], width)
        yield "embeddings.position_embedding.weight", (config.get("max_position_embeddings", 77), width)
        for index in range(config["num_hidden_layers"]):
            layer = f"encoder.layers.{index}"
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                yield from _linear(f"{layer}.self_attn.{part}", width, width)
            yield from _linear(f"{layer}.mlp.fc1", width, hidden)
            yield from _linear(f"{layer}.mlp.fc2", hidden, width)
            for part in ("layer_norm1", "layer_norm2"):
                yield from _norm(f"{layer}.{part}", width, True)
        yield from _norm("final_layer_norm", width, True)

    unread = (r"embeddings\.position_ids", r"text_projection\.weight")
    return TensorList(dict(named()), ((r"^text_model\.", ""),), unread)


def _t5(config: Config, _: int | None) -> TensorList:
    """T5EncoderModel. A whole T5's files hold its decoder and head as well."""
    width, inner = config["d_model"], config["num_heads"] * config["d_kv"]
    gated = str(config.get("feed_forward_proj", "relu")).startswith("gated")
    table = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"

    def named() -> _Named:
        yield "shared.weight", (config["vocab_size"], width)
        yield table, (config.get("relative_attention_num_buckets", 32), config["num_heads"])
        for index in range(config["num_layers"]):
            layer = f"encoder.block.{index}.layer"
            for part in "qkv":
                yield from _linear(f"{layer}.0.SelfAttention.{part}", width, inner, False)
            yield from _linear(f"{layer}.0.SelfAttention.o", inner, width, False)
            for part in ("wi_0", "wi_1") if gated else ("wi",):
                yield from _linear(f"{layer}.1.DenseReluDense.{part}", width, config["d_ff"], False)
            yield from _linear(f"{layer}.1.DenseReluDense.wo", config["d_ff"], width, False)
            yield from _norm(f"{layer}.0.layer_norm", width)
            yield from _norm(f"{layer}.1.layer_norm", width)
        yield from _norm("encoder.final_layer_norm", width)

    spellings = ((r"^encoder\.embed_tokens\.weight$", "shared.weight"),)
    return TensorList(dict(named()), spellings, (r"decoder\..*", r"lm_head\.weight"))


def _decoder_layers(config: Config, layers: int, head_norms: bool, bias: bool) -> _Named:
    """Embedding and layers of a language model."""
    width, hidden, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head = config.get("head_dim") or width // heads
    inner, key_inner = heads * head, (config.get("num_key_value_heads") or heads) * head
    yield "embed_tokens.weight", (config["vocab_size"], width)
    for index in range(layers):
        layer = f"layers.{index}"
        for part, outputs in (("q", inner), ("k", key_inner), ("v", key_inner)):
            yield from _linear(f"{layer}.self_attn.{part}_proj", width, outputs, bias)
        yield from _linear(f"{layer}.self_attn.o_proj", inner, width, bias)
        for part in "qk" if head_norms else "":
            yield from _norm(f"{layer}.self_attn.{part}_norm", head)
        for part in ("gate_proj", "up_proj"):
            yield from _linear(f"{layer}.mlp.{part}", width, hidden, False)
        yield from _linear(f"{layer}.mlp.down_proj", hidden, width, False)
        for part in ("input_layernorm", "post_attention_layernorm"):
            yield from _norm(f"{layer}.{part}", width)


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
    "AutoencoderKL": _vae,
    "AutoencoderKLFlux2": _vae2,
    "CLIPTextModel": _clip,
    "T5EncoderModel": _t5,
    "Qwen3ForCausalLM": _qwen3,
    "Mistral3ForConditionalGeneration": _mistral3,
}
