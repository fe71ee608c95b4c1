"""A small valid artifact without an export: engines of a few bytes, the tiny model's configurations and tokenizers."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fluxserve.families.flux.models import TINY
from fluxserve.folders.artifact import ANYWHERE, CHECKPOINT, FORMAT, MANIFEST, REFERENCE, sha256
from fluxserve.settings import default_checkpoint

ROWS = (1, 1, 2)
RANGES = {
    "clip": {"rows": ROWS, "tokens": (77, 77, 77)},
    "t5": {"rows": ROWS, "tokens": (32, 32, 32)},
    "transformer": {"rows": ROWS, "image_tokens": (16, 64, 256), "text_tokens": (32, 32, 32)},
    "vae_encoder": {"rows": ROWS, "latent_height": (8, 16, 32), "latent_width": (8, 16, 32)},
    "vae_decoder": {"rows": ROWS, "latent_height": (8, 16, 32), "latent_width": (8, 16, 32)},
}
"""From 64x64 to 256x256 pixels, typically 128x128, up to two images at once."""

Edit = Callable[[dict[str, Any]], object]


def write(folder: Path, engine: str = "onnxruntime", architectures: Sequence[str] = ()) -> Path:
    """Make one.

    Args:
        folder: must not exist.
        architectures: an engine's file is written for each; none: one file for anywhere.
    """
    name = "model.plan" if architectures else "model.onnx"
    engines = {c: {a: f"{c}/{a}/{name}" for a in architectures or (ANYWHERE,)} for c in TINY.components}
    for file in (file for files in engines.values() for file in files.values()):
        write_file(folder / file, f"the engine {file}")
    for component in TINY.components:
        write_file(folder / REFERENCE / f"{component}.safetensors", f"what {component} should compute")
    left_out = shutil.ignore_patterns("*.safetensors", "*.txt", "*.jsonl", "*.md", "quality.json", "samples")
    shutil.copytree(default_checkpoint(), folder / CHECKPOINT, ignore=left_out)
    components = {
        component: {
            "precision": "fp32",
            "compute_dtype": "float32",
            "shapes": {symbol: list(values) for symbol, values in RANGES[component].items()},
            "engines": engines[component],
            "numerics": {},
        }
        for component in TINY.components
    }
    _write_manifest(folder, _manifest(folder, engine, list(architectures), components))
    return folder


def _manifest(folder: Path, engine: str, architectures: list[str], components: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "model": "tiny",
        "engine": engine,
        "precision": "fp32",
        "architectures": architectures,
        "shapes": {"min_size": [64, 64], "opt_size": [128, 128], "max_size": [256, 256], "max_batch": ROWS[-1]},
        "components": components,
        "files": listing(folder),
        "checkpoint": {"vae/diffusion_pytorch_model.safetensors": "0" * 64},
        "calibration": None,
        "made": {
            "fluxserve": "0.1.0",
            "commit": "unknown",
            "when": "2026-01-02T03:04:05+00:00",
            "versions": {"torch": "2.9.0"},
        },
    }


def write_file(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


def listing(folder: Path) -> dict[str, dict[str, Any]]:
    """What a manifest says of the files that are there now."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f != folder / MANIFEST)
    return {f.relative_to(folder).as_posix(): {"sha256": sha256(f), "bytes": f.stat().st_size} for f in files}


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def change(folder: Path, edit: Edit) -> Path:
    """Edit the manifest in place, whatever comes of it."""
    content = manifest(folder)
    edit(content)
    _write_manifest(folder, content)
    return folder


def put(folder: Path, where: Sequence[str | int], value: object) -> Path:
    """Set one entry of the manifest."""

    def edit(content: Any) -> None:
        for key in where[:-1]:
            content = content[key]
        content[where[-1]] = value

    return change(folder, edit)


def drop(folder: Path, where: Sequence[str]) -> Path:
    """Remove one entry of the manifest."""

    def edit(content: Any) -> None:
        for key in where[:-1]:
            content = content[key]
        del content[where[-1]]

    return change(folder, edit)


def relist(folder: Path) -> Path:
    """Let the manifest say what is there now, as an export of these files would."""
    return put(folder, ["files"], listing(folder))


def _write_manifest(folder: Path, content: dict[str, Any]) -> None:
    (folder / MANIFEST).write_text(json.dumps(content, indent=1), encoding="utf-8")
