"""Text chunks of a PNG, taken out before it is decoded.

Programs keep their workflows there, megabytes long. Pillow unpacks them with the header and refuses a picture with much
text, because of bombs. Here none is unpacked, so that its size doesn't matter.
"""

import struct
import zlib

from fluxserve.media.png.container import SIGNATURE

_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_ORIENTED = (b"Raw profile type exif\0", b"Raw profile type APP1\0", b"XML:com.adobe.xmp\0")
"""Keywords of texts that may hold an orientation. Pillow reads them, within its own limits."""

_HEAD = struct.Struct(">I4s")
_MAX_PROFILE = 1 << 20
"""Bytes, unpacked; Pillow's own limit."""


def without_texts(data: bytes) -> bytes:
    """The same file without its texts, and without a colour profile too large for Pillow; other data as it is."""
    if not data.startswith(SIGNATURE):
        return data
    kept, begin, at = [], 0, len(SIGNATURE)
    while at + _HEAD.size <= len(data):
        length, kind = _HEAD.unpack_from(data, at)
        end = at + _HEAD.size + length + 4  # and the checksum
        if kind == b"IEND" or end > len(data):
            break
        body = memoryview(data)[at + _HEAD.size : end - 4]
        if (kind in _TEXTS and not bytes(body[:32]).startswith(_ORIENTED)) or (kind == b"iCCP" and _is_large(body)):
            kept.append(memoryview(data)[begin:at])
            begin = end
        at = end
    return b"".join([*kept, memoryview(data)[begin:]]) if kept else data


def _is_large(profile: memoryview) -> bool:
    """Whether an iCCP chunk (a name, NUL, a method, zlib) unpacks to more than Pillow takes; no more is unpacked."""
    packed = bytes(profile).partition(b"\0")[2][1:]
    try:
        return len(zlib.decompressobj().decompress(packed, _MAX_PROFILE + 1)) > _MAX_PROFILE
    except zlib.error:
        return False
