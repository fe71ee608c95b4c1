"""Read the size of a picture in its header: PNG, JPEG and WebP. Nothing is decoded, and no metadata is unpacked.

PNG    8 bytes of signature; the chunk IHDR: length, name, width, height, big-endian
JPEG   segments: a marker ff xx, a length; a frame header (SOF) has height and width behind its precision
WebP   RIFF, length, WEBP; the first chunk is VP8 (a key frame), VP8L (lossless) or VP8X (a canvas)
"""

from __future__ import annotations

import struct

_PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDR"
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF markers; the others are tables
_BARE = frozenset((0x01, *range(0xD0, 0xD9)))  # markers without a length
_SCAN, _END, _FILL = 0xDA, 0xD9, 0xFF
_MAX_SEGMENTS = 4096  # of a JPEG, and bytes of fill; metadata come in segments of 64 KB


def size_of(data: bytes) -> tuple[int, int] | None:
    """Return width and height in pixels; None for a file of another kind, or one whose header is cut off or empty."""
    try:
        if data.startswith(_PNG):
            width, height = struct.unpack_from(">II", data, len(_PNG))
        elif data.startswith(b"\xff\xd8\xff"):
            width, height = _of_jpeg(data)
        elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            width, height = _of_webp(data)
        else:
            return None
    except struct.error:
        return None
    return (width, height) if width and height else None


def _of_jpeg(data: bytes) -> tuple[int, int]:
    at = 2
    for _ in range(_MAX_SEGMENTS):
        at = data.find(b"\xff", at) + 1
        (marker,) = struct.unpack_from("B", data, at or len(data))
        if marker == _FILL:
            continue
        if marker in _FRAMES:
            height, width = struct.unpack_from(">HH", data, at + 4)
            return width, height
        if marker in (_SCAN, _END):
            break
        at += 1 if marker in _BARE or marker == 0 else 1 + struct.unpack_from(">H", data, at + 1)[0]
    return 0, 0


def _of_webp(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = struct.unpack_from("<I", data, 24)[0] & 0xFFFFFF, struct.unpack_from("<I", data, 26)[0] >> 8
        return width + 1, height + 1
    if kind == b"VP8L" and data[20:21] == b"\x2f":
        bits = struct.unpack_from("<I", data, 21)[0]
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    return 0, 0
