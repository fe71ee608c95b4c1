"""What a server of this machine holds on to: memory, shared memory, processes, requests in flight."""

import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

from fluxserve import process
from fluxserve.supervisor import TritonServer

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (looked at)
MIB = 2**20


@dataclass(frozen=True)
class Sample:
    """Bytes at a moment. rss: resident memory of all processes, without what they share through /dev/shm."""

    at: float
    rss: int
    shared: int


@dataclass
class Footprint:
    """Samples of one server; `TritonServer` starts it in a session of its own, whose id is the server's pid."""

    server: TritonServer
    samples: list[Sample] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._session = self.server.pid
        self._prefix = self.server.table.path.name.removesuffix("inflight")
        self.first = self.processes()

    def processes(self) -> dict[int, int]:
        """Start times of the server's processes, by pid."""
        pids = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            fields = _fields(stat)
            if fields and int(fields[3]) == self._session and fields[0] != "Z":
                pids[int(stat.parent.name)] = int(fields[19])
        return pids

    def sample(self) -> None:
        rss = 0
        for pid in self.processes():
            for line in _read(Path(f"/proc/{pid}/status")).splitlines():
                if line.startswith(("RssAnon:", "RssFile:")):
                    rss += 1024 * int(line.split()[1])
        files = (_size(file) for file in _SHARED_MEMORY.glob(f"{self._prefix}*"))
        self.samples.append(Sample(time.monotonic(), rss, sum(files)))

    def restarted(self) -> list[str]:
        """Processes that are gone, or came, since the first look."""
        now = self.processes()
        gone = [f"{pid} is gone" for pid, started in self.first.items() if process.started(pid) != started]
        return gone + [f"{pid} is new" for pid in now.keys() - self.first.keys()]


def growth(values: list[int]) -> tuple[int, int]:
    """Return the medians of the second fifth and of the last fifth, in the order of time."""
    fifth = max(len(values) // 5, 1)
    return int(statistics.median(values[fifth : 2 * fifth] or values)), int(statistics.median(values[-fifth:]))


def _size(file: Path) -> int:
    try:
        return 512 * file.stat().st_blocks
    except FileNotFoundError:  # removed meanwhile
        return 0


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):  # the process ended meanwhile
        return ""


def _fields(stat: Path) -> list[str]:
    """The fields of /proc/PID/stat from the state on."""
    return _read(stat).rpartition(")")[2].split()
