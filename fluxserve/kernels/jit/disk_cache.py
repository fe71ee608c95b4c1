"""Compiled code, kept on disk: a file each, named by everything that it was made of.

A folder that can't be read or written costs the compiling at every start, and a line in the log.
"""

import hashlib
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from fluxserve import settings

log = logging.getLogger(__name__)

KERNELS = "kernels"


def folder(kind: str) -> Path:
    """Return where one kind of compiled code is kept."""
    return settings.cache_folder() / kind


def place(stem: str, suffix: str, made_of: Sequence[bytes]) -> Path:
    """Where what is made of these parts is kept; parts that only look alike when put together have other places."""
    digest = hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in made_of)).hexdigest()
    return folder(KERNELS) / f"{stem}-{digest}{suffix}"


def once(file: Path, make: Callable[[], bytes]) -> bytes:
    """What `place` has; made now, and kept, if it is not there."""
    content = find(file)
    if content is None:
        content = make()
        keep(file, content)
    return content


def find(file: Path) -> bytes | None:
    """What is kept there, if it can be read."""
    try:
        return file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        log.warning("%s can't be read: %s", file.name, error)
        return None


def keep(file: Path, content: bytes) -> None:
    """Keep it, if that can be."""
    try:
        write(file, content)
    except OSError as error:
        log.warning("%s is made at every start: %s", file.name, error)


def write(file: Path, content: bytes) -> None:
    """Whole or not at all, whoever else is writing it. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = tempfile.NamedTemporaryFile(dir=file.parent, delete=False)  # noqa: SIM115 (it becomes the file)
    try:
        with partial:
            partial.write(content)
        Path(partial.name).replace(file)
    except BaseException:
        Path(partial.name).unlink(missing_ok=True)
        raise
