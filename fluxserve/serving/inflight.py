"""The in-flight table: which requests are waiting or running, how far they are, which of them nobody wants any more.

A small file in shared memory, mapped by every model of one server. `prepare` claims a slot when a request is admitted,
`generate` runs it and gives it back, `control` answers for it and marks it cancelled.

Life of a slot:   FREE → QUEUED (claim) → RUNNING (start) → FREE (release)

A claim may never reach `generate`: Triton can drop a request between two steps of an ensemble, and nobody tells us.
So a QUEUED slot is a lease: it lapses once it is cancelled, or has waited longer than the queue's timeout, or a few
seconds after the last GPU went idle, when nothing can be left in the queue. A lapsed slot is taken again when needed.
A RUNNING slot belongs to a process: it lapses when that process is gone. A ticket names a slot and its generation,
which every claim raises; so whoever comes late with an old ticket finds that it is not theirs.

Claims, starts, cancels and releases hold an exclusive lock on the file; the two things that happen at every step,
noting the step and looking at the cancel flag, are single aligned words and take none.
"""

import fcntl
import mmap
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fluxserve import process
from fluxserve.contract import MAX_WAITING, QUEUE_TIMEOUT_S
from fluxserve.errors import Cancelled, Draining, InvalidRequest, QueueFull, RequestIdInUse, ServerError

FREE, QUEUED, RUNNING = 0, 1, 2
CAPACITY = 256
MAX_ID_BYTES = 128
LEASE_S = QUEUE_TIMEOUT_S + 10.0
IDLE_LEASE_S = 15.0
"""With no GPU at work the queue is empty: what waits longer than the way from `prepare` to `generate` takes is gone."""

NO_TICKET = 0
"""A request that came past `prepare`, such as Triton's warm-up: it has no slot and can't be cancelled by id."""

_VERSION = 1
_HEADER = np.dtype([("version", "<u4"), ("draining", "<u4"), ("idle_since_ns", "<u8")], align=True)
_SLOT = np.dtype(
    [
        ("generation", "<u8"),
        ("claimed_ns", "<u8"),
        ("owner_pid", "<u8"),
        ("owner_started", "<u8"),
        ("state", "<u4"),
        ("cancel", "<u4"),
        ("step", "<u4"),
        ("steps", "<u4"),
        ("id", f"S{MAX_ID_BYTES}"),
    ],
    align=True,
)


def checked_id(request_id: str) -> str:
    """A request id that the table can hold, empty or not. Raises InvalidRequest."""
    size = len(request_id.encode())
    if size > MAX_ID_BYTES or "\x00" in request_id:
        raise InvalidRequest("request_id", f"{size} bytes", f"at most {MAX_ID_BYTES} bytes of UTF-8 without NUL")
    return request_id


@dataclass(frozen=True)
class Status:
    """What `control` answers: state is unknown, queued, running or cancelling; steps is 0 when unknown."""

    state: str
    step: int = 0
    steps: int = 0


