"""Where a checkpoint is: home, a hub cache, one level beside, and what is no checkpoint at all."""

import os
import shutil
from pathlib import Path

import pytest

from fluxserve.errors import UnsafeWeights
from fluxserve.folders import checkpoint
from tests.support.folders import copied, weights_of
from tests.support.foreign_folders import BASE, TRANSFORMER, refusal, same_everywhere


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copied(tmp_path / "flux")


# --- where the checkpoint is -----------------------------------------------------------------------------------------


def test_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert checkpoint.read(Path("~/flux")).path == folder
    assert "no such folder" in refusal(Path("~/elsewhere"))
    assert "~nobody-of-that-name" in refusal(Path("~nobody-of-that-name/flux"))


def test_a_folder_that_is_called_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    copied(tmp_path / "~" / "flux")
    assert checkpoint.read(Path("~/flux"))


@pytest.fixture
def cache(folder: Path) -> Path:
    """A hub's cache of one model: its files are links to blobs."""
    cached = folder.parent / "hub" / "models--org--flux"
    snapshot = cached / "snapshots" / "0a1b"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    (cached / "blobs").mkdir()
    for number, file in enumerate(f for f in snapshot.rglob("*") if f.is_file()):
        blob = cached / "blobs" / str(number)
        shutil.copy(file, blob)
        file.unlink()
        file.symlink_to(os.path.relpath(blob, file.parent))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0a1b")
    return cached


@pytest.mark.parametrize("below", ["", "snapshots", "snapshots/0a1b"])
def test_a_hub_cache(cache: Path, below: str) -> None:
    same_everywhere(cache / below)
    assert checkpoint.read(cache / below).path == cache / "snapshots" / "0a1b"


def test_a_hub_cache_with_several_snapshots(cache: Path) -> None:
    (cache / "snapshots" / "ffff").mkdir()
    assert checkpoint.read(cache).path.name == "0a1b", "main is what the hub's client would take"
    (cache / "refs" / "main").unlink()
    assert "got snapshots 0a1b, ffff; expected one" in refusal(cache)


def test_the_whole_hub_cache(cache: Path) -> None:
    assert f"It is a hub cache. Give the folder of one model: {cache}" in refusal(cache.parent)


@pytest.mark.parametrize(
    ("below", "words"),
    [
        ("..", "Give that folder"),
        ("transformer", "It is a part of"),
        ("tokenizer", "It is a part of"),
        ("model_index.json", "Give its folder"),
        (f"transformer/{BASE}.safetensors", "from_single_file"),
    ],
)
def test_one_level_beside(folder: Path, below: str, words: str) -> None:
    message = refusal(folder / below)
    assert words in message and str(folder) in message


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("flux1-dev-Q4_K_S.gguf", "GGUF"),
        ("flux1-dev.safetensors", "from_single_file"),
        ("flux1-dev.ckpt", "pickled"),
        ("pytorch_model.bin", "pickled"),
        ("flux.zip", "Unpack it"),
        ("flux.tar.gz", "Unpack it"),
        ("notes", "a file"),
    ],
)
def test_a_file_as_checkpoint(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    assert words in refusal(tmp_path / name)
    if "." in name and not name.endswith(("zip", "gz")):
        assert name in refusal(tmp_path), "and the folder that holds nothing else"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ((), "The folder is empty"),
        ((".gitattributes",), "The folder is empty"),
        (("manifest.json",), "--artifact"),
        (("adapter_config.json", "adapter_model.safetensors"), "LoRA"),
        (("config.json", f"{BASE}.safetensors"), "one component"),
        (("README.md",), "missing"),
    ],
)
def test_folders_of_something_else(tmp_path: Path, files: tuple[str, ...], words: str) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    assert words in refusal(tmp_path)


@pytest.mark.parametrize(
    "path", ["black-forest-labs/FLUX.1-dev", "https://huggingface.co/black-forest-labs/FLUX.1-dev", "hf://org/flux"]
)
def test_a_name_is_not_downloaded(path: str) -> None:
    assert "Nothing is downloaded: `hf download" in refusal(Path(path))


def test_pickles_alone_are_unsafe(folder: Path) -> None:
    file = weights_of(folder, TRANSFORMER)
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(UnsafeWeights):
        checkpoint.read(folder)
