"""Write a FLUX at its real widths with random weights, whole or few blocks of it, in diffusers' format on disk.

    python -m testing.random_weights FOLDER [--model flux.1-dev] [--double N] [--single N] [--text-layers N]
        [--narrow 1] [--plain]

The transformer's weights are like trained ones (trained_like.py), so that FP8 loses there what it loses on a trained
network. With --plain they are merely random: speed depends on shapes, and on numbers that are finite, not on what they
mean.

By default a model is whole: FLUX.1-dev takes 34 GB, klein-4B 16, klein-9B 35. --text-layers cuts the text encoder: a
klein reads 27 of its 36 layers, and fluxserve loads no more; diffusers runs all that are there, so that with fewer it
is timed too fast.

FLUX.1: transformer 3072 wide, 24 heads of 128; T5 4096 wide; CLIP 768 wide; the VAE whole. Without a guidance
embedding, as -schnell, it has 256 text tokens instead of 512. Tokenizers are stand-ins (stand_in.py) with as many words
as the published ones; a FLUX.1 whose text encoders are cut keeps tiny's.

Spreads are such that rounding does not grow from layer to layer, because in a trained network it does not either: else
FP8 would fail the export's gate, whatever computes it. `_spread` says what is narrower or wider than usual.
"""

import argparse
import json
import re
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
)
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, Qwen3ForCausalLM, T5Config, T5EncoderModel

from fluxserve import settings
from fluxserve.families.flux.models import FLUX1_DEV
from fluxserve.families.flux.parts import FluxSpec
from testing import published
from testing.stand_in import QWEN_WORDS, qwen_tokenizer, widen
from testing.trained_like import TrainedLike

MODELS = {n: s for n, s in published.MODELS.items() if s.transformer.generation == 1 or "qwen3" in s.components}
_TINY = settings.default_checkpoint()
_VOCABULARY = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
_SHARED = ("model_index.json", "scheduler", "tokenizer", "tokenizer_2")
_BRANCH_ENDS = re.compile(
    r"\.(SelfAttention\.o|DenseReluDense\.wo|self_attn\.(out|o)_proj|mlp\.(fc2|down_proj))\.weight$"
)
"""Projections of the text encoders whose output is added to the residual stream."""
_EMBEDDINGS = ("shared.weight", "model.embed_tokens.weight")
"""Of T5 and Qwen3."""
_SINES = re.compile(r"^time_text_embed\.(timestep|guidance)_embedder\.linear_2\.weight$")
_CONTRAST = 0.08
"""Of the VAE's pictures: their noise then makes a PNG about as large as a photograph's, 1.4 bytes a pixel and not 3."""
_T5_HEAD = 64
_T5_LAYERS, _CLIP_LAYERS = 24, 12
_SHARD = "5GB"
"""As published models are cut, so that they are read and hashed side by side."""
_TILE = 2**22 - 3
"""Numbers that are drawn. No width divides it, so that no two rows of a matrix are the same."""

Modules = Mapping[str, nn.Module]


