"""The models' processes: which there are, and whether each of them gets on with its work.

A small file in shared memory beside the in-flight table. Each process has an entry, which it alone writes from the
moment it begins to load; the supervisor reads. Times are CLOCK_MONOTONIC.

A process proves two things. A thread beats four times a second, which takes the interpreter's lock: a process that is
stopped, starved or stuck in native code with the lock held falls silent. And while a batch is drawn, progress must
come within the time that the process itself has promised, because a thread beats on beside a GPU that hangs.
"""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fluxserve import process
from fluxserve.errors import ServerError
from fluxserve.shared_file import SharedFile

MAX_PROCESSES = 256
"""Model instances of one server."""

BEAT_S = 0.25
SILENCE_S = 15.0
"""Without a beat a process hangs. Longer than a collection of a large heap, or a burst on a busy machine."""

LOADING_SILENCE_S = 120.0
"""While a model loads: libraries hold the interpreter's lock for long, CUDA's first call above all."""

STOPPED_SILENCE_S = 0.7
"""Of a process that /proc calls stopped. Triton itself gives a stub up that is stopped for a second, and answers its
requests with INTERNAL."""

LOADING, LOADED = 0, 1

_VERSION = 2
_HEADER = np.dtype([("version", "<u8")], align=True)
_ENTRY = np.dtype(
    [
        ("pid", "<u8"),
        ("started", "<u8"),
        ("beat_ns", "<u8"),
        ("progress_ns", "<u8"),
        ("promised_ns", "<u8"),
        ("stage", "<u8"),
        ("picture_ns", "<u8"),  # what a picture takes this process; 0: it draws none, or has not said
        ("model", "S32"),
    ],
    align=True,
)


Entries = npt.NDArray[np.void]


