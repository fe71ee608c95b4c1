"""Stand-ins for tokenizers that can't be shipped, with as many words as the published ones.

Qwen's: a word for each byte, special tokens and chat template. CLIP's and T5's: tiny's, and words that nobody writes.
Prompts become more tokens than with the real ones; both are padded to the same length, so that speed is the same.
"""

import json
from pathlib import Path

from transformers import Qwen2TokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
"""What of Qwen3's template a prompt passes through."""

_ENDS = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}

_PRIVATE_USE = 0xF0000
"""The first of 65,534 characters that Unicode gives no meaning."""
_UNLIKELY = -100.0

QWEN_WORDS = 151643
"""Of the real one, before its special tokens."""


def qwen_tokenizer(words: int = 0) -> Qwen2TokenizerFast:
    """One of at least so many words; those past the bytes are never made of any text."""
    bytes_ = list(bytes_to_unicode().values())
    alphabet = [*bytes_, *(f"[{index}]" for index in range(len(bytes_), words))]
    made = Qwen2TokenizerFast(
        vocab={word: index for index, word in enumerate(alphabet)},
        merges=[],
        additional_special_tokens=["<|im_start|>"],
        **_ENDS,
    )
    made.add_tokens(["<think>", "</think>"])
    made.chat_template = TEMPLATE
    return made


def widen(folder: Path, words: int) -> None:
    """Give a CLIP's or T5's tokenizer, as transformers saves it, so many words."""
    file = folder / "tokenizer.json"
    written = json.loads(file.read_text(encoding="utf-8"))
    known = written["model"]["vocab"]
    more = (chr(_PRIVATE_USE + index) for index in range(len(known), words))
    if isinstance(known, dict):  # of BPE; of Unigram, [word, log probability]
        known |= {word: len(known) + index for index, word in enumerate(more)}
    else:
        known += [[word, _UNLIKELY] for word in more]
    file.write_text(json.dumps(written), encoding="utf-8")
