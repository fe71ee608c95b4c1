"""Previews of running requests in shared memory: beside the in-flight table, a file for each kind of a request.

`generate` writes a file when somebody has asked for one, and replaces it by a later one. It is gone when the request
ends. `control` reads it. A file is private to its user, is replaced as a whole and begins with its request's ticket, so
that no reader sees half a picture, or another request's.
"""

import os
import struct
from pathlib import Path

from fluxserve.errors import ServerError
from fluxserve.inflight import CAPACITY, PREVIEWS, InflightTable

_HEADER = struct.Struct("<QI")
"""The ticket, and the step that the picture shows."""

_BESIDE = 2**16
"""Of a file of a picture beyond its pixels, at most."""


class Previews:
    """One process's view. Its InflightTable must be its own: one thread may use both at a time."""

    def __init__(self, table: InflightTable) -> None:
        self._table = table

    def put(self, ticket: int, kind: str, step: int, image: bytes, pixels: int) -> None:
        """Keep a picture of a request, in place of an earlier one, if the request still runs.

        Args:
            image: a file of so many `pixels`.

        Raises:
            ServerError: a file larger than its pixels.
            OSError: no room in shared memory.
        """
        if len(image) > 3 * pixels + _BESIDE:
            raise ServerError(f"preview: {len(image)} bytes; at most {3 * pixels + _BESIDE} for {pixels} pixels")
        path = self._path(ticket, kind)
        unfinished = path.with_name(f"{path.name}-unfinished")
        unfinished.unlink(missing_ok=True)  # of a process that was killed
        handle = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_HEADER.pack(ticket, step) + image)
            with self._table.running(ticket) as runs:
                if runs:
                    unfinished.rename(path)
        finally:
            unfinished.unlink(missing_ok=True)

    def get(self, ticket: int, kind: str, after: int) -> tuple[int, bytes]:
        """Return the newest picture of a request and its step, or 0 and nothing if there is none later than `after`."""
        try:
            handle = os.open(self._path(ticket, kind), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return 0, b""
        with os.fdopen(handle, "rb") as file:
            owner, step = _HEADER.unpack(file.read(_HEADER.size))
            return (step, file.read()) if owner == ticket and step > after else (0, b"")

    def drop(self, ticket: int) -> None:
        """Remove the pictures of a request that has ended: its slot was given back."""
        for kind in PREVIEWS:
            self._path(ticket, kind).unlink(missing_ok=True)

    def _path(self, ticket: int, kind: str) -> Path:
        return self._table.path.with_name(f"{self._table.path.name}-{kind}-{ticket % CAPACITY}")