def write(
    folder: Path,
    spec: FluxSpec,
    double: int | None = None,
    single: int | None = None,
    text_layers: int | None = None,
    narrow: int = 1,
    trained: bool = True,
) -> Path:
    """Make the folder, with weights in bfloat16. The same arguments give the same bytes.

    Args:
        spec: of MODELS.
        double, single: numbers of blocks; None means the model's own.
        text_layers: of T5 or Qwen3; None means the model's own.
        narrow: a power of two, which divides heads and channels, down to one head or 32 channels.
        trained: whether the transformer's weights are like trained ones, instead of merely random.
    """
    folder.mkdir(parents=True)
    own = spec.transformer
    heads = max(1, own.num_attention_heads // narrow)
    blocks = {"num_layers": double or own.num_layers, "num_single_layers": single or own.num_single_layers}
    spec = replace(spec, transformer=replace(own, **blocks, num_attention_heads=heads))
    write_model = _flux1 if own.generation == 1 else _klein
    for name, module in write_model(folder, spec, text_layers, narrow).items():
        _save(module, folder / name, trained)
    return folder


def _flux1(folder: Path, spec: FluxSpec, text_layers: int | None, narrow: int) -> Modules:
    """All but the weights; the modules, hollow, by their folders."""
    for name in _SHARED:
        copy = shutil.copytree if (_TINY / name).is_dir() else shutil.copy
        copy(_TINY / name, folder / name)
    text, pooled, layers = _t5(narrow), _clip(narrow), text_layers or _T5_LAYERS
    if not text_layers:
        encoders = published.PUBLISHED["text_encoders"][FLUX1_DEV.name]
        for shape_of, name, tokenizer in ((pooled, "clip", "tokenizer"), (text, "t5", "tokenizer_2")):
            shape_of["vocab_size"] = encoders[name]["vocab_size"]
            widen(folder / tokenizer, shape_of["vocab_size"])
    shape = replace(spec.transformer, joint_attention_dim=text["d_model"], pooled_projection_dim=pooled["hidden_size"])
    vae = {**_tiny("vae"), **published.vae(spec, narrow), "norm_num_groups": 32}
    clip = _of_tiny("text_encoder") | pooled | {"num_hidden_layers": min(layers, _CLIP_LAYERS)}
    with init_empty_weights():
        return {
            "transformer": FluxTransformer2DModel(**published.transformer(shape)),
            "vae": AutoencoderKL(**vae),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**clip)),
            "text_encoder_2": T5EncoderModel(T5Config(**(_of_tiny("text_encoder_2") | text), num_layers=layers)),
        }


