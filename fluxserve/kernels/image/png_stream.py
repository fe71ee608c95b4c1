"""A picture on the GPU → what a PNG's deflate stream says, and its bits: filter, count, then pack with a code.

    residual = x − Paeth(left, up, up-left)              of each byte; a row begins with the byte that names this filter
    symbol   = residual, or for 64 zeros behind a zero RUN and 63 times NONE (a match of length 64 at distance 1)
    stream   = the symbols' codes, one behind the other, the lowest bit of a word first

A symbol's place depends on all that stand before it. Here each is found by a sum over lengths, and codes are added to
the words where they lie: no two share a bit, so the order of the additions does not matter. What is found far away in a
photograph is chance, so that runs are all the matches there are; files are as large as zlib's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PAETH = 4
RUN, RUN_LENGTH, NONE = 276, 64, 511
"""Deflate's symbol for matches of 59 to 66 bytes; and of positions that a match has swallowed."""
SYMBOLS = 512
LENGTH_SHIFT = 24
"""A table's entry: the bits of a symbol's code, and from here on how many they are."""

_BLOCK = 1 << 12
_WORD_BITS = 32


@triton.jit
def _residual(pixels, i, size, width, PAETH: tl.constexpr):
    """Byte `i` of the filtered picture, int32; 0 beyond its `size` bytes. Rows are `width` bytes and the filter's."""
    row, column = i // (width + 1), i % (width + 1) - 1
    inside = (i >= 0) & (i < size) & (column >= 0)
    place = pixels + row * width + column
    x = tl.load(place, mask=inside, other=0).to(tl.int32)
    left = tl.load(place - 3, mask=inside & (column >= 3), other=0).to(tl.int32)
    up = tl.load(place - width, mask=inside & (row > 0), other=0).to(tl.int32)
    corner = tl.load(place - width - 3, mask=inside & (row > 0) & (column >= 3), other=0).to(tl.int32)
    to_left, to_up = tl.abs(up - corner), tl.abs(left - corner)
    to_corner = tl.abs(left + up - 2 * corner)
    nearest = tl.where(to_up <= to_corner, up, corner)
    nearest = tl.where((to_left <= to_up) & (to_left <= to_corner), left, nearest)
    return tl.where((column < 0) & (i < size), PAETH, (x - nearest) & 255)


