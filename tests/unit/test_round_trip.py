"""A folder that the pinned diffusers and transformers load and save again is the same model."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file

from fluxserve.engines.torch_eager import load_module
from fluxserve.errors import CheckpointError
from fluxserve.families.registry import architectures
from fluxserve.folders import checkpoint, spiece
from fluxserve.folders.checkpoint import Checkpoint
from fluxserve.settings import default_checkpoint
from fluxserve.text import Tokenizers
from tests.support import random_flux2
from tests.support.folders import TINY, change, copied

PROMPTS = ("a red fox, on a blue background!", "", "  e\u0301 🦊 x\n\ty  ", "</s> ﬁne ①②", "a" * 700)

FOLDERS: Mapping[str, tuple[Callable[[], Path], type[Any]]] = {
    "tiny": (default_checkpoint, diffusers.FluxPipeline),
    "klein, tied embeddings": (lambda: random_flux2.klein().folder, diffusers.Flux2KleinPipeline),
    "klein, a head of its own": (lambda: random_flux2.klein(tied=False).folder, diffusers.Flux2KleinPipeline),
    "FLUX.2-dev": (lambda: random_flux2.dev().folder, diffusers.Flux2Pipeline),
}
"""Every kind of folder that is served."""

SAVED: Mapping[str, Mapping[str, Any]] = {
    "as it is": {},
    "as a variant": {"variant": "fp16"},
    "in shards": {"max_shard_size": "300KB"},
    "a variant in shards": {"variant": "bf16", "max_shard_size": "300KB"},
}


def saved_again(source: Path, cls: type[Any], target: Path, how: Mapping[str, Any]) -> Path:
    if cls is diffusers.Flux2Pipeline:  # the processor that its index names wants torchvision
        source = copied(target.with_name("plain"), source)
        change(source / "model_index.json", tokenizer=["transformers", "PreTrainedTokenizerFast"])
    pipe = cls.from_pretrained(source, local_files_only=True)
    pipe.save_pretrained(target, **how)
    return target


def tokens(read: Checkpoint, prompt: str) -> list[np.ndarray]:
    return [array for read_by in Tokenizers(read)(prompt).values() for array in (read_by.ids, read_by.mask)]


CASES = [
    (kind, how) for kind in FOLDERS for how in SAVED if kind == "tiny" or how in ("as it is", "a variant in shards")
]


@pytest.mark.parametrize(("kind", "how"), CASES)
def test_loaded_and_saved_again(tmp_path: Path, kind: str, how: str) -> None:
    make, cls = FOLDERS[kind]
    was = checkpoint.read(make())
    read = checkpoint.read(saved_again(make(), cls, tmp_path / "again", SAVED[how]))
    assert read.spec == was.spec
    for prompt in PROMPTS:
        pairs = zip(tokens(read, prompt), tokens(was, prompt), strict=True)
        assert all(np.array_equal(ours, theirs) for ours, theirs in pairs)
    for name in architectures(was.spec):
        ours, theirs = (load_module(each, name, "cpu", torch.float32).state_dict() for each in (read, was))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_twice(tmp_path: Path) -> None:
    """What the second saving makes of the first one's is read as well."""
    once = saved_again(TINY, diffusers.FluxPipeline, tmp_path / "once", {})
    assert checkpoint.read(saved_again(once, diffusers.FluxPipeline, tmp_path / "twice", {}))


# --- tokenizers in other files ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentencepiece model, trained as T5's was: ids of padding, end and unknown, and its normaliser."""
    folder = tmp_path_factory.mktemp("spiece")
    text = (Path(__file__).parents[2] / "export/src/fluxserve_export/prompts.txt").resolve()
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "spiece"),
        vocab_size=1200,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc",
        minloglevel=2,
        **ids,
    )
    return folder / "spiece.model"


