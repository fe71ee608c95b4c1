"""Folders that people bring: where a checkpoint is below a path, which files count, and JSON read from them."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fluxserve.errors import CheckpointError, UnsupportedArchitecture
from fluxserve.folders import foreign

MODEL_INDEX = "model_index.json"
_EXPECTED = "expected a diffusers-format checkpoint"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FEW = 5


def visible(folder: Path, pattern: str = "*") -> list[Path]:
    """What a folder holds, sorted, without hidden entries: companions that a Mac or a download tool left there."""
    return sorted(entry for entry in folder.glob(pattern) if not is_hidden(entry.relative_to(folder)))


def is_hidden(relative: Path) -> bool:
    """Whether a file, or a folder above it, is hidden."""
    return any(part.startswith(".") or part == "__MACOSX" for part in relative.parts)


def expanded(path: Path) -> Path:
    """A path with `~` replaced by the home folder; a folder that is really called `~` stays.

    Raises:
        CheckpointError: no such home, or bytes that are not UTF-8: libraries that read weights take no others.
    """
    if (readable := os.fsencode(path).decode(errors="backslashreplace")).encode() != os.fsencode(path):
        raise CheckpointError(f"{readable}: a name that is not UTF-8; expected another, such as a link's")
    if path.exists():
        return path
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise CheckpointError(f"{path}: {error}") from error


@contextmanager
def in_ascii(folder: Path) -> Iterator[Path]:
    """A path of ASCII letters to a folder, for libraries that take text and no bytes.

    In a process whose file system encoding is ASCII, as that of Triton's stubs is, other letters of a path are lone
    surrogates, and no text.
    """
    if str(folder).isascii():
        yield folder
        return
    descriptor = os.open(folder, os.O_PATH)
    try:
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def locate(path: Path) -> Path:
    """The checkpoint's folder that a path stands for: itself, or the snapshot in a hub cache's folder of one model.

    Raises:
        CheckpointError: it is something else; the message says what, and the way on.
    """
    path = expanded(path)
    if path.is_file():
        raise CheckpointError(f"{path}: {foreign.file_as_folder(path)}; {_EXPECTED}'s folder")
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; {_EXPECTED} {_hint(path)}")
    if (path / MODEL_INDEX).exists() or (path / MODEL_INDEX).is_symlink():
        return path
    cached = path.parent if path.name == "snapshots" else path
    if (cached / "snapshots").is_dir():
        return locate(_snapshot(cached))
    raise CheckpointError(f"{path / MODEL_INDEX}: missing; {_EXPECTED}. {_instead(path)}".rstrip(". "))


def _hint(path: Path) -> str:
    if re.match(r"\w+:/|huggingface\.co", str(path)):
        return "on this machine. Nothing is downloaded: `hf download ORGANISATION/NAME --local-dir FOLDER` does that"
    if _REPOSITORY.fullmatch(str(path)) and not path.parent.exists():
        return f"on this machine. Nothing is downloaded: `hf download {path} --local-dir FOLDER` does that"
    return "(--checkpoint and FLUXSERVE_CHECKPOINT name one)"


def _snapshot(cached: Path) -> Path:
    """The snapshot of a hub cache's folder of one model: the one that `main` refers to, or the only one."""
    found = [entry for entry in visible(cached / "snapshots") if entry.is_dir()]
    main = cached / "refs" / "main"
    if main.is_file():
        commit = main.read_text(encoding="utf-8", errors="replace").strip()
        named = [entry for entry in found if entry.name == commit]
        found = named or found
    if len(found) != 1:
        several = ", ".join(entry.name for entry in found[:_FEW]) or "none"
        raise CheckpointError(f"{cached / 'snapshots'}: got snapshots {several}; expected one. Give its own folder")
    return found[0]


def _instead(path: Path) -> str:
    """What a folder without a model_index.json is, as sentences; empty: unknown."""
    below = [entry for entry in visible(path) if entry.is_dir()]
    checkpoints = [entry for entry in below if (entry / MODEL_INDEX).is_file()]
    if checkpoints:
        return f"It holds {', '.join(map(str, checkpoints[:_FEW]))}. Give that folder"
    if cached := [entry for entry in below if entry.name.startswith("models--")]:
        return f"It is a hub cache. Give the folder of one model: {', '.join(map(str, cached[:_FEW]))}"
    if (above := _above(path)) is not None:
        return f"It is a part of {above}. Give that folder"
    if (path / "manifest.json").is_file():
        return "It is an artifact: serve it with --artifact or FLUXSERVE_ARTIFACT"
    files = [entry for entry in visible(path) if entry.is_file()]
    if any(file.name.startswith(("adapter_", "pytorch_lora_weights")) for file in files):
        return "It is an adapter (LoRA), not a model"
    if (path / "config.json").is_file():
        return "It is one component of a model. Give the whole pipeline's folder"
    for file in files:
        if file.suffix.lower() in (".safetensors", ".gguf") or foreign.is_pickled(file):
            return f"It holds {file.name}, which is {foreign.file_as_folder(file)}"
    return "" if files or below else "The folder is empty: a volume that was not mounted, or a download that failed"


def _above(path: Path) -> Path | None:
    return next((parent for parent in list(path.absolute().parents)[:2] if (parent / MODEL_INDEX).is_file()), None)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: {foreign.stand_in(file) or f'missing; {_EXPECTED}'}") from error
    except (OSError, ValueError, RecursionError) as error:
        what = foreign.stand_in(file)
        raise CheckpointError(f"{file}: unreadable ({what or error})") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: got a JSON {type(value).__name__}; expected an object")
    return value


def files_below(folder: Path) -> Iterator[Path]:
    """Every file below a folder that is not hidden."""
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not is_hidden(Path(name))]
        yield from (Path(root) / name for name in names if not is_hidden(Path(name)))


def check_config(folder: Path, architecture: str) -> None:
    """Check a component's class, and that nothing is quantised. Raises CheckpointError, UnsupportedArchitecture."""
    file = folder / "config.json"
    config = read_json(file)
    expected: str | list[str] = architecture if "_class_name" in config else [architecture]
    if (got := config.get("_class_name", config.get("architectures"))) != expected:
        raise UnsupportedArchitecture(f"{file}: architecture", got, architecture)
    beside = folder / "hf_quant_config.json"
    for source, values in ((file, config), *([(beside, read_json(beside))] if beside.exists() else [])):
        if quantiser := foreign.quantiser(values):
            raise CheckpointError(f"{source}: got {quantiser}")
