"""The two tokenizers, trained on the captions alone, and tokenised captions.

T5's is a Unigram model over words marked with "▁", as SentencePiece marks them; a letter it has never seen
becomes <unk>. CLIP's is byte-level BPE with every byte in its vocabulary, so it reads any UTF-8 text.
"""

import json
import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as tokenizer_models
from torch import Tensor
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from training.grammar import FILLERS, SIZES, Picture, caption, training_pairs
from training.models import T5_TOKENS

_CHARACTERS = "▁abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"()-/&+*#%=@_"
_CLIP_MERGES = 760
_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"


def corpus(seed: int = 0) -> list[str]:
    """Captions of every training pair in every size, and the filler words by themselves."""
    rng = random.Random(seed)  # noqa: S311
    pictures = (Picture(*pair, size) for pair in training_pairs() for size in SIZES for _ in range(2))
    return [caption(picture, rng) for picture in pictures] + list(FILLERS) * 20


def make_t5_tokenizer(captions: Iterable[str]) -> PreTrainedTokenizerFast:
    """A Unigram tokenizer of the captions' words and of single characters: <pad> 0, </s> 1, <unk> 2.

    A word scores its log frequency and a character less than any word, so that a known word is one token
    and an unknown one is spelt. (With so few words, pruning a large seed vocabulary would split the nouns.)
    """
    normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    splitter = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation(behavior="isolated")])
    counts = Counter(word for text in captions for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    total = sum(counts.values())
    pieces = {word: math.log(n / total) for word, n in sorted(counts.items())}
    spelt = {c: -20.0 for c in _CHARACTERS if c not in pieces}
    inner = Tokenizer(
        tokenizer_models.Unigram([(t, 0.0) for t in ("<pad>", "</s>", "<unk>")] + [*pieces.items(), *spelt.items()], 2)
    )
    inner.normalizer, inner.pre_tokenizer, inner.decoder = normalizer, splitter, decoders.Metaspace()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=512, **names)


def make_clip_tokenizer(captions: Iterable[str]) -> CLIPTokenizer:
    """Train the BPE tokenizer: all bytes, the merges, then the two markers, as in CLIP's own vocabulary."""
    reference = CLIPTokenizer().backend_tokenizer  # for CLIP's normaliser and word pattern
    inner = Tokenizer(tokenizer_models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    inner.normalizer, inner.pre_tokenizer = reference.normalizer, reference.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) * 2 + _CLIP_MERGES,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    inner.train_from_iterator(captions, trainer)
    learnt = sorted(inner.get_vocab(), key=inner.get_vocab().__getitem__)
    tokens = dict.fromkeys([*alphabet, *(f"{a}</w>" for a in alphabet), *learnt, _BOS, _EOS])
    merges = [tuple(pair) for pair in _merges(inner)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def _merges(tokenizer: Tokenizer) -> list[Sequence[str]]:
    return list(json.loads(tokenizer.to_str())["model"]["merges"])


def tokenise(
    tokenizer: PreTrainedTokenizerFast | CLIPTokenizer, captions: list[str], length: int = T5_TOKENS
) -> Tensor:
    """Token ids, padded and cut to ``length``: int16 [N, length].

    CLIP reads causally up to its end marker, so padding it to 32 instead of 77 changes nothing.
    """
    ids = tokenizer(captions, padding="max_length", max_length=length, truncation=True)["input_ids"]
    return torch.tensor(ids, dtype=torch.int16)
