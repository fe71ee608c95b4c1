"""Processes by pid and start time, and what they leave behind. Linux: /proc, prctl."""

import contextlib
import ctypes
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_STUB_PARENT = 5
"""Position of the server's pid: stub, model.py, shared memory's name, its size, its growth, the pid, …"""


def started(pid: int) -> int:
    """When a process was started, in clock ticks since boot, 0 if there is none: tells a pid used again apart."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    fields = stat.rpartition(")")[2].split()
    return 0 if fields[0] == "Z" else int(fields[19])


def prefix(pid: int) -> str:
    """How the names of a process's files begin, so that `remove_leftovers` knows whose they are."""
    return f"fluxserve-{pid}-{started(pid)}-"


def own_prefix() -> str:
    return prefix(os.getpid())


def remove_leftovers(*folders: Path) -> None:
    """Remove files and folders of processes that were killed, and so could not clean up.

    The start time is part of the name because in a container every supervisor has the same pid.
    """
    for left in (file for folder in folders for file in folder.glob("fluxserve-*")):
        name = re.fullmatch(r"fluxserve-(\d+)-(\d+)-.*", left.name)
        if name and started(int(name[1])) != int(name[2]):
            with contextlib.suppress(PermissionError, FileNotFoundError):  # another user's, or gone already
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


def end_with_parent() -> None:
    """End this process, from a thread that watches, when its parent is gone: Triton's stubs miss it while they load."""
    parent = _parent_of_stub(Path("/proc/self/cmdline").read_bytes().split(b"\0")) or os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


def _parent_of_stub(command: list[bytes]) -> int | None:
    """The server's pid as a stub's command line has it: the stub may be an orphan by the time it runs Python."""
    if len(command) > _STUB_PARENT and command[0].endswith(b"triton_python_backend_stub"):
        return int(command[_STUB_PARENT]) if command[_STUB_PARENT].isdigit() else None
    return None


def die_with_parent() -> None:
    """For a child, before exec: get SIGTERM when the parent's thread ends, so that no server is orphaned."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
