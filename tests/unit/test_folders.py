"""What people bring: folders as other tools leave them are read right, or refused with what they are and a way on."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fluxserve.errors import CheckpointError
from fluxserve.folders import checkpoint
from tests.support import random_flux2
from tests.support.folders import TINY, Edit, change, copied, edit, weights_of
from tests.support.foreign_folders import ENCODER, T5, TRANSFORMER, VAE, beside, fill, only_config, refusal


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copied(tmp_path / "flux")


# --- the list of what is read ----------------------------------------------------------------------------------------


def test_every_models_own_folder_is_what_its_list_says() -> None:
    """The lists are held to what diffusers and transformers write for every class."""
    for source in (TINY, random_flux2.klein().folder, random_flux2.klein(tied=False).folder, random_flux2.dev().folder):
        assert checkpoint.read(source)


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
