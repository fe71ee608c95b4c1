"""checkpoint.read: what can't be served is refused while loading, with the file's name."""

import json
import math
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fluxserve import errors
from fluxserve.engines.open import open_components
from fluxserve.engines.torch_eager import load_module
from fluxserve.errors import CheckpointError, EngineError, UnsafeWeights, UnsupportedArchitecture
from fluxserve.families.flux.models import FLUX2_DEV, FLUX2_DEV_TURBO, FLUX2_KLEIN_4B, TINY
from fluxserve.families.flux.tensors import tensors
from fluxserve.folders import checkpoint
from fluxserve.kernels.operations import PLAIN
from fluxserve.settings import default_checkpoint
from tests.support import random_flux2
from tests.support.random_flux2 import RandomFlux2

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tiny model's JSON files with weights of zeros: all that `read` looks at."""
    return bare(default_checkpoint(), tmp_path / "flux")


def bare(source: Path, target: Path) -> Path:
    """A copy without tokenizers, whose tensors are zeros: sparse files."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer*", "samples"))
    for file in source.glob("*/*.safetensors"):
        with file.open("rb") as opened:
            (size,) = struct.unpack("<Q", begin := opened.read(8))
            header = begin + opened.read(size)
        zeros = target / file.relative_to(source)
        zeros.write_bytes(header)
        os.truncate(zeros, file.stat().st_size)
    return target


def write_zeros(folder: Path, layers: int | None) -> None:
    """Replace a component's weights by zeros of the shapes that its config.json says: a sparse file."""
    (file,) = folder.glob("*.safetensors")
    config = json.loads((folder / "config.json").read_text())
    header, end = {}, 0
    for name, shape in tensors(config.get("_class_name") or config["architectures"][0], config, layers).read.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end := end + 2 * math.prod(shape)]}
    write_header(file, header)
    os.truncate(file, file.stat().st_size + end)


def write_header(file: Path, header: object, payload: bytes = b"") -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + payload)


def change(file: Path, **values: Any) -> None:
    config = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in {**config, **values}.items() if v != "remove"}))


def refusal(folder: Path, kind: type[CheckpointError] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        checkpoint.read(folder)
    assert str(folder) in str(caught.value), "the message says where"
    return str(caught.value)


def test_the_shipped_model_passes() -> None:
    read = checkpoint.read(default_checkpoint())
    assert read.spec.name == "tiny"
    assert (read.spec.transformer, read.spec.defaults, read.spec.limits) == (
        TINY.transformer,
        TINY.defaults,
        TINY.limits,
    )
    assert read.component("vae") == default_checkpoint() / "vae"


def test_the_bare_copy_passes(folder: Path) -> None:
    """So that every refusal below is for its own reason."""
    assert checkpoint.read(folder).spec == checkpoint.read(default_checkpoint()).spec


def test_missing_folder(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json",
        "transformer/config.json",
        "vae/config.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder_2/config.json",
    ],
)
def test_json_files(folder: Path, name: str) -> None:
    file = folder / name
    for text, reason in (
        ("[1]", "got a JSON list"),
        ("{", "unreadable"),
        ('"x"', "got a JSON str"),
        ("", "unreadable"),
    ):
        file.write_text(text)
        assert reason in refusal(folder)
        assert str(file) in refusal(folder)
    file.write_bytes(b'{"a": "\xff"}')
    assert "unreadable" in refusal(folder)
    file.unlink()
    assert "missing" in refusal(folder)


@pytest.mark.parametrize("name", ["transformer", "vae", "text_encoder", "text_encoder_2"])
def test_missing_component(folder: Path, name: str) -> None:
    shutil.rmtree(folder / name)
    assert f"{folder / name}" in refusal(folder)


@pytest.mark.parametrize("name", ["transformer", "vae", "text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt"])
def test_pickled_weights(folder: Path, name: str, suffix: str) -> None:
    (weights,) = (folder / name).glob("*.safetensors")
    weights.rename(weights.with_suffix(suffix))
    assert "pickled weights are never loaded" in refusal(folder, UnsafeWeights)


def test_no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    assert "no weights; expected .safetensors files" in refusal(folder)


def test_a_pickle_beside_safetensors_is_ignored(folder: Path) -> None:
    (folder / WEIGHTS).with_suffix(".bin").write_bytes(b"x")
    assert checkpoint.read(folder)


