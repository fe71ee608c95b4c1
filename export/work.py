"""Where stages leave their results: folders named after the content that they were made from.

    WORK/
      onnx-transformer-1f2e3d4c5b6a7988/     the stage's files, and stage.json: inputs, record, hashes
      hashes.json                            of large files, as long as their size and time of change stay

A stage whose inputs have not changed is found and not repeated. One that is killed leaves a folder under its process's
name, which nothing looks at and the next export removes; any other folder is whole, because it got its name last.
"""

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export import console
from fluxserve import process
from fluxserve.artifact import sha256
from fluxserve.errors import ExportError

_RECORD = "stage.json"
_SOURCES = Path(__file__).parent


@dataclass(frozen=True)
class Result:
    """A finished stage."""

    path: Path
    files: Mapping[str, str]
    """File name → sha256."""
    record: Mapping[str, Any]
    """What the stage has to say about them; as JSON."""
    seconds: float


Make = Callable[[Path, console.Line], dict[str, Any]]
"""Writes a stage's files into a folder, returns its record."""


class Work:
    """A folder of results; several exports may share it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._seen = folder, dict[Path, Result]()
        folder.mkdir(parents=True, exist_ok=True)
        process.remove_leftovers(folder)

    def stage(self, name: str, inputs: Mapping[str, Any], make: Make) -> Result:
        """The result of a stage for these inputs: found, or made now."""
        key = _key({"stage": name, "inputs": inputs, "code": _code()})
        target = self.folder / f"{name.replace(' ', '-')}-{key}"
        if target not in self._seen:
            with console.line(name) as line:
                self._seen[target] = self._found_or_made(target, inputs, make, line)
        return self._seen[target]

    def _found_or_made(self, target: Path, inputs: Mapping[str, Any], make: Make, line: console.Line) -> Result:
        found = self._find(target)
        if found is not None:
            line.end(f"kept, its inputs have not changed ({console.duration(found.seconds)} saved)")
            return found
        made = self._make(target, inputs, make, line)
        line.end(f"{console.duration(made.seconds)}, {console.size(_bytes(made.path))}")
        return made

    def _find(self, target: Path) -> Result | None:
        if not (target / _RECORD).is_file():
            return None
        stage = json.loads((target / _RECORD).read_text(encoding="utf-8"))
        for name, digest in stage["files"].items():
            if not (target / name).is_file() or self.hash(target / name) != digest:
                raise ExportError(f"{target / name}: not the file that was made; remove {target} to make it again")
        return Result(target, stage["files"], stage["record"], stage["seconds"])

    def _make(self, target: Path, inputs: Mapping[str, Any], make: Make, line: console.Line) -> Result:
        partial = self.folder / f"{process.own_prefix()}{target.name}"
        partial.mkdir()
        begun = time.perf_counter()
        try:
            record = make(partial, line)
            seconds = round(time.perf_counter() - begun, 2)
            files = {f.relative_to(partial).as_posix(): sha256(f) for f in sorted(partial.rglob("*")) if f.is_file()}
            stage = {"inputs": inputs, "files": files, "record": record, "seconds": seconds}
            (partial / _RECORD).write_text(json.dumps(stage, indent=1) + "\n", encoding="utf-8")
            _name(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return Result(target, files, record, seconds)

    def hash(self, file: Path) -> str:
        """sha256 of a file, remembered as long as its size and time of change stay."""
        memory = self.folder / "hashes.json"
        known: dict[str, list[Any]] = {}
        with contextlib.suppress(FileNotFoundError, ValueError):  # a memory that can't be read is no memory
            known = json.loads(memory.read_text(encoding="utf-8"))
        stat = file.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        entry = known.get(str(file.resolve()))
        if entry is None or entry[:2] != stamp:
            entry = [*stamp, sha256(file)]
            known[str(file.resolve())] = entry
            written = memory.with_name(f"{process.own_prefix()}hashes.json")
            written.write_text(json.dumps(known), encoding="utf-8")
            written.replace(memory)
        return str(entry[2])

    def hashes(self, folder: Path) -> dict[str, str]:
        """Of every file below a folder that a loader may read: weights, configurations, tokenizers."""
        suffixes = (".safetensors", ".json", ".txt", ".model")
        files = sorted(f for f in folder.rglob("*") if f.is_file() and f.suffix in suffixes)
        return {f.relative_to(folder).as_posix(): self.hash(f) for f in files}


def _name(partial: Path, target: Path) -> None:
    """Give a finished stage its name; another export may have made the same one meanwhile, and then that one stays."""
    try:
        partial.rename(target)
    except OSError:
        if not (target / _RECORD).is_file():
            raise
        shutil.rmtree(partial)


def _key(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _code() -> str:
    """The stages' own source: another version of it makes other files."""
    digest = hashlib.sha256()
    for file in sorted(_SOURCES.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _bytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
