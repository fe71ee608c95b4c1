"""FLUX.1 at its real widths with random weights, whole or few blocks of it, in diffusers' format on disk.

    python -m benchmarks.random_weights FOLDER [--double 19] [--single 38] [--schnell] [--text-layers 24]

Speed depends on shapes, and on numbers that are finite and random, not on what they mean. By default it is FLUX.1-dev
whole but for the vocabularies: 34 GB.

Transformer 3072 wide, 24 heads of 128; T5 4096 wide; CLIP 768 wide; the VAE whole. The tokenizers, and with them the
vocabularies, are tiny's. Without a guidance embedding it is a FLUX.1-schnell, with 256 text tokens instead of 512.
"""

import argparse
import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from fluxserve import settings

_TINY = settings.default_checkpoint()
_VOCABULARY = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
_SHARED = ("model_index.json", "scheduler", "tokenizer", "tokenizer_2")


def write(folder: Path, double: int, single: int, guidance: bool = False, text_layers: int = 1) -> Path:
    """Make the folder; weights in bfloat16. 19, 38, True and 24 are FLUX.1-dev whole, but for the vocabularies."""
    folder.mkdir(parents=True)
    for name in _SHARED:
        copy = shutil.copytree if (_TINY / name).is_dir() else shutil.copy
        copy(_TINY / name, folder / name)
    with init_empty_weights():
        transformer = FluxTransformer2DModel(num_layers=double, num_single_layers=single, guidance_embeds=guidance)
        vae = AutoencoderKL(**_vae())
        clip = CLIPTextModel(
            CLIPTextConfig(**_of_tiny("text_encoder"), **_CLIP, num_hidden_layers=min(text_layers, 12))
        )
        t5 = T5EncoderModel(T5Config(**_of_tiny("text_encoder_2"), **_T5, num_layers=text_layers))
    for name, module in (("transformer", transformer), ("vae", vae), ("text_encoder", clip), ("text_encoder_2", t5)):
        _save(module, folder / name)
    return folder


_CLIP: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
_T5: dict[str, Any] = {
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}


def _of_tiny(component: str) -> dict[str, Any]:
    """What belongs to tiny's vocabulary."""
    config = json.loads((_TINY / component / "config.json").read_text())
    return {name: config[name] for name in _VOCABULARY if name in config}


def _vae() -> dict[str, Any]:
    config = json.loads((_TINY / "vae" / "config.json").read_text())
    own = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32}
    return {**{name: value for name, value in config.items() if not name.startswith("_")}, **own}


def _save(module: nn.Module, folder: Path) -> None:
    """Weights of the usual spread, cut out of one tile of random numbers: drawing a billion takes a minute."""
    module.save_config(folder) if hasattr(module, "save_config") else module.config.save_pretrained(folder)
    if not hasattr(module, "save_config"):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "architectures": [type(module).__name__]}))
    tile = torch.randn(2**22, generator=torch.Generator().manual_seed(0)).bfloat16()
    name = "diffusion_pytorch_model" if hasattr(module, "save_config") else "model"
    tied = getattr(module, "_tied_weights_keys", None) or {}  # published files hold such a tensor once
    weights = {key: _random(key, p, tile) for key, p in module.named_parameters() if key not in tied}
    save_file(weights, folder / f"{name}.safetensors", {"format": "pt"})


def _random(name: str, parameter: Tensor, tile: Tensor) -> Tensor:
    if parameter.ndim == 1:  # norms near 1, biases near 0
        return torch.full(parameter.shape, 0.0 if name.endswith("bias") else 1.0, dtype=torch.bfloat16)
    fan_in = parameter[0].numel()
    rounds = -(-parameter.numel() // tile.numel())
    shifted = tile.roll(zlib.crc32(name.encode()) % tile.numel())
    return (shifted.repeat(rounds)[: parameter.numel()] * fan_in**-0.5).reshape(parameter.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--double", type=int, default=19, help="double blocks; default: %(default)s")
    parser.add_argument("--single", type=int, default=38, help="single blocks; default: %(default)s")
    parser.add_argument("--schnell", action="store_true", help="without a guidance embedding")
    parser.add_argument("--text-layers", type=int, default=24, help="of T5; default: %(default)s")
    args = parser.parse_args()
    print(write(args.folder, args.double, args.single, not args.schnell, args.text_layers))


if __name__ == "__main__":
    main()
