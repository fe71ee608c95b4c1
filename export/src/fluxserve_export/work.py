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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fluxserve
from fluxserve import process
from fluxserve.errors import ExportError
from fluxserve.folders.artifact import sha256
from fluxserve.folders.files import visible
from fluxserve_export import console

_RECORD = "stage.json"
_PACKAGES = (Path(__file__).parent, Path(fluxserve.__file__).parent)
_SOURCES = (".py", ".cu", ".cuh")


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
    """A folder of results. Several exports of one machine may share it; those of two containers must not at once,
    because neither sees the other's processes."""

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
        advice = f"remove {target} to make it again"
        try:
            stage = json.loads((target / _RECORD).read_text(encoding="utf-8"))
            result = Result(target, stage["files"], stage["record"], stage["seconds"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ExportError(f"{target / _RECORD}: unreadable ({error}); {advice}") from error
        for name, digest in result.files.items():
            if not (target / name).is_file() or self.hash(target / name) != digest:
                raise ExportError(f"{target / name}: not the file that was made; {advice}")
        return result

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
            named = _name(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        other = None if named else self._find(target)
        return other or Result(target, files, record, seconds)

    def hash(self, file: Path) -> str:
        """sha256 of a file, remembered as long as its size and time of change stay."""
        return self._hash([file])[0]

    def _hash(self, files: Sequence[Path]) -> list[str]:
        """The same of several, side by side: checkpoints are tens of gigabytes."""
        memory = self.folder / "hashes.json"
        known: dict[str, list[Any]] = {}
        with contextlib.suppress(FileNotFoundError, ValueError):  # a memory that can't be read is no memory
            known = json.loads(memory.read_text(encoding="utf-8"))
        if not isinstance(known, dict):
            known = {}
        stats = {str(file.resolve()): file.stat() for file in files}
        names = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
        new = [name for name, stamp in names.items() if not _remembered(known.get(name), stamp)]
        if new:
            with ThreadPoolExecutor() as pool:
                found = pool.map(sha256, map(Path, new))
                known |= {name: [*names[name], digest] for name, digest in zip(new, found, strict=True)}
            written = memory.with_name(f"{process.own_prefix()}hashes.json")
            written.write_text(json.dumps(known), encoding="utf-8")
            written.replace(memory)
        return [str(known[str(file.resolve())][2]) for file in files]

    def hashes(self, folder: Path) -> dict[str, str]:
        """Of every file of a checkpoint that a loader may read: weights, configurations, tokenizers.

        Those of its component folders, linked ones too; weights beside them, in one file, are of no concern.
        """
        suffixes = (".safetensors", ".json", ".txt", ".model", ".jinja")
        files = [f for each in visible(folder) if each.is_dir() for f in visible(each)]
        index = [f for f in (folder / "model_index.json",) if f.is_file()]
        wanted = [f for f in (*index, *files) if f.is_file() and f.suffix in suffixes]
        return dict(zip((f.relative_to(folder).as_posix() for f in wanted), self._hash(wanted), strict=True))


def _name(partial: Path, target: Path) -> bool:
    """Give a finished stage its name; False if another export has made the same one meanwhile, which then stays."""
    try:
        partial.rename(target)
        return True
    except OSError:
        if not (target / _RECORD).is_file():
            raise
        shutil.rmtree(partial)
        return False


def _remembered(entry: Any, stamp: Sequence[int]) -> bool:
    return isinstance(entry, list) and len(entry) == len(stamp) + 1 and entry[:-1] == stamp


def _key(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _code() -> str:
    """The stages' own source, and the library's, which they trace and run: another version of it makes other files."""
    digest = hashlib.sha256()
    for file in (f for package in _PACKAGES for f in sorted(package.rglob("*")) if f.suffix in _SOURCES):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _bytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
