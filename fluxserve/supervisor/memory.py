"""How much memory a server holds, and how much it may.

Counted are the private pages of every process of the server and its regions in shared memory, each once. Pages of
files are not: the kernel takes them back when it needs them.
"""

import contextlib
import resource
from collections.abc import Iterable
from pathlib import Path

from fluxserve import process
from fluxserve.errors import ServerError

CGROUP = Path("/sys/fs/cgroup")
_LIMIT_FILES = ("memory.max", "memory/memory.limit_in_bytes")
"""Of cgroups version 2 and version 1, as a container sees its own."""

CGROUP_SHARE = 0.85
"""Of the control group's limit: what a server may hold before it is started again. At all of it the kernel kills."""

_NO_LIMIT = 1 << 60
"""Version 1 writes a number near 2**63 for no limit."""

_BLOCK = 512
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
MIN_LIMIT = 64 * 2**20

BURST = 4 * 2**30
"""What the bundled Triton's own process may allocate beyond what it has when it is ready. One request must not take
all memory of the machine; models' processes are not under this limit."""


def parse(text: str) -> int:
    """Bytes from a number with K, M, G or T behind it, 0 for no limit. Raises ValueError."""
    number, unit = (text[:-1], text[-1].upper()) if text and not text[-1].isdigit() else (text, "")
    if unit not in _UNITS or not number.isdigit():
        raise ValueError(f"got {text!r}; expected bytes, or a number with K, M, G or T behind it; 0: no limit")
    if 0 < (size := int(number) * _UNITS[unit]) < MIN_LIMIT:
        raise ValueError(f"got {text!r}; expected at least {MIN_LIMIT >> 20}M, or 0: no limit")
    return size


def default_limit(root: Path = CGROUP) -> int:
    """A share of the control group's limit, 0 where there is none."""
    for name in _LIMIT_FILES:
        with contextlib.suppress(OSError, ValueError):
            limit = int((root / name).read_text(encoding="ascii"))
            if limit < _NO_LIMIT:
                return int(CGROUP_SHARE * limit)
    return 0


def held(leader: int, regions: Iterable[Path]) -> int:
    """Bytes that the processes of a session and their shared memory hold."""
    pages = sum(_status(pid).get("RssAnon", 0) for pid in process.session(leader))
    for region in regions:
        with contextlib.suppress(FileNotFoundError):
            pages += region.stat().st_blocks * _BLOCK
    return pages


def bound(pid: int, burst: int = BURST) -> int:
    """Limit what a process may allocate to what it has now and `burst` bytes more; returns the limit.

    Raises:
        ServerError: the system refused. A process that ended meanwhile is no error: its end is reported elsewhere.
    """
    limit = _status(pid).get("VmData", 0) + burst
    try:
        resource.prlimit(pid, resource.RLIMIT_DATA, (limit, limit))
    except ProcessLookupError:
        return limit
    except (OSError, ValueError) as error:
        raise ServerError(f"tritonserver's memory can't be limited to {limit >> 20} MiB: {error}") from error
    return limit


def _status(pid: int) -> dict[str, int]:
    """Sizes of a process by their names in /proc/PID/status, bytes; none if the process is gone."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines()
        return {name: 1024 * int(rest.split()[0]) for name, _, rest in map(_split, lines) if rest.endswith(" kB")}
    return {}


def _split(line: str) -> tuple[str, str, str]:
    return line.partition(":")
