"""A component's weights before any is loaded: which files hold them, and whether they hold what the module reads.

Names, shapes and dtypes are in the files' headers, so a folder is judged in milliseconds, without torch. A folder has
one set of weights: `BASE.safetensors`, or the shards that `BASE.safetensors.index.json` lists, as diffusers and
transformers write them. A variant (`BASE.fp16.safetensors`) is read only where there is nothing else.
"""

import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fluxserve.errors import CheckpointError, UnsafeWeights
from fluxserve.folders import foreign
from fluxserve.folders.files import read_json, visible
from fluxserve.folders.tensor_list import Shape, TensorList

_FLOATING = ("BF16", "F16", "F32", "F64")
_FEW = 5


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its name there, and its dtype as safetensors spells it."""

    file: Path
    name: str
    dtype: str
    shape: Shape


@dataclass(frozen=True)
class FileSet:
    """The files of one set of weights; `index` is None for a single file."""

    files: tuple[Path, ...]
    variant: str = ""
    index: Path | None = None


@dataclass(frozen=True)
class Weights:
    """The tensors that a module reads of its folder, by their canonical names."""

    folder: Path
    set: FileSet
    listed: TensorList
    tensors: Mapping[str, Stored]

    def find(self, name: str) -> Stored | None:
        """Return a tensor by any of its spellings; None for one that the module does not read."""
        return self.tensors.get(self.listed.canonical(name))


def read(folder: Path, base: str, module: str, listed: TensorList) -> Weights:
    """Look a component's weights over.

    Args:
        base: what the files' names begin with.
        module: its class, for messages.

    Raises:
        CheckpointError: no set of weights or two, a truncated file, or other tensors than the module's.
        UnsafeWeights: only pickles.
    """
    files = file_set(folder, base)
    stored: dict[str, Stored] = {}
    for file in files.files:
        for tensor in _header(file):
            if tensor.name in stored:
                other = stored[tensor.name].file.name
                raise CheckpointError(f"{folder}: {tensor.name} is in {other} and in {file.name}; expected one")
            stored[tensor.name] = tensor
    return Weights(folder, files, listed, _checked(folder, module, stored, listed))


# --- which files -----------------------------------------------------------------------------------------------------


def file_set(folder: Path, base: str) -> FileSet:
    """The one set of weights of a folder. Raises CheckpointError, UnsafeWeights."""
    rest = set(visible(folder, "*.safetensors"))
    sets: list[FileSet] = []
    for index in visible(folder, f"{base}.safetensors.index*.json"):
        shards = _shards(index)
        sets.append(FileSet(tuple(shards), _variant_of_index(index), index))
        rest -= set(shards)
    singles = {file: match[1] or "" for file in rest if (match := _single(base).fullmatch(file.name))}
    sets += [FileSet((file,), variant) for file, variant in singles.items()]
    rest -= set(singles)
    orphans = {file: match for file in rest if (match := _shard(base).fullmatch(file.name))}
    if sets:
        rest -= {file for file, match in orphans.items() if _variant(match)}
        chosen = _chosen(folder, sets)
    elif orphans:
        rest -= set(orphans)
        chosen = _without_index(folder, orphans)
    else:
        chosen = None
    if rest:
        names = _list(sorted(file.name for file in rest))
        raise CheckpointError(f"{folder}: {names} would not be read; expected {base}.safetensors, or its shards, alone")
    return chosen or _nothing(folder, base)


def _single(base: str) -> re.Pattern[str]:
    return re.compile(rf"{base}(?:\.([^.]+))?\.safetensors")


def _shard(base: str) -> re.Pattern[str]:
    """Both libraries write `BASE.VARIANT-00001-of-00002`; older ones wrote the variant behind the number."""
    return re.compile(rf"{base}(?:\.([^.]+?))?-(\d+)-of-(\d+)(?:\.([^.]+))?\.safetensors")


def _variant(shard: re.Match[str]) -> str:
    return shard[1] or shard[4] or ""


def _variant_of_index(index: Path) -> str:
    return index.name.rpartition(".safetensors.index")[2].removesuffix(".json").removeprefix(".")


def _chosen(folder: Path, sets: Sequence[FileSet]) -> FileSet:
    """The set without a variant, or else the only variant. An index alone, without any of its shards, is no set."""
    there = [each for each in sets if any(file.is_file() for file in each.files)] or list(sets)
    plain = [each for each in there if not each.variant] or there
    if len(plain) > 1:
        names = sorted((each.index or each.files[0]).name for each in plain)
        raise CheckpointError(
            f"{folder}: got {len(plain)} sets of weights, {_list(names)}; expected one. Move the others away"
        )
    for file in plain[0].files:
        if (index := plain[0].index) and not file.is_file():
            raise CheckpointError(f"{file}: {foreign.stand_in(file) or 'missing'}; {index.name} lists it")
    return plain[0]


def _without_index(folder: Path, orphans: Mapping[Path, re.Match[str]]) -> FileSet:
    """Shards that no index lists. They are a set if they are all there, as in an artifact."""
    kinds = {(_variant(match), int(match[3])) for match in orphans.values()}
    (variant, total), *others = sorted(kinds)
    if others or {int(match[2]) for match in orphans.values()} != set(range(1, total + 1)):
        names = _list(sorted(file.name for file in orphans))
        raise CheckpointError(f"{folder}: got shards {names} without the others and their index; expected all of them")
    return FileSet(tuple(sorted(orphans)), variant)


def _nothing(folder: Path, base: str) -> FileSet:
    files = [file for file in visible(folder) if file.is_file() or file.is_symlink()] if folder.is_dir() else []
    if pickled := [file for file in files if foreign.is_pickled(file)]:
        raise UnsafeWeights(str(pickled[0]))
    for file in files:
        if file.suffix == ".gguf":
            raise CheckpointError(f"{file}: {foreign.file_as_folder(file)}")
        if file.suffix in (".incomplete", ".part", ".crdownload", ".aria2", ".tmp", ".download"):
            raise CheckpointError(f"{file}: a download that has not finished; expected {base}.safetensors")
    raise CheckpointError(f"{folder}: no weights; expected .safetensors files")


def _shards(index: Path) -> list[Path]:
    """The files that an index lists, which lie beside it or are missing. Raises CheckpointError."""
    listed = read_json(index).get("weight_map")
    shards = sorted({str(name) for name in listed.values()}) if isinstance(listed, dict) else []
    if not shards or any(Path(s).name != s or not s.endswith(".safetensors") for s in shards):
        raise CheckpointError(f"{index}: expected a weight_map of .safetensors files beside it")
    return [index.parent / shard for shard in shards]


# --- what is in them -------------------------------------------------------------------------------------------------


def _header(file: Path) -> list[Stored]:
    """Return the tensors of a safetensors file. The library compares the header with the file's length."""
    try:
        with safe_open(file, framework="np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
            return [Stored(file, name, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()]
    except (OSError, SafetensorError) as error:
        what = foreign.stand_in(file)
        raise CheckpointError(f"{file}: {what or f'not a safetensors file, truncated or damaged ({error})'}") from error


def _checked(folder: Path, module: str, stored: Mapping[str, Stored], listed: TensorList) -> dict[str, Stored]:
    """Return the tensors that are read. Raises CheckpointError for any that is not the module's, or not there."""
    read: dict[str, Stored] = {}
    unexpected = []
    for name, tensor in sorted(stored.items()):
        canonical = listed.canonical(name)
        if canonical not in listed.read:
            unexpected += [] if listed.may_hold(canonical) else [name]
        elif not _same(tensor, other := read.setdefault(canonical, tensor)):
            raise CheckpointError(f"{folder}: {other.name} and {name} differ; {module} reads one tensor by both names")
    if unexpected:
        raise CheckpointError(
            f"{folder}: got {_count(unexpected)} that {module} does not read: {_list(unexpected)}; expected none"
            f"{foreign.whose(unexpected)}"
        )
    for tensor in read.values():
        if tensor.dtype not in _FLOATING:
            got, expected_types = f"{tensor.file}: {tensor.name}: got {tensor.dtype}", ", ".join(_FLOATING)
            raise CheckpointError(f"{got}; expected one of {expected_types}. {foreign.UNQUANTISED}")
    if missing := sorted(set(listed.read) - set(read)):
        raise CheckpointError(f"{folder}: missing {_count(missing)} of {module}: {_list(missing)}")
    for canonical, tensor in read.items():
        if tensor.shape != (expected := listed.read[canonical]):
            got = f"{tensor.file}: {tensor.name}: got {tensor.shape}"
            raise CheckpointError(f"{got}; expected {expected} by config.json")
    return read


def _same(one: Stored, other: Stored) -> bool:
    """Whether two tensors are one, or have the same bytes: libraries write a tied tensor by both of its names."""
    return one is other or ((one.dtype, one.shape) == (other.dtype, other.shape) and _data(one) == _data(other))


def _data(tensor: Stored) -> bytes:
    with tensor.file.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        begin, end = json.loads(file.read(length))[tensor.name]["data_offsets"]
        file.seek(8 + length + begin)
        return file.read(end - begin)


def _count(names: Sequence[str]) -> str:
    return "1 tensor" if len(names) == 1 else f"{len(names)} tensors"


def _list(names: Sequence[str]) -> str:
    few = ", ".join(name[:120] for name in names[:_FEW])
    return f"{few}, …" if len(names) > _FEW else few
