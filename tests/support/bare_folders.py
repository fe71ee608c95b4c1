"""Folders without tokenizers whose weights are zeros: all that `checkpoint.read` looks at."""

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from fluxserve.errors import CheckpointError
from fluxserve.folders import checkpoint


def bare(source: Path, target: Path) -> Path:
    """A copy without tokenizers, whose tensors are zeros: sparse files."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer*", "samples"))
    for file in source.glob("*/*.safetensors"):
        with file.open("rb") as opened:
            (size,) = struct.unpack("<Q", begin := opened.read(8))
            header = begin + opened.read(size)
        zeros = target / file.relative_to(source)
        zeros.write_bytes(header)
        os.truncate(zeros, file.stat().st_size)
    return target


def write_header(file: Path, header: object, payload: bytes = b"") -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + payload)


def change(file: Path, **values: Any) -> None:
    config = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in {**config, **values}.items() if v != "remove"}))


def refusal(folder: Path, kind: type[CheckpointError] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        checkpoint.read(folder)
    assert str(folder) in str(caught.value), "the message says where"
    return str(caught.value)
