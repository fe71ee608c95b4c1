"""An exported model: a folder of engines and the manifest that says what they are and where they run.

    ARTIFACT/
      manifest.json        checked against manifest.schema.json
      checkpoint/          configurations and tokenizers of the diffusers folder; its weights, if the engine runs them
      <component>/         engines: model.onnx (+ its data), or one plan for each GPU architecture
      scales.json          what calibration measured, for every engine that wants it
      reference/           inputs and outputs of the float32 reference, which `fluxserve export verify` compares with

`read` checks the manifest, the sizes of all files and the contents of the small ones; the engines' files are hashed
when an engine asks for them by `file`, so that a tampered or truncated one is noticed before it is used.
"""

import hashlib
import json
import math
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema

from fluxserve.engine import Signature
from fluxserve.errors import ArtifactDamaged, ArtifactError, CheckpointError
from fluxserve.families import registry
from fluxserve.folders import checkpoint as checkpoints
from fluxserve.folders.checkpoint import Checkpoint
from fluxserve.folders.files import expanded, files_below
from fluxserve.spec import NETWORK, ModelSpec

MANIFEST = "manifest.json"
CHECKPOINT = "checkpoint"
SCALES = "scales.json"
REFERENCE = "reference"
WEIGHTS = ".safetensors"
ANYWHERE = "any"
"""The key of an engine that is not built for one GPU architecture."""
FORMAT, FORMAT_WITH_ROOT = 2, 1
"""Versions of an artifact: the one that export writes, and the one before, whose ranges of q and k hold a factor."""

Extent = tuple[int, int, int]
"""Least, typical and most of a dimension."""


@dataclass(frozen=True)
class Ranges:
    """What calibration measured of one component: largest absolute values of tensors as they are.

    engines.fused.scales and fluxserve_export.fp8 turn them into scales.

    Attributes:
        linears: module name → its input's.
        attention: module name → those of q, k and v as they enter scaled_dot_product_attention.
        centred: module name → that of v less its mean over all tokens.
        kept: names of blocks, or of their attention alone ("transformer_blocks.3.attn"), that stay in the compute
            dtype.
    """

    linears: Mapping[str, float]
    attention: Mapping[str, tuple[float, float, float]]
    centred: Mapping[str, float]
    kept: frozenset[str] = frozenset()

    @property
    def kept_blocks(self) -> frozenset[str]:
        """Blocks that stay in the compute dtype whole."""
        return self.kept - set(self.attention)

    def quantises(self, attention: str) -> bool:
        """Whether an attention module is quantised."""
        return attention not in self.kept and not attention.startswith(tuple(f"{name}." for name in self.kept_blocks))

    @property
    def quantised(self) -> "Ranges":
        """The entries of what is not kept."""
        blocks = tuple(f"{name}." for name in self.kept_blocks)
        linears = {name: amax for name, amax in self.linears.items() if not name.startswith(blocks)}
        return replace(self, linears=linears, attention={k: v for k, v in self.attention.items() if self.quantises(k)})

    def to_json(self) -> dict[str, Any]:
        return {
            "linears": dict(self.linears),
            "attention": {name: list(q_k_v) for name, q_k_v in self.attention.items()},
            "centred": dict(self.centred),
            "kept": sorted(self.kept),
        }

    @staticmethod
    def from_json(entry: Mapping[str, Any]) -> "Ranges":
        """Entries of artifacts from before v's mean was taken off have neither `centred` nor `kept`.

        Raises:
            ValueError: a range is not a finite number above 0.
        """
        q_k_v = {name: (_amax(q), _amax(k), _amax(v)) for name, (q, k, v) in entry["attention"].items()}
        linears, centred = (
            {name: _amax(amax) for name, amax in entry.get(key, {}).items()} for key in ("linears", "centred")
        )
        return Ranges(linears, q_k_v, centred, frozenset(map(str, entry.get("kept", ()))))

    def without_root(self, head_dim: int) -> "Ranges":
        """Return ranges of FORMAT_WITH_ROOT as they were measured: it holds those of q and k times head_dim^-1/4."""
        root = head_dim**0.25
        return replace(self, attention={name: (q * root, k * root, v) for name, (q, k, v) in self.attention.items()})


