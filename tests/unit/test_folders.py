"""What people bring: folders as other tools leave them are read right, or refused with what they are and a way on."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fluxserve.cli.main import main
from fluxserve.errors import ArtifactDamaged, CheckpointError, NotFinite, UnsafeWeights
from fluxserve.folders import checkpoint
from tests.support import random_flux2
from tests.support.folders import TINY, Edit, change, copied, edit, weights_of

TRANSFORMER, ENCODER, T5, VAE = "transformer", "text_encoder", "text_encoder_2", "vae"
BASE = "diffusion_pytorch_model"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copied(tmp_path / "flux")


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read(path)
    message = str(caught.value)
    assert "\n" not in message and "Traceback" not in message
    return message


# --- the list of what is read ----------------------------------------------------------------------------------------


def test_every_models_own_folder_is_what_its_list_says() -> None:
    """The lists are held to what diffusers and transformers write for every class."""
    for source in (TINY, random_flux2.klein().folder, random_flux2.klein(tied=False).folder, random_flux2.dev().folder):
        assert checkpoint.read(source)


def beside(*names: str, like: str = "") -> Edit:
    """Add tensors, each named after a matrix of the component."""

    def add(tensors: dict[str, Tensor]) -> None:
        matrix = like or next(name for name, tensor in sorted(tensors.items()) if tensor.ndim == 2)
        for name in names:
            tensors[name.replace("*", matrix.removesuffix(".weight"))] = torch.ones(1)

    return add


FOREIGN = {
    "scaled FP8": (beside("*.weight_scale"), "FP8"),
    "scaled FP8 of ComfyUI": (beside("*.scale_weight", "scaled_fp8"), "FP8"),
    "scaled FP8's inputs": (beside("*.input_scale"), "FP8"),
    "block-scaled FP8": (beside("*.weight_scale_inv"), "FP8"),
    "NVFP4": (beside("*.weight_scale_2"), "FP8 or FP4"),
    "ComfyUI's marks": (beside("*.comfy_quant"), "FP8"),
    "bitsandbytes, 4 bits": (beside("*.weight.absmax", "*.weight.quant_map"), "bitsandbytes"),
    "bitsandbytes' state": (beside("*.weight.quant_state.bitsandbytes__nf4"), "bitsandbytes"),
    "bitsandbytes, 8 bits": (beside("*.SCB"), "bitsandbytes"),
    "GPTQ": (beside("*.qweight", "*.qzeros", "*.g_idx"), "GPTQ"),
    "nunchaku": (beside("*.qweight", "*.wscales", "*.smooth_factor"), "nunchaku"),
    "ModelOpt": (beside("*.weight_quantizer._amax"), "ModelOpt"),
    "quanto": (beside("*.weight._data", "*.weight._scale"), "quanto"),
    "compressed-tensors": (beside("*.weight_packed", "*.weight_scale"), "compressed-tensors"),
    "a LoRA of PEFT": (beside("*.lora_A.default.weight", "*.lora_B.default.weight"), "LoRA"),
    "a LoRA of kohya": (beside("lora_unet_x.lora_down.weight", "lora_unet_x.alpha"), "LoRA"),
    "EMA": (beside("ema.*.weight"), "EMA"),
    "EMA of one file": (beside("model_ema.decay"), "EMA"),
    "an IP-adapter": (beside("image_proj.proj.weight"), "adapter"),
    "a block more": (beside("transformer_blocks.77.norm1.linear.weight"), ""),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("component", [TRANSFORMER, T5])
def test_tensors_that_nobody_reads(folder: Path, kind: str, component: str) -> None:
    added, owner = FOREIGN[kind]
    before = set(load_file(weights_of(folder, component)))
    edit(folder, component, added)
    message = refusal(folder)
    assert f"{folder / component}: got " in message and "does not read" in message
    assert any(name in message for name in set(load_file(weights_of(folder, component))) - before)
    assert owner in message


def renamed(pattern: str, replacement: str) -> Edit:
    def rename(tensors: dict[str, Tensor]) -> None:
        names = {name: re.sub(pattern, replacement, name) for name in tensors}
        assert set(names.values()) != set(tensors)
        values = {new: tensors[old] for old, new in names.items()}
        tensors.clear()
        tensors.update(values)

    return rename


@pytest.mark.parametrize(
    ("pattern", "replacement", "owner"),
    [
        (r"^", "module.", "training wrapper"),
        (r"^", "_orig_mod.", "training wrapper"),
        (r"^transformer_blocks", "double_blocks", "single-file"),
        (r"^", "model.diffusion_model.", "single-file"),
        (r"norm1", "norm_one", ""),
    ],
)
def test_tensors_by_other_names(folder: Path, pattern: str, replacement: str, owner: str) -> None:
    edit(folder, TRANSFORMER, renamed(pattern, replacement))
    message = refusal(folder)
    assert "does not read" in message and owner in message


def twice(name: str, other: str) -> Edit:
    """Add a tensor of zeros by another of its names."""
    return lambda tensors: tensors.update({other: torch.zeros_like(tensors[name])})


TWICE = {
    "a tied embedding": (T5, twice("shared.weight", "encoder.embed_tokens.weight")),
    "names of transformers 4 beside those of 5": (
        ENCODER,
        twice("final_layer_norm.weight", "text_model.final_layer_norm.weight"),
    ),
}


@pytest.mark.parametrize("kind", TWICE)
def test_two_spellings_of_one_tensor_that_differ(folder: Path, kind: str) -> None:
    """Engines would read one or the other, and draw other pictures."""
    component, change = TWICE[kind]
    edit(folder, component, change)
    message = refusal(folder)
    assert "differ" in message and str(folder / component) in message


HARMLESS = {
    "position ids": (ENCODER, lambda t: t.update({"text_model.embeddings.position_ids": torch.arange(77)[None]})),
    "a projection": (ENCODER, lambda t: t.update({"text_projection.weight": torch.ones(128, 128)})),
    "names of transformers 4": (ENCODER, renamed(r"^", "text_model.")),
    "tied embedding twice": (T5, lambda t: t.update({"encoder.embed_tokens.weight": t["shared.weight"].clone()})),
    "tied embedding by its other name": (T5, renamed(r"^shared\.weight", "encoder.embed_tokens.weight")),
    "a decoder": (T5, lambda t: t.update({"decoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(2, 2)})),
    "a head": (T5, lambda t: t.update({"lm_head.weight": torch.ones(2, 2)})),
}
"""What published folders hold beside what is read, and how they spell it."""


@pytest.mark.parametrize("kind", HARMLESS)
def test_what_may_be_there(folder: Path, kind: str) -> None:
    """Every engine draws the same with it as without."""
    from fluxserve.engines.fused.build import Build, Precision
    from fluxserve.engines.fused.t5 import FusedT5
    from fluxserve.engines.torch_eager import load_module
    from fluxserve.kernels.operations import PLAIN

    component, added = HARMLESS[kind]
    edit(folder, component, added)
    read, name = checkpoint.read(folder), "clip" if component == ENCODER else "t5"
    ours = load_module(read, name, "cpu", torch.float32).state_dict()
    theirs = load_module(checkpoint.read(TINY), name, "cpu", torch.float32).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    if name == "t5":
        exact = Precision(torch.float32, torch.float32)
        FusedT5(read, Build.of(read.weights("text_encoder_2"), torch.device("cpu"), exact, PLAIN)).close()


def test_every_engine_holds_to_the_list(folder: Path) -> None:
    """Below `read` as well: an engine that is given a folder looks itself."""
    from fluxserve_export import options, trace

    from fluxserve.engines.fused import open as fused
    from fluxserve.engines.torch_eager import load_module
    from fluxserve.kernels.operations import PLAIN

    read = checkpoint.read(folder)
    edit(folder, TRANSFORMER, beside("*.weight_scale"))
    ranges = options.ranges(TRANSFORMER, read.spec, options.Sizes((64, 64), (64, 64), (64, 64), 1))
    for load in (
        lambda: load_module(read, TRANSFORMER, "cpu", torch.float32),
        lambda: fused.assemble(read, torch.device("cpu"), fused.BF16, None, PLAIN),
        lambda: trace.trace(read, TRANSFORMER, ranges, torch.float32, 22),
    ):
        with pytest.raises(CheckpointError, match="weight_scale"):
            load()


def fill(name: str, value: float) -> Edit:
    def put(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[3] = value

    return put


NOT_FINITE = [
    (TRANSFORMER, "single_transformer_blocks.0.proj_mlp.weight"),
    (TRANSFORMER, "proj_out.bias"),
    (VAE, "decoder.conv_in.weight"),
    (ENCODER, "final_layer_norm.weight"),
    (T5, "shared.weight"),
]


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize(("component", "name"), NOT_FINITE)
def test_numbers_that_are_not_finite(folder: Path, component: str, name: str, value: float) -> None:
    from fluxserve.engines.fused import open as fused
    from fluxserve.engines.torch_eager import open_components
    from fluxserve.kernels.operations import PLAIN

    edit(folder, component, fill(name, value))
    read = checkpoint.read(folder)
    for load in (
        lambda: open_components(read, "cpu", "float32"),
        lambda: fused.assemble(read, torch.device("cpu"), fused.BF16, None, PLAIN),
    ):
        with pytest.raises(CheckpointError, match=rf"{component}: NaN or infinity in {re.escape(name)}"):
            load()


def test_numbers_that_the_dtype_can_not_hold(folder: Path) -> None:
    from fluxserve.engines.torch_eager import load_module

    edit(folder, TRANSFORMER, fill("proj_out.bias", 1e30))
    read = checkpoint.read(folder)
    load_module(read, TRANSFORMER, "cpu", torch.float32)
    with pytest.raises(CheckpointError, match=r"NaN or infinity in proj_out\.bias"):
        load_module(read, TRANSFORMER, "cpu", torch.float16)


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), torch.float32), (1e6, torch.float16)])
@pytest.mark.parametrize("name", ["proj_out.weight", "proj_out.bias"])
def test_the_exporter_refuses_numbers_that_are_not_finite(
    folder: Path, name: str, value: float, dtype: torch.dtype
) -> None:
    from fluxserve_export import options, trace

    edit(folder, TRANSFORMER, fill(name, value))
    read = checkpoint.read(folder)
    ranges = options.ranges(TRANSFORMER, read.spec, options.Sizes((64, 64), (64, 64), (64, 64), 1))
    with pytest.raises(CheckpointError, match=f"NaN or infinity in {re.escape(name)}"):
        trace.trace(read, TRANSFORMER, ranges, dtype, 22)


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int64, torch.bool]
)
@pytest.mark.parametrize("component", [TRANSFORMER, VAE, ENCODER])
def test_another_dtype(folder: Path, dtype: torch.dtype, component: str) -> None:
    def cast(tensors: dict[str, Tensor]) -> None:
        name = next(name for name, tensor in sorted(tensors.items()) if tensor.ndim >= 2)
        tensors[name] = tensors[name].to(dtype)

    edit(folder, component, cast)
    assert "expected one of BF16, F16, F32, F64" in refusal(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_floating_dtypes_are_all_read(folder: Path, dtype: torch.dtype) -> None:
    def cast(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    edit(folder, TRANSFORMER, cast)
    assert checkpoint.read(folder)


# --- a component of another model ------------------------------------------------------------------------------------


def only_config(name: str, **values: object) -> Callable[[Path], None]:
    return lambda folder: change(folder / name, **values)


ANOTHER = {
    "schnell's weights": lambda f: edit(
        f, TRANSFORMER, lambda t: [t.pop(name) for name in list(t) if "guidance_embedder" in name]
    ),
    "dev's weights in schnell": only_config("transformer/config.json", guidance_embeds=False),
    "schnell's scheduler": only_config("scheduler/scheduler_config.json", use_dynamic_shifting=False, shift=1.0),
    "another VAE's scale": only_config("vae/config.json", scaling_factor=1.5305, shift_factor=0.0609),
    "FLUX.2's VAE": only_config("vae/config.json", _class_name="AutoencoderKLFlux2"),
    "another VAE's depth": only_config("vae/config.json", block_out_channels=[64, 64, 64, 64]),
    "a smaller T5": only_config("text_encoder_2/config.json", d_model=64),
    "a larger CLIP": only_config("text_encoder/config.json", hidden_size=1280),
    "a T5 of other layers": only_config("text_encoder_2/config.json", num_layers=3),
    "a CLIP of another vocabulary": only_config("text_encoder/config.json", vocab_size=49408),
    "a transformer of more blocks": only_config("transformer/config.json", num_layers=2),
    "a transformer of fewer blocks": only_config("transformer/config.json", num_single_layers=4),
    "fewer layers than are read": only_config("text_encoder_2/config.json", num_layers=1),
    "absurdly many layers": only_config("text_encoder_2/config.json", num_layers=10**12),
}


@pytest.mark.parametrize("kind", ANOTHER)
def test_a_component_of_another_model(folder: Path, kind: str) -> None:
    ANOTHER[kind](folder)
    assert "expected" in refusal(folder) or "must be" in refusal(folder) or "missing" in refusal(folder)


def test_encoders_in_each_others_place(folder: Path) -> None:
    (folder / ENCODER).rename(folder / "aside")
    (folder / T5).rename(folder / ENCODER)
    (folder / "aside").rename(folder / T5)
    assert "architecture" in refusal(folder)


# --- which files -----------------------------------------------------------------------------------------------------


def shard(folder: Path, component: str = TRANSFORMER, pattern: str = "{base}-{i:05d}-of-{n:05d}.safetensors") -> Path:
    """Split a component's weights in two, as the libraries do; their index."""
    file = weights_of(folder, component)
    base, tensors = file.name.removesuffix(".safetensors"), load_file(file)
    names, mapped = sorted(tensors), {}
    for i, part in enumerate((names[::2], names[1::2])):
        name = pattern.format(base=base, i=i + 1, n=2)
        save_file({key: tensors[key] for key in part}, file.with_name(name), metadata={"format": "pt"})
        mapped |= dict.fromkeys(part, name)
    file.unlink()
    index = file.with_name(f"{base}.safetensors.index.json")
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": mapped}))
    return index


