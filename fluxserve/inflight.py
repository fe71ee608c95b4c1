"""The in-flight table: which requests are waiting or running, how far they are, which of them are cancelled.

A small file in shared memory, mapped by every model of one server. `prepare` claims a slot when it admits a request and
queues it when it hands the job on. `generate` starts it and gives it back. `control` reports on it and cancels it.

Life of a slot:   FREE → CLAIMED (claim) → QUEUED (enqueue) → RUNNING (start) → FREE (release)

A ticket is the key to a slot: its lowest bits are the slot's number, the others are random. Inner models can be called
by any client, so `start` takes only a ticket that was drawn here and has not been used; others can't be guessed.

A CLAIMED or RUNNING slot belongs to a process and lapses with it. A QUEUED slot may never reach `generate`: Triton can
drop a request between two steps of an ensemble without notice, and a client can call `prepare` alone. So it lapses

- when it was cancelled,
- after the timeout of Triton's queue, which `generate` reads in its configuration,
- HANDOVER_S after the last GPU went idle, because nothing can be left in the queue,
- when as many requests wait as may, and one that was queued HANDOVER_S later has been started. (A request of low
  priority may be overtaken so and still wait: then more than that do, up to Triton's own bound.)

A lapsed slot counts no longer, and may be claimed again when no unused one is left. Until then it keeps its ticket:
a request that arrives late after all is drawn, or answered as cancelled.

Claims, starts, cancels and releases hold an exclusive lock on the file. What happens at every step takes none: noting
the step, and looking at the cancel flag and at the steps that somebody wants to see. All are single aligned words.
"""

import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fluxserve import process
from fluxserve.contract import MAX_WAITING, QUEUE_TIMEOUT_S
from fluxserve.errors import Cancelled, Draining, InvalidRequest, QueueFull, RequestIdInUse
from fluxserve.shared_file import SharedFile

PREVIEWS = ("glimpse", "partial")
"""Kinds of previews."""

FREE, CLAIMED, QUEUED, RUNNING = 0, 1, 2, 3
CAPACITY = 256
"""Slots. A power of two: a ticket's lowest bits are its slot's number."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")

_RANDOM_BITS = 63 - (CAPACITY - 1).bit_length()
"""Of a ticket, which must fit into an INT64."""

MAX_ID_BYTES = 128
_GRACE_S = 10.0
"""Of a wait beyond the timeout of Triton's queue, before its slot lapses."""

LEASE_S = QUEUE_TIMEOUT_S + _GRACE_S
"""How long a slot may be QUEUED, until `generate` has said what Triton's timeout is."""

HANDOVER_S = 1.0
"""Longer than the way from `prepare` to `generate` takes when no other request is in front."""

_VERSION = 4
_HEADER = np.dtype(
    [
        ("version", "<u4"),
        ("draining", "<u4"),
        ("idle_since_ns", "<u8"),
        ("newest_started_ns", "<u8"),  # the latest `queued_ns` of all that were started
        ("queue_timeout_ns", "<u8"),  # 0: not said yet
    ],
    align=True,
)
_SLOT = np.dtype(
    [
        ("ticket", "<u8"),  # 0: none; kept by a slot that lapsed
        ("claimed_ns", "<u8"),
        ("queued_ns", "<u8"),
        ("owner_pid", "<u8"),
        ("owner_started", "<u8"),
        ("state", "<u4"),
        ("cancel", "<u4"),
        ("step", "<u4"),
        ("steps", "<u4"),
        ("previews", "<u4", len(PREVIEWS)),  # of each kind the first step that somebody wants to see; 0: nobody does
        ("id", f"S{MAX_ID_BYTES}"),
    ],
    align=True,
)


def places(queue_timeout_s: float, seconds_each: float) -> int:
    """Return how many requests may wait: all that are drawn within the queue's timeout, from 1 to MAX_WAITING.

    Args:
        seconds_each: between two pictures of all GPUs together; 0 if that is not known.
    """
    if not seconds_each:
        return MAX_WAITING
    return min(max(int(queue_timeout_s / seconds_each), 1), MAX_WAITING)


