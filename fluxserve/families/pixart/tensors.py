"""The tensors of PixArt-Σ's components, as their classes in diffusers and transformers build them."""

from collections.abc import Callable, Mapping

from fluxserve.families.shared.tensors import Config, Named, check_depths, convolution, linear, t5, vae
from fluxserve.folders.tensor_list import TensorList

_TIME_CHANNELS = 256
_BLOCK_VECTORS, _LAST_VECTORS = 6, 2
"""Shifts, scales and gates of a block, and of what follows the last one."""


def tensors(class_name: str, config: Config) -> TensorList:
    """Return the list of one component; see families.base."""
    check_depths(config)
    return _LISTS[class_name](config)


def _transformer(config: Config) -> TensorList:
    """PixArtTransformer2DModel."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    patch, channels = config["patch_size"], config["in_channels"]
    out_channels = config.get("out_channels") or channels

    def named() -> Named:
        yield from convolution("pos_embed.proj", channels, width, patch)
        yield from linear("adaln_single.emb.timestep_embedder.linear_1", _TIME_CHANNELS, width)
        yield from linear("adaln_single.emb.timestep_embedder.linear_2", width, width)
        yield from linear("adaln_single.linear", width, _BLOCK_VECTORS * width)
        yield from linear("caption_projection.linear_1", config["caption_channels"], width)
        yield from linear("caption_projection.linear_2", width, width)
        for index in range(config["num_layers"]):
            block = f"transformer_blocks.{index}"
            yield f"{block}.scale_shift_table", (_BLOCK_VECTORS, width)
            for attention in ("attn1", "attn2"):
                for part in ("to_q", "to_k", "to_v", "to_out.0"):
                    yield from linear(f"{block}.{attention}.{part}", width, width)
            yield from linear(f"{block}.ff.net.0.proj", width, 4 * width)
            yield from linear(f"{block}.ff.net.2", 4 * width, width)
        yield "scale_shift_table", (_LAST_VECTORS, width)
        yield from linear("proj_out", width, patch * patch * out_channels)

    return TensorList(dict(named()))


_LISTS: Mapping[str, Callable[[Config], TensorList]] = {
    "PixArtTransformer2DModel": _transformer,
    "AutoencoderKL": vae,
    "T5EncoderModel": t5,
}