def same_everywhere(folder: Path, component: str = TRANSFORMER) -> None:
    """Eager PyTorch and the fused engine's reader find the shipped weights."""
    from fluxserve.engines.fused.weights import Reader
    from fluxserve.engines.torch_eager import load_module

    read = checkpoint.read(folder)
    found = Reader(read.weights(component), torch.device("cpu"))
    shipped = load_file(weights_of(TINY, component))
    assert all(torch.equal(found(name), tensor) for name, tensor in shipped.items())
    name = {ENCODER: "clip", T5: "t5"}.get(component, component)
    loaded = load_module(read, name, "cpu", torch.bfloat16).state_dict()
    assert all(torch.equal(loaded[key], shipped[key]) for key in loaded if key in shipped)


@pytest.mark.parametrize("component", [TRANSFORMER, T5])
def test_shards(folder: Path, component: str) -> None:
    shard(folder, component)
    same_everywhere(folder, component)


@pytest.mark.parametrize("component", [TRANSFORMER, ENCODER])
@pytest.mark.parametrize("variant", ["fp16", "bf16", "ema"])
def test_only_a_variant(folder: Path, component: str, variant: str) -> None:
    """There is nothing else that could be meant."""
    file = weights_of(folder, component)
    file.rename(file.with_suffix(f".{variant}.safetensors"))
    same_everywhere(folder, component)