@triton.jit
def _symbols_kernel(
    pixels,
    symbols,
    counts,
    size,
    width,
    PAETH: tl.constexpr,
    RUN: tl.constexpr,
    RUN_LENGTH: tl.constexpr,
    NONE: tl.constexpr,
    SYMBOLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    begin = tl.program_id(0) * BLOCK
    i = begin + tl.arange(0, BLOCK)
    residual = _residual(pixels, i, size, width, PAETH)
    tl.atomic_add(counts + SYMBOLS, tl.sum(residual.to(tl.int64), axis=0), sem="relaxed")
    weighted = tl.where(i < size, size - i, 0).to(tl.int64) * residual
    tl.atomic_add(counts + SYMBOLS + 1, tl.sum(weighted, axis=0), sem="relaxed")
    group = tl.reshape(residual, [BLOCK // RUN_LENGTH, RUN_LENGTH])
    first = begin + tl.arange(0, BLOCK // RUN_LENGTH) * RUN_LENGTH
    before = _residual(pixels, first - 1, size, width, PAETH)
    run = (tl.max(group, axis=1) == 0) & (before == 0) & (first > 0) & (first + RUN_LENGTH <= size)
    place = tl.arange(0, RUN_LENGTH)[None, :]
    found = tl.where(run[:, None], tl.where(place == 0, RUN, NONE), group)
    found = tl.where(first[:, None] + place < size, found, NONE)
    tl.store(symbols + first[:, None] + place, found.to(tl.int16))
    seen = tl.histogram(tl.reshape(found, [BLOCK]), SYMBOLS)
    tl.atomic_add(counts + tl.arange(0, SYMBOLS), seen.to(tl.int64), mask=seen > 0, sem="relaxed")


@triton.jit
def _lengths_kernel(symbols, table, lengths, LENGTH_SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    symbol = tl.load(symbols + block * BLOCK + tl.arange(0, BLOCK)).to(tl.int32)
    tl.store(lengths + block, tl.sum(tl.load(table + symbol) >> LENGTH_SHIFT, axis=0))


@triton.jit
def _pack_kernel(
    symbols, table, ends, lengths, words, start, LENGTH_SHIFT: tl.constexpr, WORD: tl.constexpr, BLOCK: tl.constexpr
):
    block = tl.program_id(0)
    symbol = tl.load(symbols + block * BLOCK + tl.arange(0, BLOCK)).to(tl.int32)
    code = tl.load(table + symbol)
    length = code >> LENGTH_SHIFT
    place = start + tl.load(ends + block) - tl.load(lengths + block) + tl.cumsum(length, axis=0) - length
    bits = (code & ((1 << LENGTH_SHIFT) - 1)).to(tl.int64) << (place % WORD).to(tl.int64)
    low, high = bits.to(tl.int32), (bits >> WORD).to(tl.int32)
    tl.atomic_add(words + place // WORD, low, mask=low != 0, sem="relaxed")
    tl.atomic_add(words + place // WORD + 1, high, mask=high != 0, sem="relaxed")


def symbols_of(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Filter and count.

    Args:
        pixels: uint8 [height, width, 3], contiguous.

    Returns:
        symbols: int16 [height · (1 + 3·width), and NONE up to whole blocks].
        counts: int64 [SYMBOLS + 2]: how many there are of each; then, for Adler-32 of the n filtered bytes d, the sum
            of d and that of (n − i) · d[i].
    """
    height, width = pixels.shape[0], pixels.shape[1] * pixels.shape[2]
    size = height * (1 + width)
    blocks = triton.cdiv(size, _BLOCK)
    symbols = torch.empty(blocks * _BLOCK, dtype=torch.int16, device=pixels.device)
    counts = torch.zeros(SYMBOLS + 2, dtype=torch.int64, device=pixels.device)
    constants = {"PAETH": PAETH, "RUN": RUN, "RUN_LENGTH": RUN_LENGTH, "NONE": NONE, "SYMBOLS": SYMBOLS}
    _symbols_kernel[(blocks,)](pixels, symbols, counts, size, width, **constants, BLOCK=_BLOCK, num_warps=8)
    return symbols, counts


def pack(symbols: Tensor, table: Tensor, words: Tensor, start: int) -> None:
    """Write codes, from bit `start` on.

    Args:
        symbols: int16, whole blocks, from `symbols_of`.
        table: int32 [SYMBOLS], see LENGTH_SHIFT; 0 for NONE.
        words: int32, zero from `start` on, with room for all codes and a word more.
    """
    blocks = len(symbols) // _BLOCK
    lengths = torch.empty(blocks, dtype=torch.int32, device=symbols.device)
    _lengths_kernel[(blocks,)](symbols, table, lengths, LENGTH_SHIFT=LENGTH_SHIFT, BLOCK=_BLOCK, num_warps=8)
    ends = lengths.cumsum(0, dtype=torch.int32)
    constants = {"LENGTH_SHIFT": LENGTH_SHIFT, "WORD": _WORD_BITS, "BLOCK": _BLOCK}
    _pack_kernel[(blocks,)](symbols, table, ends, lengths, words, start, **constants, num_warps=8)


def plain_symbols_of(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The same, plainly."""
    x = pixels.int()
    left, up, corner = (torch.zeros_like(x) for _ in range(3))
    left[:, 1:], up[1:], corner[1:, 1:] = x[:, :-1], x[:-1], x[:-1, :-1]
    to_left, to_up, to_corner = ((left + up - corner - near).abs() for near in (left, up, corner))
    nearest = torch.where(to_up <= to_corner, up, corner)
    nearest = torch.where((to_left <= to_up) & (to_left <= to_corner), left, nearest)
    filtered = ((x - nearest) & 255).flatten(1)
    stream = torch.cat([torch.full_like(filtered[:, :1], PAETH), filtered], dim=1).flatten().long()
    symbols = torch.full((triton.cdiv(len(stream), _BLOCK) * _BLOCK,), NONE, device=x.device)
    symbols[: len(stream)] = stream
    groups = symbols.view(-1, RUN_LENGTH)
    zeros = torch.ones_like(groups[:, 0], dtype=torch.bool)
    zeros[1:] = groups[:-1, -1] == 0
    zeros[0] = False
    zeros &= (groups == 0).all(1)
    groups[zeros] = torch.tensor([RUN] + [NONE] * (RUN_LENGTH - 1), device=x.device)
    weights = torch.arange(len(stream), 0, -1, device=x.device)
    sums = torch.stack([stream.sum(), (stream * weights).sum()])
    return symbols.to(torch.int16), torch.cat([torch.bincount(symbols, minlength=SYMBOLS), sums])


def plain_pack(symbols: Tensor, table: Tensor, words: Tensor, start: int) -> None:
    """The same, plainly."""
    codes = table[symbols.int()].long()
    lengths = codes >> LENGTH_SHIFT
    places = start + lengths.cumsum(0) - lengths
    bits = (codes & ((1 << LENGTH_SHIFT) - 1)) << (places % _WORD_BITS)
    for beyond, part in enumerate((bits & (1 << _WORD_BITS) - 1, bits >> _WORD_BITS)):
        whole = torch.zeros(len(words) + 1, dtype=torch.int64, device=words.device)
        whole.index_add_(0, places // _WORD_BITS + beyond, part)
        words += whole[:-1].to(torch.int32)