@pytest.mark.parametrize(
    ("name", "change_to"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}),
        ("model_index.json", {"_class_name": "remove"}),
        ("transformer/config.json", {"_class_name": "SD3Transformer2DModel"}),
        ("vae/config.json", {"_class_name": "AutoencoderTiny"}),
        ("text_encoder/config.json", {"architectures": ["CLIPTextModelWithProjection"]}),
        ("text_encoder/config.json", {"architectures": []}),
        ("text_encoder_2/config.json", {"architectures": None}),
        ("transformer/config.json", {"in_channels": 384}),
        ("vae/config.json", {"latent_channels": 4}),
        ("vae/config.json", {"block_out_channels": 3}),
    ],
)
def test_another_architecture(folder: Path, name: str, change_to: dict[str, Any]) -> None:
    change(folder / name, **change_to)
    assert "expected" in refusal(folder, UnsupportedArchitecture)


def test_a_missing_number(folder: Path) -> None:
    change(folder / "vae/config.json", scaling_factor="remove")
    assert "a config.json lacks 'scaling_factor'" in refusal(folder)


@pytest.mark.parametrize("keep", [0, 5, 8, 1000, -1])
def test_truncated_weights(folder: Path, keep: int) -> None:
    whole = (default_checkpoint() / "vae/diffusion_pytorch_model.safetensors").read_bytes()
    file = folder / "vae/diffusion_pytorch_model.safetensors"
    file.write_bytes(whole)
    assert checkpoint.read(folder)
    file.write_bytes(whole[:keep])
    assert "truncated" in refusal(folder)
    assert str(file) in refusal(folder)


@pytest.mark.parametrize(
    "content",
    [struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 11) + b"{}", struct.pack("<Q", 1) + b"{}", b"not safetensors"],
)
def test_headers_that_lie(folder: Path, content: bytes) -> None:
    (folder / WEIGHTS).write_bytes(content)
    assert "truncated" in refusal(folder)


def test_lengths(folder: Path) -> None:
    size = (folder / WEIGHTS).stat().st_size
    for wrong in (size - 1, size + 1):
        os.truncate(folder / WEIGHTS, wrong)
        message = refusal(folder)
        assert str(folder / WEIGHTS) in message and "truncated or damaged" in message


def test_an_offset_that_was_shifted(folder: Path) -> None:
    """The length is right, and every dtype and shape; two tensors would share bytes."""
    data = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    name = sorted(header.keys() - {"__metadata__"}, key=lambda n: header[n]["data_offsets"])[1]
    header[name]["data_offsets"] = [offset - 4 for offset in header[name]["data_offsets"]]
    changed = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    assert len(changed) == length
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).write_bytes(data[:8] + changed + data[8 + length :])
    assert "truncated or damaged" in refusal(folder)


@pytest.mark.parametrize("header", [[], {"a": {"data_offsets": []}}, {"a": {"data_offsets": [0, "x"]}}])
def test_headers_of_another_type(folder: Path, header: object) -> None:
    write_header(folder / WEIGHTS, header)
    assert "not a safetensors file" in refusal(folder)


def test_a_folder_called_like_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()
    refusal(folder)


def test_a_missing_shard(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": Path(WEIGHTS).name, "b": "part-2.safetensors"}}))
    message = refusal(folder)
    assert str(folder / "transformer" / "part-2.safetensors") in message
    write_header(folder / "transformer" / "part-2.safetensors", {})
    assert checkpoint.read(folder)


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": {"a": 1, "b": "x"}}]
)
def test_an_index_of_another_type(folder: Path, index: object) -> None:
    (folder / INDEX).write_text(json.dumps(index))
    refusal(folder)


def test_an_index_that_points_elsewhere(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "../../elsewhere.safetensors"}}))
    (folder.parent / "elsewhere.safetensors").write_bytes(b"not weights")
    refusal(folder)


def test_architectures_of_another_type(folder: Path) -> None:
    change(folder / "text_encoder/config.json", architectures=5)
    refusal(folder)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("transformer", {"num_attention_heads": "2"}),
        ("transformer", {"num_layers": 1.5}),
        ("vae", {"scaling_factor": "x"}),
    ],
)
def test_numbers_of_another_type(folder: Path, name: str, values: dict[str, Any]) -> None:
    change(folder / name / "config.json", **values)
    refusal(folder)


def test_another_scheduler(folder: Path) -> None:
    change(folder / "scheduler/scheduler_config.json", _class_name="DPMSolverMultistepScheduler")
    refusal(folder)


# --- FLUX.2-klein ----------------------------------------------------------------------------------------------------