@pytest.mark.parametrize(
    "pattern", ["{base}.fp16-{i:05d}-of-{n:05d}.safetensors", "{base}-{i:05d}-of-{n:05d}.fp16.safetensors"]
)
@pytest.mark.parametrize("component", [TRANSFORMER, T5])
def test_only_a_variant_in_shards(folder: Path, component: str, pattern: str) -> None:
    index = shard(folder, component, f"{pattern}.safetensors")
    index.rename(index.with_name(index.name.replace("index.json", "index.fp16.json")))
    same_everywhere(folder, component)


@pytest.mark.parametrize("leftover", ["", ".fp16"])
def test_an_index_alone_is_no_set(folder: Path, leftover: str) -> None:
    """A download of one variant brings the JSON files of all of them."""
    listed = {"weight_map": {"a": f"{BASE}{leftover}-00001-of-00002.safetensors"}}
    (folder / TRANSFORMER / f"{BASE}.safetensors.index{leftover}.json").write_text(json.dumps(listed))
    file = weights_of(folder, TRANSFORMER)
    if not leftover:
        file.rename(file.with_suffix(".fp16.safetensors"))
    same_everywhere(folder)


def test_an_index_of_the_other_librarys_names(folder: Path) -> None:
    index = shard(folder, TRANSFORMER)
    index.rename(index.with_name("model.safetensors.index.json"))
    assert "shards without their index" in refusal(folder)