class ProcessTable:
    """One process's view of the entries."""

    def __init__(self, path: Path, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self.path, self._clock_ns = path, clock_ns
        file = SharedFile(path, _HEADER.itemsize + MAX_PROCESSES * _ENTRY.itemsize, _VERSION)
        self._locked = file.locked
        self._entries = np.frombuffer(file.map, _ENTRY, count=MAX_PROCESSES, offset=_HEADER.itemsize)

    @classmethod
    def beside(cls, inflight: Path) -> "ProcessTable":
        """The one that belongs to an in-flight table."""
        return cls(inflight.with_name(f"{inflight.name}-processes"))

    # --- a model's process -----------------------------------------------------------------------------------------

    def register(self, model: str) -> Entries:
        """Take an entry for this process; returns it. Raises ServerError if too many have one."""
        with self._locked():
            free = np.flatnonzero(self._entries["pid"] == 0)
            if not len(free):
                raise ServerError(f"processes: {MAX_PROCESSES} are registered; no more are expected")
            entry = self._entries[free[0] : free[0] + 1]
            now = self._clock_ns()
            entry["beat_ns"], entry["progress_ns"], entry["promised_ns"], entry["picture_ns"] = now, now, 0, 0
            entry["started"], entry["model"], entry["stage"] = process.started(os.getpid()), model.encode(), LOADING
            entry["pid"] = os.getpid()
            return entry

    def seconds_each(self) -> float:
        """Return the time between two pictures of all GPUs together; 0 if no process has said what one takes it."""
        rate = sum(1e9 / int(e["picture_ns"]) for e in self._registered() if e["picture_ns"] and _alive(e))
        return 1 / rate if rate else 0.0

    # --- supervisor ------------------------------------------------------------------------------------------------

    def pids(self, model: str) -> list[int]:
        """Pids of a model's instances that have loaded, dead or alive."""
        entries = self._registered()
        ours = (entries["model"] == model.encode()) & (entries["stage"] == LOADED)
        return [int(pid) for pid in entries["pid"][ours]]

    def busy(self) -> bool:
        """Whether a process has work that it has not answered yet."""
        return any(e["promised_ns"] and _alive(e) for e in self._registered())

    def trouble(self, fresh_ns: int = 0) -> str | None:
        """What is wrong with one of the processes, None if all are well.

        Args:
            fresh_ns: no silence counts from before this time: the supervisor itself did not run until then.
        """
        now = self._clock_ns()
        said = (_trouble(entry, fresh_ns, now) for entry in self._registered())
        return next((words for words in said if words), None)

    def gone(self) -> bool:
        """Whether every process that registered has ended."""
        return not any(_alive(entry) for entry in self._registered())

    def reset(self) -> None:
        """Forget every process: all of them were ended."""
        with self._locked():
            self._entries["pid"] = 0

    def _registered(self) -> Entries:
        """A copy of the entries in use."""
        entries: Entries = self._entries[self._entries["pid"] != 0]
        return entries


def _alive(entry: np.void) -> bool:
    return process.started(int(entry["pid"])) == int(entry["started"])


def _trouble(entry: np.void, fresh_ns: int, now: int) -> str | None:
    who = f"a process of {bytes(entry['model']).decode()}"
    if not _alive(entry):
        return f"{who} died"
    silence = (now - max(int(entry["beat_ns"]), fresh_ns)) / 1e9
    patience = LOADING_SILENCE_S if entry["stage"] == LOADING else SILENCE_S
    stopped = silence > STOPPED_SILENCE_S and process.stopped(int(entry["pid"]))
    if stopped or silence > patience:
        return f"{who} {'is stopped' if stopped else 'hangs'}: no sign of life for {silence:.1f} s"
    rest = (now - max(int(entry["progress_ns"]), fresh_ns)) / 1e9
    if entry["promised_ns"] and rest > int(entry["promised_ns"]) / 1e9:
        promised = int(entry["promised_ns"]) / 1e9
        return f"{who} hangs: no progress for {rest:.1f} s, where it promised some within {promised:.1f} s"
    return None


class Heartbeat:
    """This process's entry: beats on a thread, and says how its work goes on."""

    def __init__(self, table: ProcessTable, model: str) -> None:
        self._table, self._entry = table, table.register(model)
        self._lock, self._works, self._ended = threading.Lock(), 0, threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            self._entry["beat_ns"] = self._table._clock_ns()

    def loaded(self) -> None:
        self._entry["stage"] = LOADED

    def draws_in(self, picture_s: float) -> None:
        """Say how long this process takes to draw a picture."""
        self._entry["picture_ns"] = round(picture_s * 1e9)

    def begin(self, promised_s: float) -> None:
        """Say that there is work, and within how many seconds the first progress comes."""
        with self._lock:
            self._works += 1
        self.progress(promised_s)

    def progress(self, promised_s: float) -> None:
        """Say that the work got on, and within how many seconds it will again."""
        self._entry["progress_ns"] = self._table._clock_ns()
        self._entry["promised_ns"] = int(promised_s * 1e9)

    def end(self) -> None:
        """Say that a piece of work is answered."""
        with self._lock:
            self._works -= 1
            if not self._works:
                self._entry["promised_ns"] = 0

    def close(self) -> None:
        """Give the entry back: this process ends as it should."""
        self._ended.set()
        self._thread.join()
        with self._table._locked():
            self._entry["pid"] = 0


class Pace:
    """How long the next sign of progress may take, from those that came before.

    A step may take ten times as long as the slowest of its request, and never less than `LEAST_S`. Where nothing is
    known yet (the text encoders, a new size, the VAE) a multiple of the slowest warm-up stands in for it.
    """

    LEAST_S = 5.0
    UNKNOWN_LEAST_S = 60.0
    STEPS, PASSES = 10.0, 20.0

    def __init__(self, heartbeat: Heartbeat, warm_up_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._heartbeat, self._clock = heartbeat, clock
        self._unknown_s = max(self.UNKNOWN_LEAST_S, self.PASSES * warm_up_s)
        self._last = self._slowest = 0.0

    def begin(self) -> None:
        """A piece of work: a batch, or the files of a request."""
        self._heartbeat.begin(self._unknown_s)

    def draw(self) -> None:
        """A pass through the pipeline begins; its encoders come first."""
        self._last, self._slowest = 0.0, 0.0
        self._heartbeat.progress(self._unknown_s)

    def step(self, last: bool) -> None:
        """A step is done; behind the last one comes the VAE."""
        now = self._clock()
        if self._last:
            self._slowest = max(self._slowest, now - self._last)
        self._last = now
        known = self._slowest and not last
        self._heartbeat.progress(max(self.LEAST_S, self.STEPS * self._slowest) if known else self._unknown_s)

    def end(self) -> None:
        self._heartbeat.end()