@pytest.fixture
def klein(tmp_path: Path) -> Path:
    """A random klein's JSON files with weights of zeros."""
    return bare(random_flux2.klein().folder, tmp_path / "klein")


def test_klein(klein: Path) -> None:
    read = checkpoint.read(klein)
    assert read.spec.name == "custom"
    assert (read.spec.defaults, read.spec.limits) == (FLUX2_KLEIN_4B.defaults, FLUX2_KLEIN_4B.limits)
    (encoder,) = read.spec.text.encoders
    assert (encoder.name, encoder.vocabulary, encoder.layers) == ("qwen3", random_flux2.VOCABULARY, (9, 18, 27))
    assert read.spec.schedule.empirical_shift


def test_flux2_dev() -> None:
    """Its language model can see, and says so in a configuration of its own."""
    read = checkpoint.read(random_flux2.dev().folder)
    assert (read.spec.defaults, read.spec.limits) == (FLUX2_DEV.defaults, FLUX2_DEV.limits)
    (encoder,) = read.spec.text.encoders
    assert (encoder.name, encoder.vocabulary, encoder.layers) == ("mistral3", random_flux2.VOCABULARY, (10, 20, 30))


@pytest.fixture
def published_dev(tmp_path: Path) -> Path:
    """FLUX.2-dev's configurations at its real shape, with weights of zeros that take no room."""
    target, shape = bare(random_flux2.dev().folder, tmp_path / "dev"), FLUX2_DEV.transformer
    names = ("num_layers", "num_single_layers", "num_attention_heads", "attention_head_dim", "joint_attention_dim")
    real = {name: getattr(shape, name) for name in (*names, "axes_dims_rope")}
    change(target / "transformer/config.json", **real)
    text = json.loads((target / "text_encoder/config.json").read_text())["text_config"]
    wide = {**text, "hidden_size": shape.joint_attention_dim // 3}
    change(target / "text_encoder/config.json", text_config=wide)
    for name in ("transformer", "text_encoder"):
        write_zeros(target / name, layers=30 if name == "text_encoder" else None)
    return target


def test_turbo_is_told(published_dev: Path) -> None:
    dev, turbo = checkpoint.read(published_dev), checkpoint.read(published_dev, model="flux.2-dev-turbo")
    assert (dev.spec.name, dev.spec.defaults) == ("flux.2-dev", FLUX2_DEV.defaults)
    assert (turbo.spec.name, turbo.spec.defaults) == ("flux.2-dev-turbo", FLUX2_DEV_TURBO.defaults)
    assert (turbo.spec.limits, turbo.spec.only_steps) == (FLUX2_DEV_TURBO.limits, 8)
    assert (turbo.spec.text, turbo.spec.vae) == (dev.spec.text, dev.spec.vae), "what the folder says stays"
    assert checkpoint.read(published_dev, model="flux.2-dev") == dev


def test_a_model_that_the_folder_is_not(published_dev: Path, folder: Path, klein: Path) -> None:
    for path, model, expected in (
        (published_dev, "flux.2-klein-9b", "flux.2-dev or flux.2-dev-turbo"),
        (folder, "flux.2-dev-turbo", "tiny"),
        (klein, "flux.2-dev-turbo", "no name"),
    ):
        with pytest.raises(UnsupportedArchitecture) as caught:
            checkpoint.read(path, model=model)
        assert str(caught.value) == f"{path}: model: got {model!r}; expected {expected}, by its transformer's shape"


@pytest.mark.parametrize("is_distilled", [False, None, "remove", 1])
def test_a_klein_that_is_not_distilled(klein: Path, is_distilled: object) -> None:
    """It is drawn in two passes per step; in one, it would draw something else without a word."""
    change(klein / "model_index.json", is_distilled=is_distilled)
    assert "is_distilled" in refusal(klein, UnsupportedArchitecture)


@pytest.mark.parametrize(
    ("name", "change_to"),
    [
        ("model_index.json", {"_class_name": "Flux2KleinKVPipeline"}),
        ("model_index.json", {"_class_name": "Flux2KleinInpaintPipeline"}),
        ("model_index.json", {"_class_name": "FluxPipeline"}),
        ("transformer/config.json", {"_class_name": "FluxTransformer2DModel"}),
        ("vae/config.json", {"_class_name": "AutoencoderKL"}),
        ("text_encoder/config.json", {"architectures": ["Qwen3Model"]}),
        ("text_encoder/config.json", {"hidden_size": 64}),
    ],
)
def test_another_architecture_than_kleins(klein: Path, name: str, change_to: dict[str, Any]) -> None:
    change(klein / name, **change_to)
    assert "expected" in refusal(klein, UnsupportedArchitecture)


def test_the_fused_engine_has_no_text_encoder_for_dev() -> None:
    from fluxserve.engines.fused import open as fused

    with pytest.raises(EngineError, match=r"fused: got custom, whose text encoder is mistral3; expected one with clip"):
        fused.assemble(random_flux2.dev().checkpoint(), torch.device("cpu"), fused.BF16, None, PLAIN)


LANGUAGE_MODELS = {
    random_flux2.klein: ("model.", r"model\.(layers\.(27|28|29)\.|norm\.)|lm_head\."),
    random_flux2.dev: (
        "language_model.model.",
        r"language_model\.(model\.(layers\.3[01]\.|norm\.)|lm_head)|vision|multi",
    ),
}
"""Of a folder: what its language model's names begin with, and what of the file nobody reads."""


@pytest.mark.parametrize("made", LANGUAGE_MODELS)
@pytest.mark.parametrize("lost", ["layers.26.mlp.up_proj.weight", "embed_tokens.weight"])
def test_a_language_model_that_lacks_a_layer(tmp_path: Path, made: Callable[[], RandomFlux2], lost: str) -> None:
    """What is after the last layer that is read may be missing, and only that; a head, and eyes, too."""
    target, (prefix, beyond) = tmp_path / "flux", LANGUAGE_MODELS[made]
    shutil.copytree(made().folder, target)
    (file,) = (target / "text_encoder").glob("*.safetensors")
    tensors = load_file(file)
    kept = {name: tensor for name, tensor in tensors.items() if not re.match(beyond, name)}
    assert len(kept) < len(tensors)
    save_file(kept, file, metadata={"format": "pt"})
    open_components("torch_eager", checkpoint.read(target), "cpu", "float32").close()
    del kept[prefix + lost]
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="missing 1 tensor of"):
        open_components("torch_eager", checkpoint.read(target), "cpu", "float32")