def with_pieces(target: Path, pieces: Path, class_name: str = "T5Tokenizer", config: bool = True) -> Checkpoint:
    """The tiny model whose T5 tokenizer is a sentencepiece model alone."""
    folder = copied(target)
    shutil.rmtree(folder / "tokenizer_2")
    (folder / "tokenizer_2").mkdir()
    shutil.copy(pieces, folder / "tokenizer_2" / spiece.NAME)
    if config:
        said = {"tokenizer_class": class_name, "extra_ids": 100, "model_max_length": 512, "eos_token": "</s>"}
        (folder / "tokenizer_2" / "tokenizer_config.json").write_text(json.dumps(said))
    change(folder / "model_index.json", tokenizer_2=["transformers", class_name])
    read = checkpoint.read(folder)
    size = sentencepiece.SentencePieceProcessor(model_file=str(pieces)).get_piece_size()
    return replace(read, spec=replace(read.spec, text=read.spec.text.changed("t5", vocabulary=size + 128)))


@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize("class_name", ["T5Tokenizer", "T5TokenizerFast", "TokenizersBackend"])
def test_a_sentencepiece_model_alone(tmp_path: Path, pieces: Path, class_name: str, config: bool) -> None:
    """Its ids are the library's own, and those of the tokenizer.json that transformers makes of it."""
    read = with_pieces(tmp_path / "flux", pieces, class_name, config)
    judge = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    length = read.spec.text.named("t5").tokens
    for prompt in (p for p in PROMPTS if "</s>" not in p):
        expected = [*judge.encode(prompt)[: length - 1], 1]
        expected += [0] * (length - len(expected))
        assert Tokenizers(read)(prompt)["t5"].ids.tolist() == expected


def test_the_same_as_its_tokenizer_json(tmp_path: Path, pieces: Path) -> None:
    from fluxserve.text import _of_pieces

    read = with_pieces(tmp_path / "flux", pieces)
    folder = read.component("tokenizer_2")
    before = [Tokenizers(read)(prompt)["t5"].ids for prompt in (*PROMPTS, "<extra_id_0> x <pad>")]
    _of_pieces(folder).save_pretrained(folder)
    assert (folder / "tokenizer.json").is_file()
    (folder / spiece.NAME).unlink()
    after = [Tokenizers(read)(prompt)["t5"].ids for prompt in (*PROMPTS, "<extra_id_0> x <pad>")]
    assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"", "an empty file"),
        (b"\x0a\xff\xff\xff\xff\x0fx", "no sentencepiece model"),
        (b"\x0a\x80", "no sentencepiece model"),
        (b"\x0b\x0b", "no sentencepiece model"),
        (b"\x12\x00", "no sentencepiece model"),
    ],
)
def test_a_damaged_sentencepiece_model(tmp_path: Path, pieces: Path, content: bytes, words: str) -> None:
    read = with_pieces(tmp_path / "flux", pieces)
    (read.component("tokenizer_2") / spiece.NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"tokenizer_2.*{words}"):
        Tokenizers(read)


def test_clips_tokenizer_as_published(tmp_path: Path) -> None:
    """FLUX.1's folders have a vocabulary and merges, and no tokenizer.json."""
    folder = copied(tmp_path / "flux")
    whole = folder / "tokenizer" / "tokenizer.json"
    model = json.loads(whole.read_text())["model"]
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    whole.unlink()
    for prompt in PROMPTS:
        ours, theirs = (Tokenizers(checkpoint.read(each))(prompt)["clip"].ids for each in (folder, TINY))
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("component", ["tokenizer", "tokenizer_2"])
def test_a_tokenizers_file_that_is_a_pointer(tmp_path: Path, component: str, name: str) -> None:
    folder = copied(tmp_path / "flux")
    (folder / component / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(CheckpointError, match=f"{component}/{name}: a Git LFS pointer"):
        Tokenizers(checkpoint.read(folder))


def test_the_shards_are_real(tmp_path: Path) -> None:
    folder = saved_again(TINY, diffusers.FluxPipeline, tmp_path / "again", SAVED["a variant in shards"])
    files = sorted((folder / "transformer").glob("*.safetensors"))
    assert len(files) > 1 and all(".bf16" in file.name for file in files) and load_file(files[0])