def _amax(value: object) -> float:
    """Return a largest absolute value. Raises ValueError."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"got a range of {value!r}; expected a finite number above 0")
    return float(value)


@dataclass(frozen=True)
class Component:
    """One engine of an artifact."""

    name: str
    precision: str
    compute_dtype: str
    shapes: Mapping[str, Extent]
    engines: Mapping[str, str]

    def signature(self, spec: ModelSpec) -> Signature:
        """Return the component's signature with only the shapes that its engine was built for."""
        whole = registry.of(spec).signatures(spec)[self.name]
        return whole.narrowed({symbol: (least, most) for symbol, (least, _, most) in self.shapes.items()})


@dataclass(frozen=True)
class Artifact:
    """A folder that was looked over, and its manifest."""

    path: Path
    manifest: Mapping[str, Any]
    checkpoint: Checkpoint

    @property
    def engine(self) -> str:
        return str(self.manifest["engine"])

    @property
    def versions(self) -> Mapping[str, str]:
        """Of the libraries that made it."""
        versions: Mapping[str, str] = self.manifest["made"]["versions"]
        return versions

    def component(self, name: str) -> Component:
        """One of the spec's components."""
        entry = self.manifest["components"][name]
        shapes = {symbol: tuple(values) for symbol, values in entry["shapes"].items()}
        return Component(name, entry["precision"], entry["compute_dtype"], shapes, entry["engines"])

    def file(self, name: str) -> Path:
        """A file of the artifact, after its hash was compared with the manifest's.

        Raises:
            ArtifactDamaged: it is not the file that was exported.
        """
        return _unchanged(self.path, self.manifest["files"], name)

    def ranges(self, component: str) -> Ranges:
        """Return what calibration measured of a component. Raises ArtifactError."""
        file = self.file(SCALES)
        try:
            ranges = Ranges.from_json(json.loads(file.read_text(encoding="utf-8"))["components"][component])
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{file}: no ranges of {component} ({error})") from error
        if self.manifest["format"] == FORMAT_WITH_ROOT:
            return ranges.without_root(self.checkpoint.config("transformer")["attention_head_dim"])
        return ranges

    def folder(self, name: str) -> list[Path]:
        """Every file under a folder of the artifact, each after the check of `file`; several are read at once."""
        listed = [file for file in sorted(self.manifest["files"]) if file.startswith(f"{name}/")]
        with ThreadPoolExecutor() as pool:
            return list(pool.map(self.file, listed))

    def check_contents(self) -> None:
        """Compare every file with its hash. Raises ArtifactDamaged."""
        with ThreadPoolExecutor() as pool:
            list(pool.map(self.file, sorted(self.manifest["files"])))

    @cached_property
    def spec(self) -> ModelSpec:
        """The model, with the limits narrowed to what the engines were built for."""
        base, shapes = self.checkpoint.spec, self.manifest["shapes"]
        least, most = min(shapes["min_size"]), max(shapes["max_size"])
        limits = replace(
            base.limits,
            min_side=max(base.limits.min_side, least),
            max_side=min(base.limits.max_side, most),
            max_pixels=min(base.limits.max_pixels, shapes["max_size"][0] * shapes["max_size"][1]),
            max_passes=min(base.limits.max_passes, self._rows),
        )
        side = min(max(base.defaults.side, limits.min_side), limits.max_side)
        if side * side > limits.max_pixels:
            side = min(shapes["opt_size"])
        return replace(base, limits=limits, defaults=replace(base.defaults, side=side))

    @property
    def _rows(self) -> int:
        """Rows of the network that its engines take; unbounded where they read the checkpoint's weights."""
        network = self.component(NETWORK)
        of_weights = all(file.startswith(f"{CHECKPOINT}/") for file in network.engines.values())
        return sys.maxsize if of_weights else network.shapes["rows"][-1]


def sha256(file: Path) -> str:
    """Of a file's content, in hex; as `sha256sum` prints it."""
    try:
        with file.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactDamaged(file, f"unreadable ({error})") from error


