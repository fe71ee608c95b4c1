"""Processes by pid and start time, what they leave behind, and who ends them. Linux: /proc."""

import contextlib
import os
import re
import shutil
import subprocess
from pathlib import Path

_GRACE_S = 10
"""What a server has to end by itself once nobody watches it any more."""


_STATE, _SESSION, _STARTED = 0, 3, 19
"""Fields of /proc/PID/stat, counted from the one behind the name."""


def _stat(pid: int | str) -> list[str]:
    """The fields of a process, none if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # gone, or hidden: another user's
        return []
    return text.rpartition(")")[2].split()


def started(pid: int) -> int:
    """When a process was started, in clock ticks since boot, 0 if there is none: tells a pid used again apart."""
    fields = _stat(pid)
    return int(fields[_STARTED]) if fields and fields[_STATE] != "Z" else 0


def stopped(pid: int) -> bool:
    """Whether a signal or a debugger has stopped a process."""
    fields = _stat(pid)
    return bool(fields) and fields[_STATE] in "Tt"


def session(leader: int) -> list[int]:
    """The processes of a session."""
    stats = ((int(folder.name), _stat(folder.name)) for folder in Path("/proc").glob("[0-9]*"))
    return [pid for pid, fields in stats if fields and fields[_STATE] != "Z" and int(fields[_SESSION]) == leader]


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


def guard(server: int) -> "subprocess.Popen[bytes]":
    """Start a watcher that ends a server, and all of its session, when this process is gone, killed included.

    It waits for the end of a pipe that this process holds. Kill it once the server has ended as it should.
    """
    script = 'cat >/dev/null; kill -TERM "$1"; sleep "$2"; kill -KILL "-$1"'
    command = ["/bin/sh", "-c", script, "fluxserve-guard", str(server), str(_GRACE_S)]
    silent = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=silent, stderr=silent, start_new_session=True)