def _klein(folder: Path, spec: FluxSpec, text_layers: int | None, narrow: int) -> Modules:
    """As _flux1."""
    encoder = spec.text.sequence
    known = published.encoder(spec, encoder.name)
    narrowed = {
        name: max(1, known[name] // narrow)
        for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    }
    narrowed["num_hidden_layers"] = text_layers or known["num_hidden_layers"]
    read = narrowed["hidden_size"] * len(encoder.layers)
    ours = ("empirical_shift", "base_sigmas")  # a scheduler is told by its pipeline
    schedule = {name: value for name, value in asdict(spec.schedule).items() if name not in ours}
    tokenizer = qwen_tokenizer(QWEN_WORDS)
    with init_empty_weights():
        transformer = Flux2Transformer2DModel(
            **published.transformer(replace(spec.transformer, joint_attention_dim=read))
        )
        vae = AutoencoderKLFlux2(**published.vae(spec, narrow))
        text = Qwen3ForCausalLM(published.text_config(spec, encoder.name, **narrowed))
    scheduler = FlowMatchEulerDiscreteScheduler(**schedule)
    pipe = Flux2KleinPipeline(scheduler, vae, text, tokenizer, transformer, is_distilled=not spec.classifier_free)
    pipe.save_config(folder)
    scheduler.save_pretrained(folder / "scheduler")
    tokenizer.save_pretrained(folder / "tokenizer")
    return {"transformer": transformer, "vae": vae, encoder.folder: text}


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
    return {name: value for name, value in _tiny(component).items() if name in _VOCABULARY}


def _tiny(component: str) -> dict[str, Any]:
    config = json.loads((_TINY / component / "config.json").read_text())
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _save(module: nn.Module, folder: Path, trained: bool) -> None:
    """Weights cut out of one tile of random numbers: drawing a billion takes a minute."""
    module.save_config(folder) if hasattr(module, "save_config") else module.config.save_pretrained(folder)
    if not hasattr(module, "save_config"):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "architectures": [type(module).__name__]}))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tile = torch.randn(_TILE, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    name = "diffusion_pytorch_model" if hasattr(module, "save_config") else "model"
    tied = getattr(module, "all_tied_weights_keys", {})  # published files hold such a tensor once
    parameters = {key: parameter for key, parameter in module.named_parameters() if key not in tied}
    branches = sum(bool(_BRANCH_ENDS.search(key)) for key in parameters)
    if trained and isinstance(module, FluxTransformer2DModel | Flux2Transformer2DModel):
        like = _trained_like(module, tile)
        weights = {key: like(key, parameter.shape).to(device) for key, parameter in parameters.items()}
    else:
        weights = {key: _random(key, parameter, tile, branches) for key, parameter in parameters.items()}
    weights |= {f"bn.{name}": value for name, value in _batch_norm(module, device).items()}
    save_torch_state_dict(
        weights,
        folder,
        filename_pattern=f"{name}{{suffix}}.safetensors",
        max_shard_size=_SHARD,
        metadata={"format": "pt"},
    )


def _trained_like(module: FluxTransformer2DModel | Flux2Transformer2DModel, tile: Tensor) -> TrainedLike:
    biased = isinstance(module, FluxTransformer2DModel)
    branches = 2 * len(module.transformer_blocks) + len(module.single_transformer_blocks)
    return TrainedLike(module.inner_dim, branches, biased, partial(_numbers, tile))


def _batch_norm(module: nn.Module, device: str) -> dict[str, Tensor]:
    """The statistics of FLUX.2's VAE, which are no parameters: those of noise."""
    found = getattr(module, "bn", None)
    if not isinstance(found, nn.BatchNorm2d):
        return {}
    mean, variance = (torch.full((found.num_features,), value, dtype=torch.bfloat16, device=device) for value in (0, 1))
    count = torch.zeros((), dtype=torch.int64, device=device)
    return {"running_mean": mean, "running_var": variance, "num_batches_tracked": count}


def _random(name: str, parameter: Tensor, tile: Tensor, branches: int) -> Tensor:
    if parameter.ndim == 1:  # norms near 1, biases near 0
        value = 0.0 if name.endswith("bias") else 1.0
        return torch.full(parameter.shape, value, dtype=torch.bfloat16, device=tile.device)
    return _numbers(tile, name, parameter.shape).mul_(_spread(name, parameter[0].numel(), branches))


def _numbers(tile: Tensor, name: str, shape: torch.Size) -> Tensor:
    """Cut random numbers out of the tile, from a place that the name decides, and over again where it ends."""
    shifted = tile.roll(zlib.crc32(name.encode()) % tile.numel())
    numbers = torch.empty(shape.numel(), dtype=tile.dtype, device=tile.device)
    for part in numbers.split(tile.numel()):
        part.copy_(shifted[: len(part)])
    return numbers.view(shape)


def _spread(name: str, fan_in: int, branches: int) -> float:
    """Usually what keeps a layer's output as wide as its input.

    T5's stream begins as wide as in training, and its q holds the factor that its attention lacks: wide scores pick
    single tokens, and rounding picks others. A text encoder's residual branches together add to its stream about what
    is in it; the transformer's are usual, because q and k have norms. bfloat16 holds a thousand times the guidance to
    the next multiple of 16, and then takes sines: what comes of them may steer FLUX.1's blocks only a little. In a
    klein nothing else steers them.
    """
    if name in _EMBEDDINGS:
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
    parser.add_argument("--model", choices=MODELS, default=FLUX1_DEV.name, help="default: %(default)s")
    for name, what in (("double", "double blocks"), ("single", "single blocks"), ("text-layers", "of T5 or Qwen3")):
        parser.add_argument(f"--{name}", type=int, help=f"{what}; default: all")
    parser.add_argument("--narrow", type=int, default=1, choices=(1, 2, 4, 8, 16), help="so many times fewer heads")
    parser.add_argument("--plain", action="store_true", help="merely random weights, for measuring speed alone")
    args = parser.parse_args()
    cut = (args.double, args.single, args.text_layers, args.narrow)
    print(write(args.folder, MODELS[args.model], *cut, trained=not args.plain))


if __name__ == "__main__":
    main()