def test_a_variant_beside_the_weights_is_not_read(folder: Path) -> None:
    """As diffusers and transformers have it: a variant is read where it is named."""
    file = weights_of(folder, TRANSFORMER)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}
    save_file(zeros, file.with_suffix(".fp16.safetensors"))
    save_file(zeros, file.with_name(f"{BASE}.fp16-00001-of-00002.safetensors"))
    same_everywhere(folder)


def one_file_and_shards(folder: Path) -> None:
    file = weights_of(folder, TRANSFORMER).resolve()
    shard(folder)
    shutil.copy(file, folder / TRANSFORMER / f"{BASE}.safetensors")


def two_variants(folder: Path) -> None:
    file = weights_of(folder, TRANSFORMER)
    for variant in ("fp16", "bf16"):
        shutil.copy(file, file.with_suffix(f".{variant}.safetensors"))
    file.unlink()


def a_copy_called(name: str) -> Callable[[Path], None]:
    def copy(folder: Path) -> None:
        shutil.copy(weights_of(folder, TRANSFORMER), folder / TRANSFORMER / name)

    return copy


def an_older_shard(folder: Path) -> None:
    shard(folder)
    save_file({"a": torch.ones(1)}, folder / TRANSFORMER / f"{BASE}-00003-of-00003.safetensors")