def test_of_mistral_three_quarters_are_loaded(tmp_path: Path) -> None:
    """Whichever way its weights are called: as it was published first, or as its classes are built today."""
    target = tmp_path / "dev"
    shutil.copytree(random_flux2.dev().folder, target)
    (file,) = (target / "text_encoder").glob("*.safetensors")
    old = load_module(checkpoint.read(target), "mistral3", "cpu", torch.float32).state_dict()
    assert {name.split(".layers.")[0] for name in old} == {
        "model.language_model",
        "model.language_model.embed_tokens.weight",
    }
    assert {int(name.split(".")[3]) for name in old if ".layers." in name} == set(range(30))
    names = {name: "model." + name.replace("language_model.model.", "language_model.") for name in load_file(file)}
    save_file({names[name]: tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    new = load_module(checkpoint.read(target), "mistral3", "cpu", torch.float32).state_dict()
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)


# --- weights that do not fit the architecture: seen by the engine, while it loads them -------------------------------

Edit = Callable[[dict[str, torch.Tensor]], object]


def opened(tmp_path: Path, component: str, edit: Edit) -> None:
    target = tmp_path / "flux"
    shutil.copytree(default_checkpoint(), target)
    (file,) = (target / component).glob("*.safetensors")
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    open_components("torch_eager", checkpoint.read(target), "cpu", "float32").close()


def drop_a_matrix(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[
        next(name for name in sorted(tensors) if (tensors[name].ndim == 2 and ".1." in name) or "single" in name)
    ]


def transpose_a_matrix(tensors: dict[str, torch.Tensor]) -> None:
    name = next(n for n, t in sorted(tensors.items()) if t.ndim == 2 and t.shape[0] != t.shape[1])
    tensors[name] = tensors[name].T.contiguous()


@pytest.mark.parametrize("component", ["transformer", "text_encoder", "text_encoder_2"])
def test_a_tensor_of_another_shape(tmp_path: Path, component: str) -> None:
    with pytest.raises(errors.CheckpointError, match=component):
        opened(tmp_path, component, transpose_a_matrix)


@pytest.mark.parametrize("component", ["transformer", "text_encoder", "text_encoder_2"])
def test_a_tensor_that_is_missing(tmp_path: Path, component: str) -> None:
    with pytest.raises(errors.CheckpointError, match=component):
        opened(tmp_path, component, drop_a_matrix)