def _unchanged(path: Path, files: Mapping[str, Any], name: str) -> Path:
    """One of the listed files; raises ArtifactDamaged if its hash is another."""
    if name not in files:
        raise ArtifactDamaged(path / name, "not listed in the manifest")
    got, listed = sha256(path / name), files[name]["sha256"]
    if got != listed:
        raise ArtifactDamaged(path / name, f"sha256 {got[:12]}…; the manifest says {listed[:12]}…")
    return path / name


def read(path: Path) -> Artifact:
    """Look an artifact over.

    Raises:
        ArtifactError: no artifact, or a manifest that says what can't be.
        ArtifactDamaged: a file that is missing, truncated or (a small one) changed.
    """
    try:
        path = expanded(path)
    except CheckpointError as error:
        raise ArtifactError(str(error)) from error
    manifest = read_manifest(path)
    try:
        _check_files(path, manifest["files"])
    except OSError as error:
        raise ArtifactError(f"{path}: unreadable ({error})") from error
    _check_engines(path, manifest)
    try:
        folder = checkpoints.read(path / CHECKPOINT, weights=False)
    except CheckpointError as error:
        raise ArtifactError(f"{path}: {error}") from error
    if folder.spec.name != manifest["model"]:
        got = f"model {manifest['model']!r}; the configurations are of {folder.spec.name!r}"
        raise ArtifactError(f"{path / MANIFEST}: {got}")
    _check_components(path / MANIFEST, manifest["components"], folder.spec)
    return Artifact(path, manifest, folder)


def _check_files(path: Path, files: Mapping[str, Any]) -> None:
    """Sizes of all; contents of what other libraries will read by the folder, where nothing may be added either."""
    for name, entry in files.items():
        _check_size(path / name, entry["bytes"])
        if name.startswith(f"{CHECKPOINT}/") and not name.endswith(WEIGHTS):
            _unchanged(path, files, name)
    for file in files_below(path / CHECKPOINT):
        if file.relative_to(path).as_posix() not in files:
            raise ArtifactDamaged(file, "not listed in the manifest")


def _check_components(file: Path, listed: Mapping[str, Any], spec: ModelSpec) -> None:
    """The manifest lists what the model is made of: all of it and nothing else. The schema knows no models."""
    for name in spec.components:
        if name not in listed:
            raise ArtifactError(f"{file}: components: {name!r} is a required property")
    for name in sorted(set(listed) - set(spec.components)):
        raise ArtifactError(f"{file}: components: {name!r} is no part of {spec.name}")


def _check_engines(path: Path, manifest: Mapping[str, Any]) -> None:
    wanted = {ANYWHERE} if manifest["engine"] == "onnxruntime" else set(manifest["architectures"])
    for component, entry in manifest["components"].items():
        if set(entry["engines"]) != wanted:
            got = f"{component} has engines for {', '.join(sorted(entry['engines']))}"
            raise ArtifactError(f"{path / MANIFEST}: {got}; expected {', '.join(sorted(wanted))}")
        for name in entry["engines"].values():
            if name not in manifest["files"] or not name.startswith((f"{component}/", f"{CHECKPOINT}/")):
                raise ArtifactError(f"{path / MANIFEST}: {component} names {name}, which is not among its files")


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of an artifact's folder, checked against the schema. Raises ArtifactError."""
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{file}: missing; expected an artifact made by `fluxserve export`") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{file}: unreadable ({error})") from error
    check_manifest(manifest, file)
    return manifest  # type: ignore[no-any-return]


def check_manifest(manifest: object, file: Path) -> None:
    """Compare with manifest.schema.json; the message names the field. Raises ArtifactError."""
    schema = json.loads(
        resources.files("fluxserve.folders").joinpath("manifest.schema.json").read_text(encoding="utf-8")
    )
    try:
        error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema).iter_errors(manifest))
    except RecursionError as deep:
        raise ArtifactError(f"{file}: nested too deeply") from deep
    if error is not None:
        raise ArtifactError(f"{file}: {error.json_path.removeprefix('$.')}: {error.message}")


def _check_size(file: Path, size: int) -> None:
    if not file.is_file():
        raise ArtifactDamaged(file, "missing")
    if file.stat().st_size != size:
        raise ArtifactDamaged(file, f"{file.stat().st_size} bytes; the manifest says {size}")
