"""Keep the page's files, uploads and pictures, in a private folder that ends with the gateway."""

from __future__ import annotations

import re
import secrets
import tempfile
import threading
from collections import OrderedDict
from pathlib import Path

_NAME = re.compile(r"[0-9a-f]{32}")


class Shelf:
    """Files under names that nobody can guess. Where there is no room, the oldest go first."""

    def __init__(self, most: int) -> None:
        """`most`: bytes of all files together."""
        self._most = most
        self._folder = tempfile.TemporaryDirectory(prefix="fluxserve-page-")  # mode 700
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return Path(self._folder.name)

    def put(self, data: bytes) -> str:
        """Keep a file; return its name."""
        name = secrets.token_hex(16)
        with self._lock:
            while self._sizes and sum(self._sizes.values()) + len(data) > self._most:
                oldest, _ = self._sizes.popitem(last=False)
                (self.folder / oldest).unlink()
            (self.folder / name).write_bytes(data)
            self._sizes[name] = len(data)
        return name

    def get(self, name: str) -> bytes | None:
        """Return a file; None if there is none of this name, or it had to go."""
        with self._lock:
            return (self.folder / name).read_bytes() if _NAME.fullmatch(name) and name in self._sizes else None

    def __contains__(self, name: object) -> bool:
        return name in self._sizes

    def close(self) -> None:
        """Remove the folder."""
        self._folder.cleanup()
