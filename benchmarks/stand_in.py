"""A stand-in for Qwen's tokenizer, which can't be shipped: a word for each byte, special tokens and chat template.

Prompts become more tokens than with the real one; both are padded to the same length, so that speed is the same.
"""

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
