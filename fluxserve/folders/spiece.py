"""A sentencepiece model (`spiece.model`) → its pieces, as T5's tokenizer is made of them.

The file is a protobuf message (sentencepiece_model.proto): field 1 is a piece (1: text, 2: float score), field 3 the
normaliser (2: its compiled table of characters). Read here in thirty lines, because the library's own reader wants
another version of protobuf than Triton's client does.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fluxserve.errors import CheckpointError
from fluxserve.folders import foreign

NAME = "spiece.model"
_PIECE, _NORMALIZER = 1, 3
_TEXT, _SCORE, _TABLE = 1, 2, 2
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5


@dataclass(frozen=True)
class Pieces:
    """scored: every piece and its logarithmic probability, in the order of ids; table: of the normaliser, or empty."""

    scored: list[tuple[str, float]]
    table: bytes


def read(file: Path) -> Pieces:
    """Raises CheckpointError."""
    try:
        model = list(_fields(file.read_bytes()))
        pieces = [dict(_fields(value)) for field, value in model if field == _PIECE]
        scored = [(piece[_TEXT].decode(), struct.unpack("<f", piece[_SCORE])[0]) for piece in pieces]
        tables = [dict(_fields(value)).get(_TABLE, b"") for field, value in model if field == _NORMALIZER]
    except (OSError, ValueError, LookupError, struct.error) as error:
        raise CheckpointError(f"{file}: {foreign.stand_in(file) or f'no sentencepiece model ({error})'}") from error
    if not scored:
        raise CheckpointError(f"{file}: no sentencepiece model (it has no pieces)")
    return Pieces(scored, tables[0] if tables else b"")


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and content of a protobuf message's fields; of varints the content is empty, because none is needed."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind, size = key & 7, {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}.get(key & 7, 0)
        if kind == _VARINT:
            _, at = _varint(message, at)
        elif kind == _BYTES:
            size, at = _varint(message, at)
        elif not size:
            raise ValueError(f"wire type {kind} at byte {at}")
        if at + size > len(message):
            raise ValueError(f"truncated at byte {at}")
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """The number that begins at a byte, and the byte behind it."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
