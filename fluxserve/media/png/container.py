"""What a PNG file is made of around its pixels: signature, chunks, the head of a zlib stream (PNG, 3rd edition, §5)."""

import struct
from collections.abc import Iterator

from isal import isal_zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"
ZLIB_HEAD = b"\x78\x01"
_TRUE_COLOUR = (8, 2, 0, 0, 0)  # bits a channel, RGB, deflate, filters by the row, not interlaced


def header(height: int, width: int) -> bytes:
    """The first chunk."""
    return b"".join(chunk(struct.pack(">IIBBBBB", width, height, *_TRUE_COLOUR), kind=b"IHDR"))


def text(keyword: str, value: str) -> bytes:
    """A chunk of text, uncompressed: the XMP packet is always iTXt, other text only where ASCII does not hold it."""
    if value.isascii() and not keyword.startswith("XML:"):
        return b"".join(chunk(f"{keyword}\0{value}".encode(), kind=b"tEXt"))
    uncompressed_in_no_language = b"\0\0\0\0\0"
    return b"".join(chunk(keyword.encode(), uncompressed_in_no_language, value.encode(), kind=b"iTXt"))


def end() -> bytes:
    """The last chunk."""
    return b"".join(chunk(kind=b"IEND"))


def chunk(*parts: bytes | memoryview, kind: bytes = b"IDAT") -> Iterator[bytes | memoryview]:
    """Length, kind, the parts one behind the other, and their checksum: pieces, to be joined once with all others."""
    yield struct.pack(">I", sum(len(part) for part in parts))
    yield kind
    checksum = isal_zlib.crc32(kind)
    for part in parts:
        yield part
        checksum = isal_zlib.crc32(part, checksum)
    yield struct.pack(">I", checksum)
