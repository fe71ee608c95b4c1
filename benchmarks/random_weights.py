"""FLUX.1 at its real widths with random weights, whole or few blocks of it, in diffusers' format on disk.

    python -m benchmarks.random_weights FOLDER [--double 19] [--single 38] [--schnell] [--text-layers 24] [--narrow 1]

Speed depends on shapes, and on numbers that are finite and random, not on what they mean. By default it is FLUX.1-dev
whole but for the vocabularies: 34 GB.

Transformer 3072 wide, 24 heads of 128; T5 4096 wide; CLIP 768 wide; the VAE whole. The tokenizers, and with them the
vocabularies, are tiny's. Without a guidance embedding it is a FLUX.1-schnell, with 256 text tokens instead of 512.

Spreads are such that rounding does not grow from layer to layer, because in a trained network it does not either: else
FP8 would fail the export's gate, whatever computes it. `_spread` says what is narrower or wider than usual.
"""

import argparse
import json
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, FluxTransformer2DModel
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from fluxserve import settings

_TINY = settings.default_checkpoint()
_VOCABULARY = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
_SHARED = ("model_index.json", "scheduler", "tokenizer", "tokenizer_2")
_BRANCH_ENDS = re.compile(r"\.(SelfAttention\.o|DenseReluDense\.wo|self_attn\.out_proj|mlp\.fc2)\.weight$")
"""Projections of the text encoders whose output is added to the residual stream."""
_SINES = re.compile(r"\.(timestep|guidance)_embedder\.linear_2\.weight$")
_CONTRAST = 0.08
"""Of the VAE's pictures: their noise then makes a PNG about as large as a photograph's, 1.4 bytes a pixel and not 3."""
_T5_HEAD = 64
_SHARD = "5GB"
"""As published models are cut, so that they are read and hashed side by side."""
_TILE = 2**22 - 3
"""Numbers that are drawn. No width divides it, so that no two rows of a matrix are the same."""


