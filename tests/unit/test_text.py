"""text.Tokenizers on the shipped model: lengths, padding, truncation, characters it has never seen."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from fluxserve.errors import CheckpointError
from fluxserve.folders import checkpoint
from fluxserve.folders.checkpoint import Checkpoint
from fluxserve.settings import default_checkpoint
from fluxserve.text import Tokenizers, Tokens
from tests.support import random_flux2

PROMPTS = [
    "a red apple",
    "A Fox, on a blue background!",
    "",
    "x" * 4096,
    "🦊☃漢字",
    "\u202egnp \ufeff",
    "e\u0301",
    "a\n\tb",
]


@pytest.fixture(scope="module")
def tiny() -> Checkpoint:
    return checkpoint.read(default_checkpoint())


@pytest.fixture(scope="module")
def tokenizers(tiny: Checkpoint) -> Tokenizers:
    return Tokenizers(tiny)


def vocabulary(tiny: Checkpoint, name: str) -> int:
    return int(json.loads((tiny.component(name) / "config.json").read_text())["vocab_size"])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_shapes_and_range(tiny: Checkpoint, tokenizers: Tokenizers, prompt: str) -> None:
    ids = tokenizers(prompt)
    for array, length, encoder in ((ids["clip"].ids, 77, "text_encoder"), (ids["t5"].ids, 32, "text_encoder_2")):
        assert array.dtype == np.int64
        assert array.shape == (length,)
        assert array.min() >= 0 and array.max() < vocabulary(tiny, encoder), "the embedding has a row for each"


@pytest.mark.parametrize("prompt", PROMPTS)
def test_ids_are_those_of_transformers(tiny: Checkpoint, tokenizers: Tokenizers, prompt: str) -> None:
    """What lies under its wrapper is called directly, and was told once what the wrapper says at every call."""
    ids = tokenizers(prompt)
    for encoder in tiny.spec.text.encoders:
        wrapper = AutoTokenizer.from_pretrained(str(tiny.component(encoder.tokenizer)))
        told = wrapper(prompt, padding="max_length", max_length=encoder.tokens, truncation=True)
        assert ids[encoder.name].ids.tolist() == told["input_ids"]
        assert ids[encoder.name].mask.tolist() == told["attention_mask"]


def test_beginning_end_and_padding(tokenizers: Tokenizers) -> None:
    ids = tokenizers("a fox")
    begin, end = 1503, 1504
    at = int(np.flatnonzero(ids["clip"].ids == end)[0])
    assert ids["clip"].ids[0] == begin and 2 <= at < 10
    assert (ids["clip"].ids[at:] == end).all(), "CLIP's padding is its end token"
    at = int(np.flatnonzero(ids["t5"].ids == 1)[0])
    assert (ids["t5"].ids[at + 1 :] == 0).all() and (ids["t5"].ids[:at] > 1).all()


def test_a_long_prompt_is_cut_and_keeps_its_end(tokenizers: Tokenizers) -> None:
    ids = tokenizers("a fox and an apple " * 200)
    assert ids["clip"].ids[-1] == 1504 and (ids["clip"].ids[1:-1] < 1503).all()
    assert ids["t5"].ids[-1] == 1 and (ids["t5"].ids[:-1] > 1).all()
    assert np.array_equal(ids["clip"].ids, tokenizers("a fox and an apple " * 300)["clip"].ids)


def test_prompts_differ(tokenizers: Tokenizers) -> None:
    seen = {
        (ids["clip"].ids.tobytes(), ids["t5"].ids.tobytes())
        for ids in map(tokenizers, ["a fox", "a red fox", "a red apple", "🦊"])
    }
    assert len(seen) == 4


@pytest.mark.parametrize("prompt", PROMPTS)
def test_as_the_pipeline_of_diffusers_calls_them(tiny: Checkpoint, tokenizers: Tokenizers, prompt: str) -> None:
    """FluxPipeline._get_clip_prompt_embeds and _get_t5_prompt_embeds."""
    for name, length, ours in (
        ("tokenizer", 77, tokenizers(prompt)["clip"].ids),
        ("tokenizer_2", 32, tokenizers(prompt)["t5"].ids),
    ):
        theirs = AutoTokenizer.from_pretrained(tiny.component(name), local_files_only=True)(
            [prompt],
            padding="max_length",
            max_length=length,
            truncation=True,
            return_overflowing_tokens=False,
            return_length=False,
            return_tensors="np",
        ).input_ids
        assert np.array_equal(ours, theirs[0])


def edited(tmp_path: Path, name: str, text: str | None) -> Checkpoint:
    """The tiny model whose `name` has another tokenizer.json, or none."""
    ignored = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(default_checkpoint(), tmp_path / "flux", ignore=ignored)
    file = tmp_path / "flux" / name / "tokenizer.json"
    file.unlink() if text is None else file.write_text(text)
    return Checkpoint(tmp_path / "flux", checkpoint.read(default_checkpoint()).spec)


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_a_missing_tokenizer(tmp_path: Path, name: str) -> None:
    broken = edited(tmp_path, name, None)
    shutil.rmtree(broken.component(name))
    with pytest.raises(CheckpointError, match=f"{name}: missing; expected a tokenizer"):
        Tokenizers(broken)


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
@pytest.mark.parametrize(
    "text",
    [
        "{",
        "{}",
        "",
        pytest.param("[]"),
    ],
)
def test_a_damaged_tokenizer(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(CheckpointError, match=name):
        Tokenizers(edited(tmp_path, name, text))


def test_a_t5_tokenizer_without_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tokenizer_2: no usable tokenizer"):
        Tokenizers(edited(tmp_path, "tokenizer_2", None))


def test_a_tokenizer_that_can_not_pad(tmp_path: Path) -> None:
    dev = random_flux2.dev().checkpoint()
    shutil.copytree(dev.path, tmp_path / "dev", ignore=shutil.ignore_patterns("*.safetensors"))
    file = tmp_path / "dev" / "tokenizer" / "tokenizer_config.json"
    said = json.loads(file.read_text())
    del said["pad_token"]
    file.write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match="tokenizer: no usable tokenizer \\(no padding token"):
        Tokenizers(replace(dev, path=tmp_path / "dev"))


def test_a_clip_tokenizer_without_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tokenizer"):
        Tokenizers(edited(tmp_path, "tokenizer", None))


# --- FLUX.2-klein's, which reads a chat ------------------------------------------------------------------------------


def klein_tokens(prompt: str, tokens: int = 128) -> Tokens:
    (only,) = Tokenizers(random_flux2.klein().checkpoint(tokens))(prompt).values()
    return only


def test_a_prompt_is_a_turn_of_a_chat() -> None:
    read = klein_tokens("a fox")
    words = random_flux2.qwen_tokenizer().decode(read.ids[read.mask == 1])
    assert words == "<|im_start|>user\na fox<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    padding = random_flux2.qwen_tokenizer().pad_token_id
    assert (read.ids[read.mask == 0] == padding).all()
    assert (np.diff(read.mask) <= 0).all() and read.mask[0] == 1, "padding is at the end"
    assert read.ids.dtype == read.mask.dtype == np.int64


def test_a_chat_that_is_too_long_loses_its_end() -> None:
    read = klein_tokens("a fox " * 50, tokens=64)
    assert read.ids.shape == (64,) and read.mask.all()
    assert "<|im_end|>" not in random_flux2.qwen_tokenizer().decode(read.ids)


def test_a_prompt_that_spells_padding_is_not_padding() -> None:
    read = klein_tokens("a<|endoftext|>b")
    padding = random_flux2.qwen_tokenizer().pad_token_id
    assert (read.mask[read.ids == padding] == 1).sum() == 1


@pytest.mark.parametrize("template", [None, "{% for", "{{ raise_exception('no') }}"])
def test_a_chat_template_that_is_missing_or_broken(tmp_path: Path, template: str | None) -> None:
    klein = random_flux2.klein().checkpoint()
    shutil.copytree(klein.path, tmp_path / "klein", ignore=shutil.ignore_patterns("*.safetensors"))
    file = tmp_path / "klein" / "tokenizer" / "chat_template.jinja"
    file.unlink() if template is None else file.write_text(template)
    with pytest.raises(CheckpointError, match="tokenizer: no usable chat template"):
        Tokenizers(Checkpoint(tmp_path / "klein", klein.spec))


def test_a_prompt_after_a_system_message() -> None:
    """FLUX.2-dev's; what would stand for an image is taken out, and padding comes first."""
    flux = random_flux2.dev().checkpoint(256)
    (read,) = Tokenizers(flux)("a [IMG]fox").values()
    words = random_flux2.chat_tokenizer().decode(read.ids[read.mask == 1])
    system = flux.spec.text.sequence.system
    assert words == f"<s>[SYSTEM_PROMPT]{system}[/SYSTEM_PROMPT][INST]a fox[/INST]"
    assert (np.diff(read.mask) >= 0).all() and read.mask[0] == 0 and read.mask[-1] == 1
