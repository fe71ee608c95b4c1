"""Finished stages → an artifact: one folder, put in place whole."""

import datetime
import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fluxserve import __version__, process
from fluxserve.errors import ExportError
from fluxserve.families import registry
from fluxserve.folders.artifact import (
    ANYWHERE,
    CHECKPOINT,
    FORMAT,
    MANIFEST,
    REFERENCE,
    SCALES,
    check_manifest,
    read_manifest,
    sha256,
)
from fluxserve.folders.checkpoint import Checkpoint
from fluxserve.folders.files import visible
from fluxserve_export import console
from fluxserve_export.manifest import write_manifest
from fluxserve_export.options import FP8, FUSED, TENSORRT, TENSORRT_RTX
from fluxserve_export.stages import Stages
from fluxserve_export.work import Result

NOTES = {
    TENSORRT: "fluxserve's tests run this engine against a fake of TensorRT's interface, never against TensorRT: "
    "`fluxserve export verify` on the GPU is the proof.",
    TENSORRT_RTX: "fluxserve's tests build such plans, but no RTX GPU was there to run one: "
    "`fluxserve export verify` on the GPU is the proof.",
    FUSED: "fluxserve's tests run this engine on a Hopper GPU, and its arithmetic with plain references on a CPU, with "
    "random and the tiny model's weights: `fluxserve export verify` on the GPU is the proof for these.",
}
"""How far each engine was tried; see README.md."""

_CONFIGURATIONS = (".json", ".model", ".txt", ".jinja")


def refuse_foreign(target: Path, model: str) -> None:
    """Raise ExportError if `target` is something else than an earlier artifact of this model, which is replaced."""
    if not target.exists():
        return
    if not (target / MANIFEST).is_file():
        raise ExportError(f"{target}: exists and is not an artifact; expected a new folder, or one to replace")
    earlier = read_manifest(target)["model"]
    if earlier != model:
        raise ExportError(f"{target}: is an artifact of {earlier}; {model} does not replace it. Remove it first")


def assemble(stages: Stages, numerics: Mapping[str, Result], target: Path) -> Path:
    """Copy everything that is served into `target`, with its manifest; an earlier artifact there is replaced.

    Until the last step the folder has its process's name; a killed export leaves that, and never half an artifact.
    """
    refuse_foreign(target, stages.checkpoint.spec.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    process.remove_leftovers(target.parent)
    partial = target.parent / f"{process.own_prefix()}{target.name}"
    names = stages.checkpoint.spec.components
    try:
        with console.line("assemble") as line:
            partial.mkdir()
            _copy_configurations(stages.checkpoint.path, partial / CHECKPOINT)
            if stages.options.engine == FUSED:
                _link_weights(stages.checkpoint, partial / CHECKPOINT)
                components = {name: _of_checkpoint(stages, name) for name in names}
            else:
                components = {name: _component(stages, name, numerics[name], partial) for name in names}
            _place(stages.reference(), partial / REFERENCE)
            if stages.options.precision == FP8:
                (partial / SCALES).write_text(json.dumps(stages.decided(), indent=1) + "\n", encoding="utf-8")
            line.say("hashing")
            manifest = _manifest(stages, components, partial)
            check_manifest(manifest, partial / MANIFEST)
            write_manifest(partial, manifest)
            _swap(partial, target)
            line.end(f"{target}, {console.size(sum(f['bytes'] for f in manifest['files'].values()))}")
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def _component(stages: Stages, name: str, numerics: Result, partial: Path) -> dict[str, Any]:
    """Place a component's files; its entry in the manifest."""
    graph, engines, seconds = stages.graph(name), {}, {"onnx": stages.onnx(name).seconds}
    reports = {}
    for architecture, (result, main) in stages.engines(name).items():
        folder = f"{name}/{architecture}"
        _place(result, partial / folder)
        engines[architecture] = f"{folder}/{main}"
        seconds[architecture] = result.seconds
        reports[architecture] = result.record
    precision = stages.options.precision_of(name)
    entry = {
        "precision": precision,
        "compute_dtype": str(stages.options.dtype).removeprefix("torch."),
        "shapes": {symbol: list(values) for symbol, values in stages.ranges(name).items()},
        "engines": engines,
        "seconds": seconds,
        "built": {name: record for name, record in reports.items() if name != ANYWHERE},
        "numerics": numerics.record,
    }
    if precision == FP8:
        entry["quantised"] = [*graph.record["linears"], *(f"{a} (attention)" for a in graph.record["attention"])]
    return entry


def _of_checkpoint(stages: Stages, name: str) -> dict[str, Any]:
    """The entry of a component whose engine reads the checkpoint's own weights."""
    file = f"{CHECKPOINT}/{registry.architectures(stages.checkpoint.spec)[name].folder}/config.json"
    return {
        "precision": stages.options.precision_of(name),
        "compute_dtype": str(stages.options.dtype).removeprefix("torch."),
        "shapes": {symbol: list(values) for symbol, values in stages.ranges(name).items()},
        "engines": dict.fromkeys(stages.architectures, file),
        "numerics": {},
    }


def _link_weights(checkpoint: Checkpoint, target: Path) -> None:
    """The checkpoint's weights beside their configurations; the same files, if they are on the same file system."""
    for folder in sorted({architecture.folder for architecture in registry.architectures(checkpoint.spec).values()}):
        weights = checkpoint.weights(folder).set
        if weights.index is not None:
            shutil.copy(weights.index, target / folder / weights.index.name)
        for file in weights.files:
            place = target / folder / file.name
            try:
                place.hardlink_to(file.resolve())
            except OSError:  # another file system, or one without hard links
                shutil.copy(file, place)


def _place(result: Result, folder: Path) -> None:
    """Copies of a stage's files at their place. No hard links: ONNX readers take them for an attack."""
    folder.mkdir(parents=True)
    for name in result.files:
        shutil.copy(result.path / name, folder / name)


def _copy_configurations(checkpoint: Path, target: Path) -> None:
    """The diffusers folder without its weights: model_index.json, and what lies in the folders that it names."""
    index = json.loads((checkpoint / "model_index.json").read_text(encoding="utf-8"))
    names = [name for name in sorted(index) if Path(name).name == name and not name.startswith(".")]
    folders = [checkpoint / name for name in names if (checkpoint / name).is_dir()]
    found = [f for folder in folders for f in visible(folder) if f.is_file() and f.suffix in _CONFIGURATIONS]
    for file in (checkpoint / "model_index.json", *found):
        if ".index" not in file.suffixes:
            name = file.relative_to(checkpoint)
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target / name)