def checked_id(request_id: str) -> str:
    """Return a request id that the table can hold and a log can show, empty or not. Raises InvalidRequest."""
    size, allowed = len(request_id.encode()), f"at most {MAX_ID_BYTES} bytes of UTF-8 without control characters"
    if size > MAX_ID_BYTES:
        raise InvalidRequest("request_id", f"{size} bytes", allowed)
    if _CONTROL.search(request_id):
        raise InvalidRequest("request_id", repr(request_id), allowed)
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
        self._file = SharedFile(path, _HEADER.itemsize + CAPACITY * _SLOT.itemsize, _VERSION)
        self._locked = self._file.locked
        self._header = np.frombuffer(self._file.map, _HEADER, count=1)
        self._slots = np.frombuffer(self._file.map, _SLOT, count=CAPACITY, offset=_HEADER.itemsize)

    # --- prepare ---------------------------------------------------------------------------------------------------

    def claim(self, request_id: str, most: int = MAX_WAITING, seconds_each: float = 0.0) -> int:
        """Admit a request; returns its ticket. An empty id can't be looked up and may be in use many times.

        Args:
            most: requests that may wait.
            seconds_each: between two pictures of all GPUs together; 0 if that is not known.

        Raises:
            Draining: the server is going down.
            RequestIdInUse: a live request has this id.
            QueueFull: `most` requests wait already.
        """
        with self._locked():
            if self._header["draining"][0]:
                raise Draining
            self._sweep()
            if (taken := self._find(request_id)) is not None:
                raise RequestIdInUse(request_id, self._status(taken).state)
            if self._waiting() >= most:
                self._lapse_overtaken()
            free = np.flatnonzero(self._slots["state"] == FREE)
            if (waiting := self._waiting()) >= most or not len(free):
                raise QueueFull(waiting, most, waiting * seconds_each)
            self._slots["cancel"][(self._slots["state"] == FREE) & self._named(request_id)] = 1  # a lapsed one's id
            index = self._longest_unused(free)
            slot = self._slots[index]
            slot["ticket"] = (1 + secrets.randbelow(2**_RANDOM_BITS - 1)) * CAPACITY + index
            slot["state"], slot["cancel"], slot["step"], slot["steps"], slot["previews"] = CLAIMED, 0, 0, 0, 0
            slot["owner_pid"], slot["owner_started"] = os.getpid(), self._started
            slot["claimed_ns"], slot["id"] = self._clock_ns(), request_id.encode()
            return int(slot["ticket"])

    def enqueue(self, ticket: int, steps: int) -> None:
        """Note that a claimed request's job is handed on to `generate`. Raises Cancelled if it was cancelled."""
        with self._locked():
            slot = self._slots[ticket % CAPACITY]
            if slot["cancel"]:
                raise Cancelled(_id(slot), 0, steps)
            slot["state"], slot["queued_ns"] = QUEUED, self._clock_ns()

    @property
    def queue_timeout_s(self) -> float:
        """How long Triton lets a request wait for a GPU."""
        return int(self._header["queue_timeout_ns"][0]) / 1e9 or float(QUEUE_TIMEOUT_S)

    # --- generate --------------------------------------------------------------------------------------------------

    def set_queue_timeout(self, seconds: float) -> None:
        """Say how long Triton lets a request wait for a GPU, before the first one comes."""
        self._header["queue_timeout_ns"] = round(seconds * 1e9)

    def start(self, ticket: int, steps: int) -> float:
        """Take a queued request up; returns how many seconds it waited.

        Raises:
            InvalidRequest: no request that waits has this ticket.
            Cancelled: it was cancelled while it waited.
        """
        with self._locked():
            slot = self._slots[ticket % CAPACITY]
            if int(slot["ticket"]) != ticket or not ticket or slot["state"] not in (QUEUED, FREE):
                allowed = "that of a request which `prepare` has admitted, once; clients call `flux`"
                raise InvalidRequest("ticket", f"{ticket}, which no waiting request has", allowed)
            if slot["cancel"]:
                self._free(slot)
                raise Cancelled(_id(slot), 0, steps)
            slot["state"], slot["steps"] = RUNNING, steps
            slot["owner_pid"], slot["owner_started"] = os.getpid(), self._started
            self._header["newest_started_ns"] = max(self._header["newest_started_ns"][0], slot["queued_ns"])
            return (self._clock_ns() - int(slot["queued_ns"])) / 1e9

    def advance(self, ticket: int) -> bool:
        """Note one more step of a request that this process started; False if it was cancelled. Takes no lock."""
        slot = self._slots[ticket % CAPACITY]
        slot["step"] += 1
        return not slot["cancel"]

    def wanted(self, ticket: int) -> npt.NDArray[np.uint32]:
        """Return, for each kind of preview, the first step that somebody wants to see; 0: nobody does. No lock."""
        wanted: npt.NDArray[np.uint32] = self._slots["previews"][ticket % CAPACITY]
        return wanted

    @contextmanager
    def running(self, ticket: int) -> Iterator[bool]:
        """Hold the lock: whether this request still runs does not change meanwhile. One thread of a view at a time."""
        with self._locked():
            slot = self._slots[ticket % CAPACITY]
            yield bool(slot["state"] == RUNNING and int(slot["ticket"]) == ticket)

    def progress(self, ticket: int) -> Status:
        """How far a request came that this process runs."""
        return self._status(ticket % CAPACITY)

    def release(self, ticket: int) -> None:
        """Give a slot back that this process claimed or started. Any other is left alone."""
        with self._locked():
            slot = self._slots[ticket % CAPACITY]
            if int(slot["ticket"]) == ticket and slot["state"] != FREE and slot["owner_pid"] == os.getpid():
                self._free(slot)

    # --- control, supervisor ---------------------------------------------------------------------------------------

    def status(self, request_id: str) -> Status:
        with self._locked():
            self._sweep(cancelled_waits=False)
            return self._status(self._find(request_id, lapsed=True))

    def want(self, request_id: str, kind: str, after: int) -> tuple[Status, int]:
        """Note that a preview later than step `after` is wanted; return the request's status and ticket, or 0."""
        with self._locked():
            self._sweep(cancelled_waits=False)
            if (index := self._find(request_id)) is None:
                return self._status(self._find(request_id, lapsed=True)), 0
            wanted = self._slots["previews"][index]
            wanted[PREVIEWS.index(kind)] = max(int(wanted[PREVIEWS.index(kind)]), after + 1)
            return self._status(index), int(self._slots["ticket"][index])

    def cancel(self, request_id: str) -> Status:
        """Mark a request as unwanted; returns its status afterwards. Twice is the same as once."""
        with self._locked():
            self._sweep(cancelled_waits=False)
            index = self._find(request_id, lapsed=True)
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
            return int((self._slots["state"] != FREE).sum() + (self._lapsed() & (self._slots["cancel"] == 0)).sum())

    def reset(self) -> None:
        """Free every slot and open the door: every process of the server was ended, and nobody waits for an answer."""
        with self._locked():
            self._slots["state"], self._slots["ticket"] = FREE, 0
            self._header["draining"] = 0

    def requests(self) -> list[tuple[str, Status]]:
        """The ids of the requests that wait or run, in the order in which they were admitted."""
        slots = self._slots[self._slots["state"] != FREE]
        order = np.argsort(slots["claimed_ns"], kind="stable")
        return [(_id(slots[i]), _status(slots[i])) for i in order]

    def counts(self) -> tuple[int, int]:
        """Return how many requests wait, those that are decoded included, and how many run. Takes no lock."""
        states = self._slots["state"].copy()
        return int(np.isin(states, (CLAIMED, QUEUED)).sum()), int((states == RUNNING).sum())

    @property
    def drawing(self) -> bool:
        """Whether a GPU is at work. Takes no lock."""
        return bool((self._slots["state"] == RUNNING).any())

    @property
    def draining(self) -> bool:
        return bool(self._header["draining"][0])

    # --- with the lock held ----------------------------------------------------------------------------------------

    def _sweep(self, cancelled_waits: bool = True) -> None:
        """Lapse waits that were too long or, unless their state is asked for, cancelled; free dead processes' slots."""
        slots, now, lease_s = self._slots, self._clock_ns(), self.queue_timeout_s + _GRACE_S
        for index in np.flatnonzero(np.isin(slots["state"], (CLAIMED, RUNNING))):
            if process.started(int(slots[index]["owner_pid"])) != slots[index]["owner_started"]:
                self._free(slots[index])
        timed_out = np.isin(slots["state"], (FREE, QUEUED)) & (now - slots["queued_ns"] > lease_s * 1e9)
        slots["state"][timed_out], slots["ticket"][timed_out] = FREE, 0
        queued = slots["state"] == QUEUED
        if (queued & self._left_behind()).any():  # then its neighbours of the same second most likely are, too
            slots["state"][queued] = FREE
        if cancelled_waits:
            slots["state"][queued & (slots["cancel"] != 0)] = FREE

    def _left_behind(self) -> npt.NDArray[np.bool_]:
        """Slots whose request, if it was queued, is in no queue: for HANDOVER_S it was there and no GPU at work."""
        since = np.maximum(self._slots["queued_ns"], self._header["idle_since_ns"])
        left: npt.NDArray[np.bool_] = self._clock_ns() - since > HANDOVER_S * 1e9
        return left & (not self.drawing)

    def _lapse_overtaken(self) -> None:
        """Lapse waits that were passed over: among requests of one priority Triton's queue is first in, first out."""
        slots, newest = self._slots, self._header["newest_started_ns"]
        slots["state"][(slots["state"] == QUEUED) & (slots["queued_ns"] + HANDOVER_S * 1e9 < newest)] = FREE

    def _waiting(self) -> int:
        return int(np.isin(self._slots["state"], (CLAIMED, QUEUED)).sum())

    def _lapsed(self) -> npt.NDArray[np.bool_]:
        """Slots that lapsed and whose request may be waiting all the same."""
        maybe: npt.NDArray[np.bool_] = (self._slots["state"] == FREE) & (self._slots["ticket"] != 0)
        return maybe & ~self._left_behind()

    def _longest_unused(self, free: npt.NDArray[np.intp]) -> int:
        """Of free slots one without a ticket, if there is one; of several the one that was claimed the longest ago."""
        slots = self._slots[free]
        return int(free[np.lexsort((slots["claimed_ns"], slots["ticket"] != 0))[0]])

    def _named(self, request_id: str) -> npt.NDArray[np.bool_]:
        named: npt.NDArray[np.bool_] = (self._slots["id"] == request_id.encode()) & (request_id != "")
        return named

    def _find(self, request_id: str, lapsed: bool = False) -> int | None:
        """The slot of an id, if it has one. (`claim` sweeps first, so the id of a cancelled wait is free at once.)"""
        named = self._named(request_id)
        found = np.flatnonzero(named & (self._slots["state"] != FREE))
        if lapsed and not len(found):
            found = np.flatnonzero(named & self._lapsed())
        return int(found[0]) if len(found) else None

    def _status(self, index: int | None) -> Status:
        return Status("unknown") if index is None else _status(self._slots[index])

    def _free(self, slot: np.void) -> None:
        if slot["state"] == RUNNING:
            self._header["idle_since_ns"] = self._clock_ns()
        slot["state"], slot["ticket"] = FREE, 0


def _id(slot: np.void) -> str:
    return bytes(slot["id"]).decode()


def _status(slot: np.void) -> Status:
    """What a slot that is not free says of its request."""
    state = "cancelling" if slot["cancel"] else ("running" if slot["state"] == RUNNING else "queued")
    return Status(state, int(slot["step"]), int(slot["steps"]))
