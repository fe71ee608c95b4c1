"""checkpoint.read: what can't be served is refused while loading, with the file's name."""

import json
import os
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
from fluxserve.errors import UnsafeWeights, UnsupportedArchitecture
from fluxserve.families.flux.models import TINY
from fluxserve.folders import checkpoint
from fluxserve.settings import default_checkpoint
from tests.support.bare_folders import bare, change, refusal, write_header


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tiny model's JSON files with weights of zeros: all that `read` looks at."""
    return bare(default_checkpoint(), tmp_path / "flux")


WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"


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
