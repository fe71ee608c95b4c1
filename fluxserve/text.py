"""Prompt → token ids, with the checkpoint's own two tokenizers. No torch.

CLIP reads at most 77 tokens and gives the pooled embedding; T5 reads the longer sequence that the blocks attend to.
Both are padded to their full length and neither is masked: FLUX.1 was trained so (FluxPipeline._get_t5_prompt_embeds).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import AutoTokenizer

from fluxserve.checkpoint import Checkpoint
from fluxserve.errors import CheckpointError
from fluxserve.spec import TextSpec

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TokenIds:
    """clip: int64 [clip_tokens]; t5: int64 [t5_tokens]."""

    clip: Ids
    t5: Ids


class Tokenizers:
    """Both tokenizers of a checkpoint, loaded from its folder alone."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._lengths: TextSpec = checkpoint.spec.text
        self._clip = _load(checkpoint, "tokenizer")
        self._t5 = _load(checkpoint, "tokenizer_2")

    def __call__(self, prompt: str) -> TokenIds:
        return TokenIds(
            clip=_encode(self._clip, prompt, self._lengths.clip_tokens),
            t5=_encode(self._t5, prompt, self._lengths.t5_tokens),
        )


def _load(checkpoint: Checkpoint, name: str) -> Any:
    folder = checkpoint.component(name)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: missing; expected a tokenizer")
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: no usable tokenizer ({error})") from error


def _encode(tokenizer: Any, prompt: str, length: int) -> Ids:
    ids = tokenizer(prompt, padding="max_length", max_length=length, truncation=True)["input_ids"]
    return np.asarray(ids, dtype=np.int64)
