"""Writing an artifact's manifest, and adding to it what was measured later."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fluxserve import process
from fluxserve.folders.artifact import MANIFEST, check_manifest, read_manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Replace the manifest in one step."""
    written = folder / f"{process.own_prefix()}{MANIFEST}"
    written.write_text(json.dumps(manifest, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    written.replace(folder / MANIFEST)


def add_verification(folder: Path, entry: Mapping[str, Any]) -> None:
    """Append what `verify` measured to an artifact's manifest."""
    _append(folder, "verified", entry)


def add_quality(folder: Path, entry: Mapping[str, Any]) -> None:
    """Append what `benchmarks.distance` measured to an artifact's manifest. Raises ArtifactError."""
    _append(folder, "quality", entry)


def _append(folder: Path, key: str, entry: Mapping[str, Any]) -> None:
    manifest = read_manifest(folder)
    manifest.setdefault(key, []).append(_finite(entry))
    check_manifest(manifest, folder / MANIFEST)
    write_manifest(folder, manifest)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
