"""Prompt → token ids, with the checkpoint's own two tokenizers, of the classes that its model_index.json names.

CLIP reads at most 77 tokens and gives the pooled embedding; T5 reads the longer sequence that the blocks attend to.
Both are padded to their full length and neither is masked: FLUX.1 was trained so (FluxPipeline._get_t5_prompt_embeds).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import transformers

from fluxserve.checkpoint import Checkpoint
from fluxserve.errors import CheckpointError, UnsupportedArchitecture
from fluxserve.spec import EncoderSpec

_CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast", "T5Tokenizer", "T5TokenizerFast", "PreTrainedTokenizerFast")

Ids = npt.NDArray[np.int64]


class Tokenizers:
    """The tokenizers of a checkpoint, loaded from its folder alone."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._tokenizers = [(encoder, _load(checkpoint, encoder)) for encoder in checkpoint.spec.text.encoders]

    def __call__(self, prompt: str) -> Mapping[str, Ids]:
        """Name of a text encoder → its ids, int64 [tokens]."""
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
    try:
        tokenizer = getattr(transformers, class_name).from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: no usable tokenizer ({error})") from error
    # Without its files transformers makes a tokenizer that knows nothing; a foreign one would name unknown embeddings.
    if not vocabulary / 2 < len(tokenizer) <= vocabulary:
        got = f"{len(tokenizer)} words for an encoder that knows {vocabulary}"
        raise CheckpointError(f"{folder}: no usable tokenizer ({got})")
    return tokenizer


def _encode(tokenizer: Any, prompt: str, encoder: EncoderSpec) -> Ids:
    ids = tokenizer(prompt, padding="max_length", max_length=encoder.tokens, truncation=True)["input_ids"]
    return np.asarray(ids, dtype=np.int64)
