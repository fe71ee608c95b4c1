"""Pixels → a PNG file on the CPU, in strips that are filtered and deflated side by side.

One thread takes several milliseconds for a megapixel, and the request waits for them. A file holds one zlib stream;
each strip of rows is deflated by itself, ended by a sync flush so that the next one begins at a whole byte, and stands
in a chunk of its own. Where strips begin depends on the width alone: a file is the same on any number of cores.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import numpy as np
import numpy.typing as npt
from isal import isal_zlib

from fluxserve.media.png.container import SIGNATURE, ZLIB_HEAD, chunk, end, header

Pixels = npt.NDArray[np.uint8]

_MOST_THREADS = 8
_STRIP_BYTES = 192 * 1024
"""Fits a core's own cache twice, filtered and not; a megapixel has 16 of them, enough to share out."""

_LEVEL = 1
_WINDOW_BITS = 9
"""A window of 512 bytes, the shortest there is: what resembles a row lies above it, and the filter has taken that out.
With 32 KB gradients with grain take 1.4 times as long and a tenth more (benchmarks/results/png-cpu-2026-11-22.txt):
what is found far away is chance, and its distance costs more bits than the bytes that it stands for."""

_UP = 2
_DEFLATE_END = b"\x03\x00"  # an empty last block
_ADLER_BASE = 65521


def encode(pixels: Pixels, texts: bytes = b"") -> bytes:
    """uint8 [height, width, 3] → a PNG file; `texts` are chunks that stand behind its header."""
    height, width, _ = pixels.shape
    rows = np.ascontiguousarray(pixels).reshape(height, -1)
    count = max(1, _STRIP_BYTES // rows.shape[1])
    firsts = range(0, height, count)
    strips = (_pool().map if len(firsts) > 1 else map)(partial(_strip, rows, count), firsts)
    return b"".join(_file(width, height, texts, strips))


def _file(
    width: int, height: int, texts: bytes, strips: Iterator[tuple[bytes, int, int]]
) -> Iterator[bytes | memoryview]:
    """The pieces of the file."""
    yield SIGNATURE
    yield header(height, width)
    yield texts
    yield from chunk(ZLIB_HEAD)
    adler = 1
    for strip, strip_adler, size in strips:
        yield strip
        adler = _adler_of_both(adler, strip_adler, size)
    yield from chunk(_DEFLATE_END, adler.to_bytes(4))
    yield end()


def _strip(rows: Pixels, count: int, first: int) -> tuple[bytes, int, int]:
    """`count` rows from `first` on: their chunk, and the checksum and size of what it holds."""
    filtered = _filtered(rows, first, min(first + count, len(rows)))
    deflate = isal_zlib.compressobj(_LEVEL, isal_zlib.DEFLATED, -_WINDOW_BITS)
    body = deflate.compress(filtered) + deflate.flush(isal_zlib.Z_SYNC_FLUSH)
    return b"".join(chunk(body)), isal_zlib.adler32(filtered), filtered.size


def _filtered(rows: Pixels, first: int, end: int) -> Pixels:
    """Rows, each behind the byte that says how: what differs from the row above. Above the first there is nothing."""
    out = np.empty((end - first, 1 + rows.shape[1]), np.uint8)
    out[:, 0] = _UP
    if first == 0:
        out[0, 1:] = rows[0]
        np.subtract(rows[1:end], rows[: end - 1], out=out[1:, 1:])
    else:
        np.subtract(rows[first:end], rows[first - 1 : end - 1], out=out[:, 1:])
    return out


def _adler_of_both(first: int, second: int, size: int) -> int:
    """Adler-32 of two pieces one after the other, from theirs; `size` is the second's."""
    low = (first & 0xFFFF) + (second & 0xFFFF) - 1
    high = (first >> 16) + (second >> 16) + size * ((first & 0xFFFF) - 1)
    return (high % _ADLER_BASE) << 16 | low % _ADLER_BASE


@cache
def _pool() -> ThreadPoolExecutor:
    """Made when it is first needed, one for the process."""
    return ThreadPoolExecutor(min(_MOST_THREADS, len(os.sched_getaffinity(0))), thread_name_prefix="png")
