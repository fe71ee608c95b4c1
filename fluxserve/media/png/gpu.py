"""A picture on a GPU → a PNG file: one block of deflate, with a Huffman code made for this picture (RFC 1951, 3.2.7).

The GPU filters, counts and packs (kernels/image/png_stream.py); the host makes the code from 300 counts in between.
Only the file crosses over, half as large as the picture or less, and no thread of the CPU has to deflate it.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fluxserve.kernels.image.png_stream import LENGTH_SHIFT, RUN, SYMBOLS, pack, symbols_of
from fluxserve.media.png import huffman
from fluxserve.media.png.container import SIGNATURE, ZLIB_HEAD, chunk, end, header

_END = 256
_ADLER_BASE = 65521
_LAST_OF_DYNAMIC = 0b101  # the stream's last block, with a code of its own
_LITERALS = 257
_LENGTHS, _LENGTH_BITS = 16, 4  # lengths of codes are written in 4 bits each: 0 to 15 are as likely to deflate
_NIBBLES = [huffman.reversed_bits(length, _LENGTH_BITS) for length in range(_LENGTHS)]
_ORDER_BEFORE_LENGTHS = 3  # three symbols for repetitions come first, and are not used
_RUN_EXTRA, _RUN_EXTRA_BITS, _DISTANCE_BITS = 5, 3, 1  # of 59 to 66 bytes, 64; and distance 1, the only one, is a 0
_WORD = 32


class _Bits:
    """Bits, the first lowest."""

    def __init__(self) -> None:
        self.value, self.count = 0, 0

    def put(self, value: int, count: int) -> None:
        self.value |= value << self.count
        self.count += count


def encode(pixels: Tensor, texts: bytes = b"") -> bytes:
    """uint8 [height, width, 3], contiguous, on a GPU → a PNG file. Waits for the GPU twice: for counts, for bits.

    `texts` are chunks that stand behind the file's header; the host puts them there.
    """
    height, width, _ = pixels.shape
    symbols, counted = symbols_of(pixels)
    *counts, total, weighted = counted.tolist()
    counts[_END] = 1
    lengths = huffman.lengths(counts[: RUN + 1])
    table, head = _table(lengths), _head(lengths)
    used = head.count + sum(count * (code >> LENGTH_SHIFT) for count, code in zip(counts, table, strict=True))
    used -= table[_END] >> LENGTH_SHIFT
    body = _body(symbols, table, head, used)
    size = height * (1 + 3 * width)
    adler = (size + weighted) % _ADLER_BASE << 16 | (1 + total) % _ADLER_BASE
    stream = chunk(ZLIB_HEAD, body.data, adler.to_bytes(4))
    return b"".join([SIGNATURE, header(height, width), texts, *stream, end()])


def _table(lengths: list[int]) -> list[int]:
    """What `pack` takes; a run's code goes on with which length and distance it means."""
    codes = huffman.codes(lengths)
    table = [code | length << LENGTH_SHIFT for code, length in zip(codes, lengths, strict=True)]
    if own := lengths[RUN]:
        more = _RUN_EXTRA_BITS + _DISTANCE_BITS
        table[RUN] = codes[RUN] | _RUN_EXTRA << own | (own + more) << LENGTH_SHIFT
    return table + [0] * (SYMBOLS - len(table))


def _head(lengths: list[int]) -> _Bits:
    """The block's: how many symbols there are, and how long the code of each is; one distance, of one bit."""
    bits = _Bits()
    bits.put(_LAST_OF_DYNAMIC, 3)
    for value, count in ((len(lengths) - _LITERALS, 5), (0, 5), (_LENGTHS - 1, 4)):
        bits.put(value, count)
    for length in [0] * _ORDER_BEFORE_LENGTHS + [_LENGTH_BITS] * _LENGTHS:
        bits.put(length, 3)
    nibbles = [_NIBBLES[length] for length in (*lengths, _DISTANCE_BITS)]  # of an even number
    pairs = bytes(low | high << _LENGTH_BITS for low, high in zip(nibbles[::2], nibbles[1::2], strict=True))
    bits.put(int.from_bytes(pairs, "little"), 8 * len(pairs))
    return bits


def _body(symbols: Tensor, table: list[int], head: _Bits, used: int) -> npt.NDArray[np.uint8]:
    """The whole block: its head, all symbols' codes up to bit `used`, and the end's."""
    begun = np.frombuffer(head.value.to_bytes(-(-head.count // _WORD) * _WORD // 8, "little"), np.int32)
    given = torch.from_numpy(np.concatenate([np.array(table, np.int32), begun])).to(symbols.device)
    words = torch.zeros(used // _WORD + 3, dtype=torch.int32, device=symbols.device)
    words[: len(begun)] = given[SYMBOLS:]
    pack(symbols, given[:SYMBOLS], words, head.count)
    packed = torch.empty(len(words), dtype=torch.int32, pin_memory=words.is_cuda).copy_(words).numpy().view(np.uint8)
    code, length = table[_END] & ((1 << LENGTH_SHIFT) - 1), table[_END] >> LENGTH_SHIFT
    last = (code << used % 8).to_bytes(4, "little")
    packed[used // 8 : used // 8 + len(last)] |= np.frombuffer(last, np.uint8)
    return packed[: -(-(used + length) // 8)]
