"""Whether an answer has room in shared memory, through which Triton's Python backend takes it from a model's process.

The backend grows a process's region where an answer does not fit. If /dev/shm is full, it raises; but the response
counts as sent by then, so that the client can't be told why. Hence: look first.
"""

import os
import threading

import c_python_backend_utils  # the stub's own module

from fluxserve.errors import NoRoom

FOLDER = "/dev/shm"  # noqa: S108 (where Triton's Python backend puts its regions)
GROWTH = 2**20
"""A region grows by a multiple of this (shm-growth-byte-size, by default), and by more than is needed."""

OVERHEAD = 2**16
"""Of an answer: its messages, lengths of its elements, the allocator's own."""

SCARCE = 2**28
"""With less than this left, another process may take the room between the look and the answer."""

answering = threading.Lock()
"""To be held from the look to the end of the sending by threads that answer with images, lest two take one room."""


def check(size: int) -> None:
    """Raise NoRoom if an answer of `size` bytes fits neither into the region nor into what the region may grow by."""
    may_grow_by = _free() // GROWTH * GROWTH
    room = max(may_grow_by, c_python_backend_utils.shared_memory.free_memory()) - OVERHEAD
    if size > room:
        raise NoRoom(size, max(0, room))


def is_scarce() -> bool:
    """Whether an answer that has room now may have none in a moment."""
    return _free() < SCARCE


def _free() -> int:
    system = os.statvfs(FOLDER)
    return system.f_bavail * system.f_frsize