def _manifest(stages: Stages, components: Mapping[str, Any], partial: Path) -> dict[str, Any]:
    options, asked = stages.options, stages.calibration
    files = sorted(f for f in partial.rglob("*") if f.is_file())
    calibration = {
        "prompts": asked.count,
        "prompts_sha256": asked.prompts.sha256,
        "steps": asked.steps,
        "seed": asked.seed,
        "size": list(options.sizes.opt_size),
        "method": asked.method,
        "scales": SCALES,
    }
    return {
        "format": FORMAT,
        "model": stages.checkpoint.spec.name,
        "engine": options.engine,
        "precision": options.precision,
        "architectures": list(stages.architectures),
        "shapes": {
            "min_size": list(options.sizes.min_size),
            "opt_size": list(options.sizes.opt_size),
            "max_size": list(options.sizes.max_size),
            "max_batch": options.sizes.max_batch,
        },
        "components": dict(components),
        "files": _listed(partial, files),
        "checkpoint": stages.hashes,
        "calibration": calibration if options.precision == FP8 else None,
        **({"measured": stages.measured().record} if stages.measures else {}),
        "notes": _notes(options.engine, components),
        "made": {
            "fluxserve": __version__,
            "commit": _commit(),
            "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": stages.versions,
        },
    }


def _listed(root: Path, files: Sequence[Path]) -> dict[str, Any]:
    """What a manifest says of files: their hashes, taken side by side, and sizes."""
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(sha256, files))
    named = zip(files, digests, strict=True)
    return {f.relative_to(root).as_posix(): {"sha256": digest, "bytes": f.stat().st_size} for f, digest in named}


def _notes(engine: str, components: Mapping[str, Any]) -> list[str]:
    """What whoever serves it should know."""
    notes = [NOTES[engine]] if engine in NOTES else []
    for name, entry in components.items():
        if "skipped" in entry["numerics"]:
            notes.append(f"{name}: its graph was not run through ONNX Runtime: {entry['numerics']['skipped']}")
    return notes


def _commit() -> str:
    """Of the source tree this runs from, "-dirty" if it was changed since; "unknown" where it is not in one."""
    root = Path(__file__).parents[3]

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    try:
        own = git("rev-parse", "--show-toplevel") == str(root)
        return (git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") if own else "") or "unknown"
    except OSError:  # no git here
        return "unknown"


def _swap(partial: Path, target: Path) -> None:
    """Give the new artifact its name. An earlier one steps aside as TARGET.old meanwhile, and back if that fails."""
    old = target.with_name(f"{target.name}.old")
    if not target.exists():
        partial.rename(target)
        return
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
