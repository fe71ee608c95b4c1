"""A small file in shared memory that every process of one server maps. It begins with its version, four bytes."""

import fcntl
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from fluxserve.errors import ServerError


class SharedFile:
    """A mapped file of fixed size, private to its user.

    The first process to open it makes it. Its pages are reserved then: where there is no room, touching one later
    would end the process by SIGBUS.

    Raises:
        ServerError: no room, or a file of another version.
    """

    def __init__(self, path: Path, size: int, version: int) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with self.locked():
            if os.fstat(self._fd).st_size == 0:
                self._reserve(size)
            if os.fstat(self._fd).st_size != size:
                raise ServerError(f"{path}: {os.fstat(self._fd).st_size} bytes; this version's table has {size}")
            self.map = mmap.mmap(self._fd, size)
            found = np.frombuffer(self.map, "<u4", count=1)
            if found[0] not in (0, version):  # 0: made just now
                raise ServerError(f"{path}: a table of version {found[0]}; expected {version}")
            found[0] = version

    def _reserve(self, size: int) -> None:
        try:
            os.posix_fallocate(self._fd, 0, size)
        except OSError as error:
            self.path.unlink()
            raise ServerError(f"{self.path}: no room for a table of {size} bytes: {error.strerror}") from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the file's lock, which excludes other processes and other SharedFiles of this one."""
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
