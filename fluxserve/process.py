"""Processes by pid and start time, what they leave behind, and who ends them. Linux: /proc."""

import contextlib
import os
import re
import shutil
import subprocess
from pathlib import Path

_GRACE_S = 10
"""What a server has to end by itself once nobody watches it any more."""


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


def guard(server: int) -> "subprocess.Popen[bytes]":
    """Start a watcher that ends a server, and all of its session, when this process is gone, killed included.

    It waits for the end of a pipe that this process holds. Kill it once the server has ended as it should.
    """
    script = 'cat >/dev/null; kill -TERM "$1"; sleep "$2"; kill -KILL "-$1"'
    command = ["/bin/sh", "-c", script, "fluxserve-guard", str(server), str(_GRACE_S)]
    silent = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=silent, stderr=silent, start_new_session=True)