def a_tensor_twice(folder: Path) -> None:
    first, second = sorted(shard(folder).parent.glob("*.safetensors"))
    shutil.copy(first, second)


TWO_SETS = {
    "one file and shards": one_file_and_shards,
    "two variants": two_variants,
    "another file": a_copy_called("flux1-dev.safetensors"),
    "a file of transformers": a_copy_called("model.safetensors"),
    "a LoRA": a_copy_called("pytorch_lora_weights.safetensors"),
    "a shard beside the file": a_copy_called(f"{BASE}-00001-of-00003.safetensors"),
    "a copy of a file manager": a_copy_called(f"{BASE} (1).safetensors"),
    "a shard of an older set": an_older_shard,
    "a tensor in two shards": a_tensor_twice,
}


@pytest.mark.parametrize("kind", TWO_SETS)
def test_two_sets_of_weights(folder: Path, kind: str) -> None:
    TWO_SETS[kind](folder)
    message = refusal(folder)
    assert str(folder / TRANSFORMER) in message and "expected" in message


def test_shards_without_their_index(folder: Path) -> None:
    shard(folder).unlink()
    assert "shards without their index; expected a .safetensors.index.json" in refusal(folder)
    next((folder / TRANSFORMER).glob("*-00001-of-*")).unlink()
    assert "without the others and their index" in refusal(folder)


def test_an_index_without_its_shards(folder: Path) -> None:
    index = shard(folder)
    for file in index.parent.glob("*.safetensors"):
        file.unlink()
    assert "missing" in refusal(folder) and index.name in refusal(folder)


def pointer(kind: str) -> bytes:
    return {
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 23802932552\n",
        "annex": b"/annex/objects/SHA256E-s1--0.safetensors\n",
        "page": b"<!DOCTYPE html><html><title>Sign in</title></html>",
        "nothing": b"",
    }[kind]


