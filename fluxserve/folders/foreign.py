"""Recognise what other tools write, so that a refusal says what a file is and what to do about it."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

UNQUANTISED = "Serve the unquantised checkpoint; `fluxserve export --precision fp8` quantises it"
_SAVE_AGAIN = "load it with diffusers and write it with save_pretrained"

_NAMES = {
    f"a LoRA's. Merge it into the model: {_SAVE_AGAIN}": r"lora_(A|B|up|down|magnitude|unet|te)|\.lora\.",
    f"bitsandbytes' quantised weights. {UNQUANTISED}": r"absmax|quant_map|quant_state|\.SCB$|weight_format$",
    f"of nunchaku. {UNQUANTISED}": r"\.(wscales|wzeros|wcscales|wtscale|smooth_factor(_orig)?|proj_down|proj_up)$",
    f"of GPTQ or AWQ. {UNQUANTISED}": r"\.(qweight|qzeros|g_idx|scales)$",
    f"of NVIDIA ModelOpt. {UNQUANTISED}": r"_quantizer\.|_amax$",
    f"of torchao, quanto or compressed-tensors. {UNQUANTISED}": (
        r"\.(_data|_scale|_packed|tensor_impl.*|(weight_)?(qdata|packed|shape|zero_point))$|:"
    ),
    f"scales of FP8 or FP4 weights. {UNQUANTISED}": (
        r"(scale|scale_inv|scale_2|scaled_fp8|scale_(weight|input))$|comfy_quant"
    ),
    "EMA copies of the weights. Keep one set of weights in the folder": r"(^|[._])ema([._]|$)",
    f"named by a training wrapper. Unwrap the model: {_SAVE_AGAIN}": (
        r"^(module|_orig_mod|_fsdp_wrapped_module|base_model)\.|\._orig_mod\.|\.base_layer\."
    ),
    f"of a single-file checkpoint. Convert it: {_SAVE_AGAIN}": (
        r"^(model\.diffusion_model|(double|single)_blocks|(img|txt|time|vector|guidance)_in|first_stage_model)\.|"
        r"^(de|en)coder\.(up|down|mid)\."
    ),
    "of a GGUF file. Serve the checkpoint that it was made from": r"^(token_embd|enc\.blk|blk|output_norm)\.",
    "of an adapter, which the model has no place for": r"^(controlnet|ip_adapter|image_proj|redux_)",
    "of an image encoder. Keep the text encoder alone": r"^(vision_model|visual|logit_scale|visual_projection)",
}
"""Whose tensors are, and a pattern of their names; the first match counts."""

_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".zst", ".rar")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def whose(names: Iterable[str]) -> str:
    """Whose tensors of such names are, as the end of a message; empty: unknown."""
    listed = list(names)
    for owner, pattern in _NAMES.items():
        if any(re.search(pattern, name) for name in listed):
            return f". By their names they are {owner}"
    return ""


def is_pickled(file: Path) -> bool:
    """Whether a file is, by its name, one that is unpickled to be read."""
    return file.suffix.lower() in _PICKLES


def quantiser(config: Mapping[str, Any]) -> str:
    """The library that quantised a component, as its config.json says; empty: none."""
    for owner in (config, config.get("text_config")):
        for key in ("quantization_config", "compression_config", "quantization"):
            found = owner.get(key) if isinstance(owner, Mapping) else None
            if found:
                return f"{key} of {_library(found)}. {UNQUANTISED}"
    return ""


def _library(entry: object) -> str:
    if not isinstance(entry, Mapping):
        return "another library"
    keys = ("quant_method", "quant_library", "quant_type", "method", "quant_algo")
    named = next((str(entry[key]) for key in keys if entry.get(key)), "")
    if not named and any(str(key).startswith(("load_in_", "bnb_", "_load_in_")) for key in entry):
        named = "bitsandbytes"
    if not named and isinstance(entry.get("producer"), Mapping):
        named = str(entry["producer"].get("name", ""))
    return repr(named[:60]) if named else "another library"


def stand_in(file: Path) -> str:
    """What lies where a file should be: a dangling link, a Git LFS pointer, a web page; empty: none of these."""
    if file.is_symlink() and not file.exists():
        return f"a link to {file.readlink()}, which is not there. Copy the folder with its targets (cp -rL)"
    if not file.is_file():
        return ""
    with file.open("rb") as opened:
        begin = opened.read(256)
    if begin.startswith((b"version https://git-lfs", b"version https://hawser")):
        return "a Git LFS pointer, not the file itself. Fetch it: `git lfs pull` in the repository's folder"
    if b"/annex/objects/" in begin and len(begin) < 256:
        return "a git-annex pointer, not the file itself. Fetch it: `git annex get`"
    if begin.lstrip()[:9].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, saved in the file's place. Download the file itself"
    if not begin:
        return "an empty file: a download that did not finish, or a full disk"
    return ""


def file_as_folder(path: Path) -> str:
    """What a single file is that was given as a checkpoint's folder."""
    suffix = path.suffix.lower()
    if suffix == ".gguf":
        return f"a GGUF file. {UNQUANTISED}"
    if suffix == ".safetensors":
        return f"a single file of weights. Convert it to a folder: {_SAVE_AGAIN} (FluxPipeline.from_single_file)"
    if is_pickled(path):
        return "a pickle, and pickled weights are never loaded. Find the model's safetensors"
    if suffix in _ARCHIVES:
        return "an archive. Unpack it"
    if path.name == "model_index.json":
        return f"a file of a checkpoint. Give its folder: {path.parent}"
    return "a file"
