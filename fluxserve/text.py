"""Prompt → token ids, with the checkpoint's own tokenizers, of the classes that its model_index.json names.

CLIP reads at most 77 tokens and gives the pooled embedding; T5 reads the longer sequence that the blocks attend to.
Both are padded to their full length and neither is masked: FLUX.1 was trained so (FluxPipeline._get_t5_prompt_embeds).

FLUX.2-klein's Qwen3 reads the prompt as what a user said in a chat, with an empty thought as the answer's beginning
(Flux2KleinPipeline._get_qwen3_prompt_embeds). It is told which tokens are padding. Words of a prompt that spell a
special token become it; one that is too long is cut, and with it what the chat says after it. FLUX.2-dev's Mistral
reads a system message before it, and begins no answer (Flux2Pipeline._get_mistral_3_small_prompt_embeds).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from jinja2 import TemplateError

from fluxserve.errors import CheckpointError, UnsupportedArchitecture
from fluxserve.folders import foreign, spiece
from fluxserve.folders.checkpoint import Checkpoint
from fluxserve.folders.files import in_ascii, read_json, visible
from fluxserve.request import Tokens
from fluxserve.spec import EncoderSpec

_PROCESSOR, _IMAGE = "PixtralProcessor", "[IMG]"
_CLASSES = (
    *("CLIPTokenizer", "CLIPTokenizerFast", "T5Tokenizer", "T5TokenizerFast"),
    *("Qwen2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend", _PROCESSOR),
)

_READ = (".json", ".txt", ".model", ".jinja")
"""What the names of a tokenizer's files end in."""
_EXTRA_IDS = 100
"""Words of T5 for spans that were masked in training, behind the pieces of its sentencepiece model."""


class Tokenizers:
    """The tokenizers of a checkpoint, loaded from its folder alone."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._tokenizers = [(encoder, _load(checkpoint, encoder)) for encoder in checkpoint.spec.text.encoders]

    def __call__(self, prompt: str) -> Mapping[str, Tokens]:
        """By the name of the text encoder."""
        return {encoder.name: _encode(tokenizer, prompt, encoder) for encoder, tokenizer in self._tokenizers}


def _load(checkpoint: Checkpoint, encoder: EncoderSpec) -> Any:
    name, vocabulary = encoder.tokenizer, encoder.vocabulary
    folder = checkpoint.component(name)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: missing; expected a tokenizer")
    class_name = checkpoint.class_name(name)
    if class_name not in _CLASSES:
        raise UnsupportedArchitecture(
            f"{checkpoint.path / 'model_index.json'}: {name}", class_name, ", ".join(_CLASSES)
        )
    tokenizer = _open(folder, class_name)
    # Without its files transformers makes a tokenizer that knows nothing; a foreign one would name unknown embeddings.
    if not vocabulary / 2 < len(tokenizer) <= vocabulary:
        got = f"{len(tokenizer)} words for an encoder that knows {vocabulary}"
        raise CheckpointError(f"{folder}: no usable tokenizer ({got})")
    if getattr(tokenizer, "backend_tokenizer", None) is None or tokenizer.pad_token_id is None:
        raise CheckpointError(f"{folder}: no usable tokenizer (no padding token, or not one of the library tokenizers)")
    _pad(tokenizer, encoder.tokens)
    try:
        _encode(tokenizer, "", encoder)
    except (ValueError, TemplateError) as error:
        raise CheckpointError(f"{folder}: no usable chat template ({error})") from error
    return tokenizer


def _open(folder: Path, class_name: str) -> Any:
    """The tokenizer in a folder. Raises CheckpointError."""
    if class_name == _PROCESSOR:  # words need no more of it than its tokenizer; the rest would want torchvision
        class_name = "AutoTokenizer"
    for file in visible(folder):
        if file.suffix in _READ and (what := foreign.stand_in(file)):
            raise CheckpointError(f"{file}: {what}")
    try:
        if (folder / spiece.NAME).is_file() and not (folder / "tokenizer.json").is_file():
            return _of_pieces(folder)
        with in_ascii(folder) as path:
            return getattr(transformers, class_name).from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # the libraries' own: OSError, ValueError, or a bare Exception out of Rust
        raise CheckpointError(f"{folder}: no usable tokenizer ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    """What a library says, without the advice of many lines that follows."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _of_pieces(folder: Path) -> Any:
    """T5's tokenizer out of its sentencepiece model, with the words beside it that a picture has no use for."""
    file = folder / "tokenizer_config.json"
    config = read_json(file) if file.is_file() else {}
    pieces, extra = spiece.read(folder / spiece.NAME), config.get("extra_ids", _EXTRA_IDS)
    extras = [(f"<extra_id_{index}>", 0.0) for index in reversed(range(extra))]
    return transformers.T5Tokenizer(
        vocab=[*pieces.scored, *extras],
        _spm_precompiled_charsmap=pieces.table or None,
        extra_ids=extra,
        **{name: config[name] for name in ("eos_token", "unk_token", "pad_token") if isinstance(config.get(name), str)},
    )


def _pad(tokenizer: Any, length: int) -> None:
    """Have what lies under transformers' wrapper cut and pad to a length, once: the wrapper sets it anew for each
    prompt, and takes longer about that than tokenizing does."""
    backend, side = tokenizer.backend_tokenizer, tokenizer.padding_side
    backend.enable_truncation(length, direction=tokenizer.truncation_side)
    backend.enable_padding(
        direction=side,
        length=length,
        pad_id=tokenizer.pad_token_id,
        pad_token=tokenizer.pad_token,
        pad_type_id=tokenizer.pad_token_type_id,
    )


def _encode(tokenizer: Any, prompt: str, encoder: EncoderSpec) -> Tokens:
    if encoder.system:
        said = {"system": encoder.system, "user": prompt.replace(_IMAGE, "")}
        turns = [{"role": role, "content": [{"type": "text", "text": words}]} for role, words in said.items()]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False)
    elif encoder.layers:
        turn = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    read = tokenizer.backend_tokenizer.encode(prompt, add_special_tokens=not encoder.layers)  # a chat has its own
    return Tokens(np.asarray(read.ids, np.int64), np.asarray(read.attention_mask, np.int64))