@pytest.mark.parametrize("kind", ["lfs", "annex", "page", "nothing"])
@pytest.mark.parametrize(
    "name", [f"transformer/{BASE}.safetensors", "text_encoder/model.safetensors", "vae/config.json", "model_index.json"]
)
def test_stand_ins(folder: Path, kind: str, name: str) -> None:
    (folder / name).unlink()
    (folder / name).write_bytes(pointer(kind))
    message = refusal(folder)
    words = {"lfs": "git lfs pull", "annex": "git annex get", "page": "a web page", "nothing": "an empty file"}
    assert str(folder / name) in message and words[kind] in message


@pytest.mark.parametrize("name", [f"transformer/{BASE}.safetensors", "vae/config.json", "model_index.json"])
def test_links_into_nothing(folder: Path, name: str) -> None:
    """A snapshot of a hub cache, copied without its blobs."""
    (folder / name).unlink()
    (folder / name).symlink_to("../../blobs/0123456789abcdef")
    assert "a link to ../../blobs/0123456789abcdef, which is not there" in refusal(folder)


@pytest.mark.parametrize("suffix", [".gguf", ".incomplete", ".aria2", ".crdownload", ".bin"])
def test_no_safetensors_at_all(folder: Path, suffix: str) -> None:
    weights_of(folder, TRANSFORMER).unlink()
    (folder / TRANSFORMER / f"{BASE}{suffix}").write_bytes(b"x")
    message = refusal(folder)
    assert f"{BASE}{suffix}" in message


HIDDEN = [
    "._{}",
    ".{}",
    ".DS_Store",
    ".gitattributes",
    ".cache/huggingface/download/{}",
    ".ipynb_checkpoints/{}",
    "__MACOSX/._{}",
    ".nfs0.safetensors",
]


@pytest.mark.parametrize("hidden", HIDDEN)
def test_hidden_companions_are_no_weights(folder: Path, hidden: str) -> None:
    for file in (*folder.glob("*/*"), folder / "model_index.json"):
        companion = file.parent / hidden.format(file.name)
        companion.parent.mkdir(parents=True, exist_ok=True)
        companion.write_bytes(b"Mac OS X        \x00\x05\x16\x07")
    same_everywhere(folder)


# --- quantised by another library ------------------------------------------------------------------------------------

QUANTISED = {
    "bitsandbytes": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "quant_method": "bitsandbytes"},
    "bitsandbytes of old": {"load_in_8bit": True},
    "torchao": {"quant_method": "torchao", "quant_type": "int8wo"},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "FP8"},
    "gguf": {"quant_method": "gguf", "compute_dtype": "bfloat16"},
    "quanto": {"quant_method": "quanto", "weights_dtype": "int8"},
    "svdquant": {"method": "svdquant", "weight": {"dtype": "int4"}},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "float-quantized"},
    "awq": {"quant_method": "awq", "bits": 4},
    "sdnq": {"quant_method": "sdnq"},
    "nobody": ["int8"],
}


@pytest.mark.parametrize("component", [TRANSFORMER, VAE, ENCODER, T5])
@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_by_another_library(folder: Path, kind: str, component: str) -> None:
    change(folder / component / "config.json", quantization_config=QUANTISED[kind])
    message = refusal(folder)
    assert str(folder / component / "config.json") in message and "fluxserve export --precision fp8" in message
    assert "another library" in message if kind == "nobody" else kind.split(" ")[0] in message


def test_quantised_by_modelopt_in_a_file_of_its_own(folder: Path) -> None:
    quantised = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
    (folder / T5 / "hf_quant_config.json").write_text(json.dumps(quantised))
    assert "FP8" in refusal(folder)


def test_no_quantiser(folder: Path) -> None:
    change(folder / TRANSFORMER / "config.json", quantization_config=None)
    assert checkpoint.read(folder)


# --- where the checkpoint is -----------------------------------------------------------------------------------------


def test_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert checkpoint.read(Path("~/flux")).path == folder
    assert "no such folder" in refusal(Path("~/elsewhere"))
    assert "~nobody-of-that-name" in refusal(Path("~nobody-of-that-name/flux"))


