"""Copies of a model's folder to change: weights are links, everything else is a file of its own."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from fluxserve.settings import default_checkpoint

TINY = default_checkpoint()
Edit = Callable[[dict[str, Tensor]], object]


def copied(target: Path, source: Path = TINY) -> Path:
    """A folder whose weights are links to the source's: replace them, never write to them."""

    def place(file: str, at: str) -> None:
        if file.endswith(".safetensors"):
            Path(at).symlink_to(Path(file).resolve())
        else:
            shutil.copy(file, at)

    ignored = shutil.ignore_patterns("samples", "*.jsonl", "README.md")
    shutil.copytree(source, target, copy_function=place, ignore=ignored)
    return target


def weights_of(folder: Path, component: str) -> Path:
    (file,) = (folder / component).glob("*.safetensors")
    return file


def edit(folder: Path, component: str, change: Edit) -> None:
    """Replace a component's weights by changed ones."""
    file = weights_of(folder, component)
    tensors = load_file(file)
    change(tensors)
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})


def change(file: Path, **values: Any) -> None:
    """Replace entries of a JSON object."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
