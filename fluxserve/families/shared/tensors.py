"""The tensors of components that several families have, and what such lists are made of.

A list follows from the component's config.json alone, as its class in diffusers or transformers builds its module.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from fluxserve.folders.tensor_list import Shape, TensorList

Config = Mapping[str, Any]
Named = Iterator[tuple[str, Shape]]

_MOST_LAYERS = 1000
"""Far beyond any published model: a list of more would only fill the memory."""


def check_depths(config: Config) -> None:
    """Check the numbers of layers in a config.json before a list is built. Raises ValueError."""
    for name in ("num_layers", "num_single_layers", "num_hidden_layers", "layers_per_block"):
        if name in config and not (type(config[name]) is int and 0 <= config[name] <= _MOST_LAYERS):
            raise ValueError(f"{name}: got {config[name]!r}; expected 0 to {_MOST_LAYERS}")


def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> Named:
    yield f"{name}.weight", (outputs, inputs)
    if bias:
        yield f"{name}.bias", (outputs,)


def norm(name: str, width: int, bias: bool = False) -> Named:
    yield f"{name}.weight", (width,)
    if bias:
        yield f"{name}.bias", (width,)


def convolution(name: str, inputs: int, outputs: int, side: int = 3) -> Named:
    yield f"{name}.weight", (outputs, inputs, side, side)
    yield f"{name}.bias", (outputs,)


# --- VAE -------------------------------------------------------------------------------------------------------------


def _resnet(name: str, inputs: int, outputs: int) -> Named:
    yield from norm(f"{name}.norm1", inputs, True)
    yield from convolution(f"{name}.conv1", inputs, outputs)
    yield from norm(f"{name}.norm2", outputs, True)
    yield from convolution(f"{name}.conv2", outputs, outputs)
    if inputs != outputs:
        yield from convolution(f"{name}.conv_shortcut", inputs, outputs, 1)


def _middle(name: str, width: int, attention: bool) -> Named:
    for index in range(2):
        yield from _resnet(f"{name}.resnets.{index}", width, width)
    if attention:
        yield from norm(f"{name}.attentions.0.group_norm", width, True)
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            yield from linear(f"{name}.attentions.0.{part}", width, width)


def _levels(name: str, depths: list[int], resnets: int, sampler: str) -> Named:
    for level, outputs in enumerate(depths):
        for index in range(resnets):
            inputs = depths[max(level - 1, 0)] if index == 0 else outputs
            yield from _resnet(f"{name}.{level}.resnets.{index}", inputs, outputs)
        if level + 1 < len(depths):
            yield from convolution(f"{name}.{level}.{sampler}.0.conv", outputs, outputs)


def autoencoder(config: Config) -> Named:
    down = list(config["block_out_channels"])
    up = list(config.get("decoder_block_out_channels") or down)[::-1]
    resnets, latent = config.get("layers_per_block", 1), config["latent_channels"]
    attention = config.get("mid_block_add_attention", True)
    yield from convolution("encoder.conv_in", config.get("in_channels", 3), down[0])
    yield from _levels("encoder.down_blocks", down, resnets, "downsamplers")
    yield from _middle("encoder.mid_block", down[-1], attention)
    yield from norm("encoder.conv_norm_out", down[-1], True)
    yield from convolution("encoder.conv_out", down[-1], 2 * latent)
    yield from convolution("decoder.conv_in", latent, up[0])
    yield from _middle("decoder.mid_block", up[0], attention)
    yield from _levels("decoder.up_blocks", up, resnets + 1, "upsamplers")
    yield from norm("decoder.conv_norm_out", up[-1], True)
    yield from convolution("decoder.conv_out", up[-1], config.get("out_channels", 3))
    if config.get("use_quant_conv", True):
        yield from convolution("quant_conv", 2 * latent, 2 * latent, 1)
    if config.get("use_post_quant_conv", True):
        yield from convolution("post_quant_conv", latent, latent, 1)


def vae(config: Config) -> TensorList:
    """AutoencoderKL."""
    return TensorList(dict(autoencoder(config)))


# --- text encoders ---------------------------------------------------------------------------------------------------


def clip(config: Config) -> TensorList:
    """CLIPTextModel. Old files hold its position ids; files of other classes the projection behind the pooled state."""
    width, hidden = config["hidden_size"], config["intermediate_size"]

    def named() -> Named:
        yield "embeddings.token_embedding.weight", (config["vocab_size"], width)
        yield "embeddings.position_embedding.weight", (config.get("max_position_embeddings", 77), width)
        for index in range(config["num_hidden_layers"]):
            layer = f"encoder.layers.{index}"
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                yield from linear(f"{layer}.self_attn.{part}", width, width)
            yield from linear(f"{layer}.mlp.fc1", width, hidden)
            yield from linear(f"{layer}.mlp.fc2", hidden, width)
            for part in ("layer_norm1", "layer_norm2"):
                yield from norm(f"{layer}.{part}", width, True)
        yield from norm("final_layer_norm", width, True)

    unread = (r"embeddings\.position_ids", r"text_projection\.weight")
    return TensorList(dict(named()), ((r"^text_model\.", ""),), unread)


def t5(config: Config) -> TensorList:
    """T5EncoderModel. A whole T5's files hold its decoder and head as well."""
    width, inner = config["d_model"], config["num_heads"] * config["d_kv"]
    gated = str(config.get("feed_forward_proj", "relu")).startswith("gated")
    table = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"

    def named() -> Named:
        yield "shared.weight", (config["vocab_size"], width)
        yield table, (config.get("relative_attention_num_buckets", 32), config["num_heads"])
        for index in range(config["num_layers"]):
            layer = f"encoder.block.{index}.layer"
            for part in "qkv":
                yield from linear(f"{layer}.0.SelfAttention.{part}", width, inner, False)
            yield from linear(f"{layer}.0.SelfAttention.o", inner, width, False)
            for part in ("wi_0", "wi_1") if gated else ("wi",):
                yield from linear(f"{layer}.1.DenseReluDense.{part}", width, config["d_ff"], False)
            yield from linear(f"{layer}.1.DenseReluDense.wo", config["d_ff"], width, False)
            yield from norm(f"{layer}.0.layer_norm", width)
            yield from norm(f"{layer}.1.layer_norm", width)
        yield from norm("encoder.final_layer_norm", width)

    spellings = ((r"^encoder\.embed_tokens\.weight$", "shared.weight"),)
    return TensorList(dict(named()), spellings, (r"decoder\..*", r"lm_head\.weight"))