def test_a_folder_that_is_called_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    copied(tmp_path / "~" / "flux")
    assert checkpoint.read(Path("~/flux"))


@pytest.fixture
def cache(folder: Path) -> Path:
    """A hub's cache of one model: its files are links to blobs."""
    cached = folder.parent / "hub" / "models--org--flux"
    snapshot = cached / "snapshots" / "0a1b"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (cached / "blobs").mkdir()
    for number, file in enumerate(f for f in snapshot.rglob("*") if f.is_file()):
        blob = cached / "blobs" / str(number)
        shutil.copy(file, blob)
        file.unlink()
        file.symlink_to(os.path.relpath(blob, file.parent))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0a1b")
    return cached


@pytest.mark.parametrize("below", ["", "snapshots", "snapshots/0a1b"])
def test_a_hub_cache(cache: Path, below: str) -> None:
    same_everywhere(cache / below)
    assert checkpoint.read(cache / below).path == cache / "snapshots" / "0a1b"


def test_a_hub_cache_with_several_snapshots(cache: Path) -> None:
    (cache / "snapshots" / "ffff").mkdir()
    assert checkpoint.read(cache).path.name == "0a1b", "main is what the hub's client would take"
    (cache / "refs" / "main").unlink()
    assert "got snapshots 0a1b, ffff; expected one" in refusal(cache)


def test_the_whole_hub_cache(cache: Path) -> None:
    assert f"It is a hub cache. Give the folder of one model: {cache}" in refusal(cache.parent)


@pytest.mark.parametrize(
    ("below", "words"),
    [
        ("..", "Give that folder"),
        ("transformer", "It is a part of"),
        ("tokenizer", "It is a part of"),
        ("model_index.json", "Give its folder"),
        (f"transformer/{BASE}.safetensors", "from_single_file"),
    ],
)
def test_one_level_beside(folder: Path, below: str, words: str) -> None:
    message = refusal(folder / below)
    assert words in message and str(folder) in message


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("flux1-dev-Q4_K_S.gguf", "GGUF"),
        ("flux1-dev.safetensors", "from_single_file"),
        ("flux1-dev.ckpt", "pickled"),
        ("pytorch_model.bin", "pickled"),
        ("flux.zip", "Unpack it"),
        ("flux.tar.gz", "Unpack it"),
        ("notes", "a file"),
    ],
)
def test_a_file_as_checkpoint(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    assert words in refusal(tmp_path / name)
    if "." in name and not name.endswith(("zip", "gz")):
        assert name in refusal(tmp_path), "and the folder that holds nothing else"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ((), "The folder is empty"),
        ((".gitattributes",), "The folder is empty"),
        (("manifest.json",), "--artifact"),
        (("adapter_config.json", "adapter_model.safetensors"), "LoRA"),
        (("config.json", f"{BASE}.safetensors"), "one component"),
        (("README.md",), "missing"),
    ],
)
def test_folders_of_something_else(tmp_path: Path, files: tuple[str, ...], words: str) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    assert words in refusal(tmp_path)


@pytest.mark.parametrize(
    "path", ["black-forest-labs/FLUX.1-dev", "https://huggingface.co/black-forest-labs/FLUX.1-dev", "hf://org/flux"]
)
def test_a_name_is_not_downloaded(path: str) -> None:
    assert "Nothing is downloaded: `hf download" in refusal(Path(path))


def test_pickles_alone_are_unsafe(folder: Path) -> None:
    file = weights_of(folder, TRANSFORMER)
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(UnsafeWeights):
        checkpoint.read(folder)


# --- what is said before a server is started -------------------------------------------------------------------------


