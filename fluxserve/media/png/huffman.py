"""Huffman's codes as deflate wants them (RFC 1951): at most 15 bits, given by their lengths alone."""

import heapq
from collections.abc import Sequence

LONGEST = 15


def lengths(counts: Sequence[int]) -> list[int]:
    """Bits of each symbol's code, 0 for one that does not occur. At least two must.

    Where the best code has longer ones, rare symbols are taken for less rare, as bzip2 does it.
    """
    while max(found := _best(counts)) > LONGEST:
        counts = [(count + 1) // 2 for count in counts]
    return found


def _best(counts: Sequence[int]) -> list[int]:
    """Join the two rarest until all are one; a symbol's code is as long as it was joined often."""
    heap = [(count, symbol) for symbol, count in enumerate(counts) if count]
    heapq.heapify(heap)
    parent: dict[int, int] = {}
    joined = len(counts)
    while len(heap) > 1:
        one = heapq.heappop(heap)
        other = heap[0]
        parent[one[1]] = parent[other[1]] = joined
        heapq.heapreplace(heap, (one[0] + other[0], joined))
        joined += 1
    depth = {joined - 1: 0}
    for node in range(joined - 2, len(counts) - 1, -1):
        depth[node] = depth[parent[node]] + 1
    return [depth[parent[symbol]] + 1 if count else 0 for symbol, count in enumerate(counts)]


def codes(lengths: Sequence[int]) -> list[int]:
    """Each symbol's code, its first bit lowest: shorter codes first, equal ones in the symbols' order."""
    found, code, last = [0] * len(lengths), -1, 0
    for length, symbol in sorted((length, symbol) for symbol, length in enumerate(lengths) if length):
        code = (code + 1) << (length - last)
        found[symbol], last = reversed_bits(code, length), length
    return found


def reversed_bits(value: int, count: int) -> int:
    return int(format(value, f"0{count}b")[::-1], 2)