class InflightTable:
    """One process's view of the table. Times are CLOCK_MONOTONIC, the same in every process."""

    def __init__(self, path: Path, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self.path, self._clock_ns = path, clock_ns
        self._started = process.started(os.getpid())
        size = _HEADER.itemsize + CAPACITY * _SLOT.itemsize
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with self._locked():
            if os.fstat(self._fd).st_size == 0:
                os.ftruncate(self._fd, size)
            if os.fstat(self._fd).st_size != size:
                raise ServerError(f"{path}: {os.fstat(self._fd).st_size} bytes; this version's table has {size}")
            self._map = mmap.mmap(self._fd, size)
            self._header = np.frombuffer(self._map, _HEADER, count=1)
            self._slots = np.frombuffer(self._map, _SLOT, count=CAPACITY, offset=_HEADER.itemsize)
            if self._header["version"][0] not in (0, _VERSION):  # 0: made just now
                raise ServerError(f"{path}: a table of version {self._header['version'][0]}; expected {_VERSION}")
            self._header["version"] = _VERSION

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    # --- prepare ---------------------------------------------------------------------------------------------------

    def claim(self, request_id: str) -> int:
        """Admit a request; returns its ticket. An empty id is not looked up by anybody and may be in use many times.

        Raises:
            Draining: the server is going down.
            RequestIdInUse: a live request has this id.
            QueueFull: contract.MAX_WAITING requests wait already.
        """
        with self._locked():
            if self._header["draining"][0]:
                raise Draining
            self._sweep()
            if (taken := self._find(request_id)) is not None:
                raise RequestIdInUse(request_id, self._status(taken).state)
            waiting = int((self._slots["state"] == QUEUED).sum())
            free = np.flatnonzero(self._slots["state"] == FREE)
            if waiting >= MAX_WAITING or not len(free):
                raise QueueFull(waiting, MAX_WAITING)
            slot = self._slots[free[0]]
            slot["generation"] += 1
            slot["state"], slot["cancel"], slot["step"], slot["steps"] = QUEUED, 0, 0, 0
            slot["claimed_ns"], slot["id"] = self._clock_ns(), request_id.encode()
            return int(slot["generation"]) * CAPACITY + int(free[0])

    # --- generate --------------------------------------------------------------------------------------------------

    def start(self, ticket: int, steps: int) -> float:
        """Take a claimed request up; returns how many seconds it waited.

        Raises:
            Cancelled: it was cancelled, or its lease lapsed, while it waited.
        """
        with self._locked():
            slot = self._slots[ticket % CAPACITY]
            if not self._holds(ticket) or slot["cancel"]:
                request_id = bytes(slot["id"]).decode() if ticket // CAPACITY == slot["generation"] else ""
                self._free(ticket)
                raise Cancelled(request_id, 0, steps)
            slot["state"], slot["steps"] = RUNNING, steps
            slot["owner_pid"], slot["owner_started"] = os.getpid(), self._started
            return (self._clock_ns() - int(slot["claimed_ns"])) / 1e9

    def advance(self, ticket: int) -> bool:
        """Note one more step; False if the request was cancelled. Takes no lock."""
        slot = self._slots[ticket % CAPACITY]
        slot["step"] += 1
        return not slot["cancel"]

    def progress(self, ticket: int) -> Status:
        """How far a request came that this process runs."""
        return self._status(ticket % CAPACITY)

    def release(self, ticket: int) -> None:
        """Give a slot back. One that is not ours any more is left alone."""
        with self._locked():
            self._free(ticket)

    # --- control, supervisor ---------------------------------------------------------------------------------------

    def status(self, request_id: str) -> Status:
        with self._locked():
            self._sweep(cancelled_waits=False)
            return self._status(self._find(request_id))

    def cancel(self, request_id: str) -> Status:
        """Mark a request as unwanted; returns its status afterwards. Twice is the same as once."""
        with self._locked():
            self._sweep(cancelled_waits=False)
            index = self._find(request_id)
            if index is not None:
                self._slots[index]["cancel"] = 1
            return self._status(index)

    def drain(self) -> None:
        """From now on `claim` refuses."""
        with self._locked():
            self._header["draining"] = 1

    def live(self) -> int:
        """How many requests are waiting or running."""
        with self._locked():
            self._sweep()
            return int((self._slots["state"] != FREE).sum())

    def reset(self) -> None:
        """Free every slot and open the door: every process of the server was ended, and nobody waits for an answer."""
        with self._locked():
            self._slots["state"] = FREE
            self._header["draining"] = 0

    def requests(self) -> list[tuple[str, Status]]:
        """The ids of the requests that wait or run, in the order in which they were admitted."""
        slots = self._slots[self._slots["state"] != FREE]
        order = np.argsort(slots["claimed_ns"], kind="stable")
        return [(bytes(slots[i]["id"]).decode(), _status(slots[i])) for i in order]

    @property
    def draining(self) -> bool:
        return bool(self._header["draining"][0])

    # --- with the lock held ----------------------------------------------------------------------------------------

    def _sweep(self, cancelled_waits: bool = True) -> None:
        """Free what lapsed: waits that were too long or, unless somebody asks after them, cancelled; dead processes."""
        slots, now = self._slots, self._clock_ns()
        if not slots["state"].any():
            return
        lapsed = now - slots["claimed_ns"] > LEASE_S * 1e9
        if not (slots["state"] == RUNNING).any():
            lapsed |= now - np.maximum(slots["claimed_ns"], self._header["idle_since_ns"]) > IDLE_LEASE_S * 1e9
        if cancelled_waits:
            lapsed |= slots["cancel"] != 0
        slots["state"][(slots["state"] == QUEUED) & lapsed] = FREE
        for index in np.flatnonzero(slots["state"] == RUNNING):
            if process.started(int(slots[index]["owner_pid"])) != slots[index]["owner_started"]:
                slots[index]["state"] = FREE

    def _find(self, request_id: str) -> int | None:
        """The slot of an id, if it has one. (`claim` sweeps first, so the id of a cancelled wait is free at once.)"""
        if not request_id:
            return None
        found = np.flatnonzero((self._slots["state"] != FREE) & (self._slots["id"] == request_id.encode()))
        return int(found[0]) if len(found) else None

    def _status(self, index: int | None) -> Status:
        return Status("unknown") if index is None else _status(self._slots[index])

    def _holds(self, ticket: int) -> bool:
        slot = self._slots[ticket % CAPACITY]
        return bool(ticket // CAPACITY == slot["generation"] and slot["state"] != FREE)

    def _free(self, ticket: int) -> None:
        if self._holds(ticket):
            self._slots[ticket % CAPACITY]["state"] = FREE
            self._header["idle_since_ns"] = self._clock_ns()


def _status(slot: np.void) -> Status:
    """What a slot that is not free says of its request."""
    state = "cancelling" if slot["cancel"] else ("queued" if slot["state"] == QUEUED else "running")
    return Status(state, int(slot["step"]), int(slot["steps"]))