def doctor(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = main(["doctor", *arguments])
    return status, capsys.readouterr().out


def test_doctor_finds_nothing_wrong(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = doctor(capsys, "--checkpoint", str(folder))
    assert status == 0 and "FAIL" not in said
    assert f"tiny at {folder}" in said and "ok    weights: all numbers are finite" in said


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "a tensor too many": (lambda f: edit(f, TRANSFORMER, beside("*.weight_scale")), "model"),
    "two sets": (a_copy_called("flux1-dev.safetensors"), "model"),
    "a quantiser": (only_config("vae/config.json", quantization_config={"quant_method": "gguf"}), "model"),
    "NaN": (lambda f: edit(f, T5, fill("shared.weight", float("nan"))), "weights"),
    "infinity in the VAE": (lambda f: edit(f, VAE, fill("encoder.conv_out.bias", float("inf"))), "weights"),
    "an activation that nobody has": (only_config("text_encoder/config.json", hidden_act="wishful"), "engine"),
    "blocks that nobody has": (only_config("vae/config.json", up_block_types=["UpBlock9D"] * 4), "engine"),
    "heads of another size": (only_config("transformer/config.json", axes_dims_rope=[1, 2]), "model"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "tokenizers"),
    "a tokenizer that is a pointer": (
        lambda f: (f / "tokenizer_2/tokenizer.json").write_bytes(pointer("lfs")),
        "tokenizers",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_doctor_says_what_serve_would_refuse(folder: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    spoil, check = WRONG[kind]
    spoil(folder)
    status, said = doctor(capsys, "--checkpoint", str(folder))
    assert status == 1 and re.findall(r"FAIL  (\w+): ", said) == [check]
    assert str(folder) in said


def test_doctor_knows_the_dtype(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(folder, TRANSFORMER, fill("proj_out.bias", 1e30))
    assert doctor(capsys, "--checkpoint", str(folder))[0] == 0
    monkeypatch.setenv("FLUXSERVE_DTYPE", "float16")
    assert doctor(capsys, "--checkpoint", str(folder))[0] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may be what the engine runs on")
def test_doctor_knows_the_engine(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = doctor(capsys, "--checkpoint", str(folder), "--engine", "fused")
    assert status == 1 and "FAIL  engine: fused: got cpu; expected a CUDA device" in said


# --- what an export takes along --------------------------------------------------------------------------------------


def test_an_export_takes_no_hidden_companions(folder: Path, tmp_path: Path) -> None:
    from fluxserve_export.assemble import _copy_configurations, _link_weights

    shard(folder, T5)
    file = weights_of(folder, ENCODER)
    file.rename(file.with_suffix(".fp16.safetensors"))
    for place in (*folder.glob("*/*"), folder / "model_index.json"):
        place.with_name(f"._{place.name}").write_bytes(b"x")
    _copy_configurations(folder, tmp_path / "copy")
    _link_weights(checkpoint.read(folder), tmp_path / "copy")
    assert not [entry for entry in (tmp_path / "copy").rglob("*") if entry.name.startswith(".")]
    same_everywhere(tmp_path / "copy", T5)
    same_everywhere(tmp_path / "copy", ENCODER)


def test_hidden_companions_in_an_artifact(tmp_path: Path) -> None:
    from fluxserve.folders import artifact
    from tests.support import artifacts

    path = artifacts.write(tmp_path / "artifact")
    for place in ("checkpoint/.DS_Store", "checkpoint/vae/._config.json", "checkpoint/.cache/x"):
        (path / place).parent.mkdir(exist_ok=True)
        (path / place).write_bytes(b"x")
    assert artifact.read(path)
    (path / "checkpoint" / "more.json").write_bytes(b"x")
    with pytest.raises(ArtifactDamaged, match=r"more\.json: not listed"):
        artifact.read(path)


# --- what no check of files can see -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("component", "name"), [(TRANSFORMER, "proj_out.weight"), (VAE, "decoder.conv_out.weight")])
def test_finite_weights_whose_picture_is_not(folder: Path, component: str, name: str) -> None:
    """They overflow on their way: the model does not become ready."""
    from fluxserve.engines.torch_eager import open_components
    from fluxserve.pipeline import Pipeline

    edit(folder, component, lambda tensors: tensors[name].fill_(3e38))
    read = checkpoint.read(folder)
    components = open_components(read, "cpu", "float32")
    with pytest.raises(NotFinite):
        Pipeline(read.spec, components).warm_up()
    components.close()
