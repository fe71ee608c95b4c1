"""Which files of a folder are weights: shards, variants, stand-ins, hidden companions, and what an export takes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fluxserve.errors import ArtifactDamaged
from fluxserve.folders import checkpoint
from tests.support.folders import copied, weights_of
from tests.support.foreign_folders import (
    BASE,
    ENCODER,
    T5,
    TRANSFORMER,
    a_copy_called,
    pointer,
    refusal,
    same_everywhere,
    shard,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copied(tmp_path / "flux")


@pytest.mark.parametrize("component", [TRANSFORMER, T5])
def test_shards(folder: Path, component: str) -> None:
    shard(folder, component)
    same_everywhere(folder, component)


@pytest.mark.parametrize("component", [TRANSFORMER, ENCODER])
@pytest.mark.parametrize("variant", ["fp16", "bf16", "ema"])
def test_only_a_variant(folder: Path, component: str, variant: str) -> None:
    """There is nothing else that could be meant."""
    file = weights_of(folder, component)
    file.rename(file.with_suffix(f".{variant}.safetensors"))
    same_everywhere(folder, component)


@pytest.mark.parametrize(
    "pattern", ["{base}.fp16-{i:05d}-of-{n:05d}.safetensors", "{base}-{i:05d}-of-{n:05d}.fp16.safetensors"]
)
@pytest.mark.parametrize("component", [TRANSFORMER, T5])
def test_only_a_variant_in_shards(folder: Path, component: str, pattern: str) -> None:
    index = shard(folder, component, f"{pattern}.safetensors")
    index.rename(index.with_name(index.name.replace("index.json", "index.fp16.json")))
    same_everywhere(folder, component)


@pytest.mark.parametrize("leftover", ["", ".fp16"])
def test_an_index_alone_is_no_set(folder: Path, leftover: str) -> None:
    """A download of one variant brings the JSON files of all of them."""
    listed = {"weight_map": {"a": f"{BASE}{leftover}-00001-of-00002.safetensors"}}
    (folder / TRANSFORMER / f"{BASE}.safetensors.index{leftover}.json").write_text(json.dumps(listed))
    file = weights_of(folder, TRANSFORMER)
    if not leftover:
        file.rename(file.with_suffix(".fp16.safetensors"))
    same_everywhere(folder)


def test_an_index_of_the_other_librarys_names(folder: Path) -> None:
    index = shard(folder, TRANSFORMER)
    index.rename(index.with_name("model.safetensors.index.json"))
    assert "shards without their index" in refusal(folder)


def test_a_variant_beside_the_weights_is_not_read(folder: Path) -> None:
    """As diffusers and transformers have it: a variant is read where it is named."""
    file = weights_of(folder, TRANSFORMER)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}
    save_file(zeros, file.with_suffix(".fp16.safetensors"))
    save_file(zeros, file.with_name(f"{BASE}.fp16-00001-of-00002.safetensors"))
    same_everywhere(folder)


def one_file_and_shards(folder: Path) -> None:
    file = weights_of(folder, TRANSFORMER).resolve()
    shard(folder)
    shutil.copy(file, folder / TRANSFORMER / f"{BASE}.safetensors")


def two_variants(folder: Path) -> None:
    file = weights_of(folder, TRANSFORMER)
    for variant in ("fp16", "bf16"):
        shutil.copy(file, file.with_suffix(f".{variant}.safetensors"))
    file.unlink()


def an_older_shard(folder: Path) -> None:
    shard(folder)
    save_file({"a": torch.ones(1)}, folder / TRANSFORMER / f"{BASE}-00003-of-00003.safetensors")


def a_tensor_twice(folder: Path) -> None:
    first, second = sorted(shard(folder).parent.glob("*.safetensors"))
    shutil.copy(first, second)


TWO_SETS = {
    "one file and shards": one_file_and_shards,
    "two variants": two_variants,
    "another file": a_copy_called("flux1-dev.safetensors"),
    "a file of transformers": a_copy_called("model.safetensors"),
    "a LoRA": a_copy_called("pytorch_lora_weights.safetensors"),
    "a shard beside the file": a_copy_called(f"{BASE}-00001-of-00003.safetensors"),
    "a copy of a file manager": a_copy_called(f"{BASE} (1).safetensors"),
    "a shard of an older set": an_older_shard,
    "a tensor in two shards": a_tensor_twice,
}


@pytest.mark.parametrize("kind", TWO_SETS)
def test_two_sets_of_weights(folder: Path, kind: str) -> None:
    TWO_SETS[kind](folder)
    message = refusal(folder)
    assert str(folder / TRANSFORMER) in message and "expected" in message


def test_shards_without_their_index(folder: Path) -> None:
    shard(folder).unlink()
    assert "shards without their index; expected a .safetensors.index.json" in refusal(folder)
    next((folder / TRANSFORMER).glob("*-00001-of-*")).unlink()
    assert "without the others and their index" in refusal(folder)


def test_an_index_without_its_shards(folder: Path) -> None:
    index = shard(folder)
    for file in index.parent.glob("*.safetensors"):
        file.unlink()
    assert "missing" in refusal(folder) and index.name in refusal(folder)


@pytest.mark.parametrize("kind", ["lfs", "annex", "page", "nothing"])
@pytest.mark.parametrize(
    "name", [f"transformer/{BASE}.safetensors", "text_encoder/model.safetensors", "vae/config.json", "model_index.json"]
)
def test_stand_ins(folder: Path, kind: str, name: str) -> None:
    (folder / name).unlink()
    (folder / name).write_bytes(pointer(kind))
    message = refusal(folder)
    words = {"lfs": "git lfs pull", "annex": "git annex get", "page": "a web page", "nothing": "an empty file"}
    assert str(folder / name) in message and words[kind] in message


@pytest.mark.parametrize("name", [f"transformer/{BASE}.safetensors", "vae/config.json", "model_index.json"])
def test_links_into_nothing(folder: Path, name: str) -> None:
    """A snapshot of a hub cache, copied without its blobs."""
    (folder / name).unlink()
    (folder / name).symlink_to("../../blobs/0123456789abcdef")
    assert "a link to ../../blobs/0123456789abcdef, which is not there" in refusal(folder)


@pytest.mark.parametrize("suffix", [".gguf", ".incomplete", ".aria2", ".crdownload", ".bin"])
def test_no_safetensors_at_all(folder: Path, suffix: str) -> None:
    weights_of(folder, TRANSFORMER).unlink()
    (folder / TRANSFORMER / f"{BASE}{suffix}").write_bytes(b"x")
    message = refusal(folder)
    assert f"{BASE}{suffix}" in message


HIDDEN = [
    "._{}",
    ".{}",
    ".DS_Store",
    ".gitattributes",
    ".cache/huggingface/download/{}",
    ".ipynb_checkpoints/{}",
    "__MACOSX/._{}",
    ".nfs0.safetensors",
]


@pytest.mark.parametrize("hidden", HIDDEN)
def test_hidden_companions_are_no_weights(folder: Path, hidden: str) -> None:
    for file in (*folder.glob("*/*"), folder / "model_index.json"):
        companion = file.parent / hidden.format(file.name)
        companion.parent.mkdir(parents=True, exist_ok=True)
        companion.write_bytes(b"Mac OS X        \x00\x05\x16\x07")
    same_everywhere(folder)


# --- what an export takes along --------------------------------------------------------------------------------------


def test_an_export_takes_no_hidden_companions(folder: Path, tmp_path: Path) -> None:
    from fluxserve_export.assemble import _copy_configurations, _link_weights

    shard(folder, T5)
    file = weights_of(folder, ENCODER)
    file.rename(file.with_suffix(".fp16.safetensors"))
    for place in (*folder.glob("*/*"), folder / "model_index.json"):
        place.with_name(f"._{place.name}").write_bytes(b"x")
    _copy_configurations(folder, tmp_path / "copy")
    _link_weights(checkpoint.read(folder), tmp_path / "copy")
    assert not [entry for entry in (tmp_path / "copy").rglob("*") if entry.name.startswith(".")]
    same_everywhere(tmp_path / "copy", T5)
    same_everywhere(tmp_path / "copy", ENCODER)


def test_hidden_companions_in_an_artifact(tmp_path: Path) -> None:
    from fluxserve.folders import artifact
    from tests.support import artifacts

    path = artifacts.write(tmp_path / "artifact")
    for place in ("checkpoint/.DS_Store", "checkpoint/vae/._config.json", "checkpoint/.cache/x"):
        (path / place).parent.mkdir(exist_ok=True)
        (path / place).write_bytes(b"x")
    assert artifact.read(path)
    (path / "checkpoint" / "more.json").write_bytes(b"x")
    with pytest.raises(ArtifactDamaged, match=r"more\.json: not listed"):
        artifact.read(path)
