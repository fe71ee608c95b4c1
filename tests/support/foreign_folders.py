"""Changes to a copied folder: what other tools leave in one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fluxserve.errors import CheckpointError
from fluxserve.folders import checkpoint
from tests.support.folders import TINY, Edit, change, weights_of

TRANSFORMER, ENCODER, T5, VAE = "transformer", "text_encoder", "text_encoder_2", "vae"
BASE = "diffusion_pytorch_model"


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read(path)
    message = str(caught.value)
    assert "\n" not in message and "Traceback" not in message
    return message


def beside(*names: str, like: str = "") -> Edit:
    """Add tensors, each named after a matrix of the component."""

    def add(tensors: dict[str, Tensor]) -> None:
        matrix = like or next(name for name, tensor in sorted(tensors.items()) if tensor.ndim == 2)
        for name in names:
            tensors[name.replace("*", matrix.removesuffix(".weight"))] = torch.ones(1)

    return add


def fill(name: str, value: float) -> Edit:
    def put(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[3] = value

    return put


# --- a component of another model ------------------------------------------------------------------------------------


def only_config(name: str, **values: object) -> Callable[[Path], None]:
    return lambda folder: change(folder / name, **values)


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


def a_copy_called(name: str) -> Callable[[Path], None]:
    def copy(folder: Path) -> None:
        shutil.copy(weights_of(folder, TRANSFORMER), folder / TRANSFORMER / name)

    return copy


def pointer(kind: str) -> bytes:
    return {
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 23802932552\n",
        "annex": b"/annex/objects/SHA256E-s1--0.safetensors\n",
        "page": b"<!DOCTYPE html><html><title>Sign in</title></html>",
        "nothing": b"",
    }[kind]