def write(
    folder: Path, double: int, single: int, guidance: bool = False, text_layers: int = 1, narrow: int = 1
) -> Path:
    """Make the folder; weights in bfloat16. 19, 38, True and 24 are FLUX.1-dev whole, but for the vocabularies.

    Args:
        narrow: a power of two; heads and channels are so many times fewer, though at least one head or 32 channels.
    """
    folder.mkdir(parents=True)
    for name in _SHARED:
        copy = shutil.copytree if (_TINY / name).is_dir() else shutil.copy
        copy(_TINY / name, folder / name)
    text, pooled = _t5(narrow), _clip(narrow)
    with init_empty_weights():
        transformer = FluxTransformer2DModel(
            num_layers=double,
            num_single_layers=single,
            num_attention_heads=max(1, 24 // narrow),
            joint_attention_dim=text["d_model"],
            pooled_projection_dim=pooled["hidden_size"],
            guidance_embeds=guidance,
        )
        vae = AutoencoderKL(**_vae(narrow))
        clip = CLIPTextModel(
            CLIPTextConfig(**_of_tiny("text_encoder"), **pooled, num_hidden_layers=min(text_layers, 12))
        )
        t5 = T5EncoderModel(T5Config(**_of_tiny("text_encoder_2"), **text, num_layers=text_layers))
    for name, module in (("transformer", transformer), ("vae", vae), ("text_encoder", clip), ("text_encoder_2", t5)):
        _save(module, folder / name)
    return folder


def _clip(narrow: int) -> dict[str, Any]:
    heads = max(1, 12 // narrow)
    width = 64 * heads
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": heads,
        "projection_dim": width,
    }


def _t5(narrow: int) -> dict[str, Any]:
    heads = max(1, 64 // narrow)
    width = _T5_HEAD * heads
    return {
        "d_model": width,
        "d_ff": width * 5 // 2,
        "d_kv": _T5_HEAD,
        "num_heads": heads,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    }


def _of_tiny(component: str) -> dict[str, Any]:
    """What belongs to tiny's vocabulary."""
    config = json.loads((_TINY / component / "config.json").read_text())
    return {name: config[name] for name in _VOCABULARY if name in config}


def _vae(narrow: int) -> dict[str, Any]:
    config = json.loads((_TINY / "vae" / "config.json").read_text())
    channels = tuple(max(32, whole // narrow) for whole in (128, 256, 512, 512))
    own = {"block_out_channels": channels, "layers_per_block": 2, "norm_num_groups": 32}
    return {**{name: value for name, value in config.items() if not name.startswith("_")}, **own}


def _save(module: nn.Module, folder: Path) -> None:
    """Weights cut out of one tile of random numbers: drawing a billion takes a minute."""
    module.save_config(folder) if hasattr(module, "save_config") else module.config.save_pretrained(folder)
    if not hasattr(module, "save_config"):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "architectures": [type(module).__name__]}))
    tile = torch.randn(_TILE, generator=torch.Generator().manual_seed(0)).bfloat16()
    name = "diffusion_pytorch_model" if hasattr(module, "save_config") else "model"
    tied = getattr(module, "_tied_weights_keys", None) or {}  # published files hold such a tensor once
    parameters = {key: parameter for key, parameter in module.named_parameters() if key not in tied}
    branches = sum(bool(_BRANCH_ENDS.search(key)) for key in parameters)
    weights = {key: _random(key, parameter, tile, branches) for key, parameter in parameters.items()}
    save_torch_state_dict(
        weights,
        folder,
        filename_pattern=f"{name}{{suffix}}.safetensors",
        max_shard_size=_SHARD,
        metadata={"format": "pt"},
    )


def _random(name: str, parameter: Tensor, tile: Tensor, branches: int) -> Tensor:
    if parameter.ndim == 1:  # norms near 1, biases near 0
        return torch.full(parameter.shape, 0.0 if name.endswith("bias") else 1.0, dtype=torch.bfloat16)
    rounds = -(-parameter.numel() // tile.numel())
    shifted = tile.roll(zlib.crc32(name.encode()) % tile.numel())
    numbers = shifted.repeat(rounds)[: parameter.numel()]
    return (numbers * _spread(name, parameter[0].numel(), branches)).reshape(parameter.shape)


def _spread(name: str, fan_in: int, branches: int) -> float:
    """Usually what keeps a layer's output as wide as its input.

    T5's stream begins as wide as in training, and its q holds the factor that its attention lacks: wide scores pick
    single tokens, and rounding picks others. A text encoder's residual branches together add to its stream about what
    is in it; the transformer's are usual, because q and k have norms. bfloat16 holds a thousand times the guidance to
    the next multiple of 16, and then takes sines: what comes of them may steer the blocks only a little.
    """
    if name == "shared.weight":
        return 1.0
    if name.endswith("SelfAttention.q.weight"):
        return float((fan_in * _T5_HEAD) ** -0.5)
    if name == "decoder.conv_out.weight":
        return float(_CONTRAST * fan_in**-0.5)
    if _BRANCH_ENDS.search(name):
        return float((fan_in * branches) ** -0.5)
    return float((0.1 if _SINES.search(name) else 1.0) * fan_in**-0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--double", type=int, default=19, help="double blocks; default: %(default)s")
    parser.add_argument("--single", type=int, default=38, help="single blocks; default: %(default)s")
    parser.add_argument("--schnell", action="store_true", help="without a guidance embedding")
    parser.add_argument("--text-layers", type=int, default=24, help="of T5; default: %(default)s")
    parser.add_argument("--narrow", type=int, default=1, choices=(1, 2, 4, 8, 16), help="so many times fewer heads")
    args = parser.parse_args()
    print(write(args.folder, args.double, args.single, not args.schnell, args.text_layers, args.narrow))


if __name__ == "__main__":
    main()
