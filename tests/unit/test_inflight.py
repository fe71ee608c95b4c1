"""The in-flight table in one process: life of a slot, tickets, leases, ids, refusals."""

import os
from pathlib import Path

import pytest

from fluxserve import process
from fluxserve.contract import MAX_WAITING
from fluxserve.errors import Cancelled, Draining, QueueFull, RequestIdInUse, ServerError
from fluxserve.serving import inflight
from fluxserve.serving.inflight import (
    CAPACITY,
    IDLE_LEASE_S,
    LEASE_S,
    MAX_ID_BYTES,
    InflightTable,
    Status,
)

UNKNOWN = Status("unknown", 0, 0)


class Clock:
    """Nanoseconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 10**15

    def __call__(self) -> int:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += int(seconds * 1e9)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def table(tmp_path: Path, clock: Clock) -> InflightTable:
    return InflightTable(tmp_path / "table", clock)


def test_a_whole_life(table: InflightTable, clock: Clock) -> None:
    assert table.status("a") == UNKNOWN
    ticket = table.claim("a")
    assert ticket != inflight.NO_TICKET
    assert (table.status("a"), table.live()) == (Status("queued"), 1)
    clock.wait(1.5)
    assert table.start(ticket, 3) == pytest.approx(1.5)
    assert table.status("a") == Status("running", 0, 3)
    assert [table.advance(ticket) for _ in range(2)] == [True, True]
    assert table.status("a") == table.progress(ticket) == Status("running", 2, 3)
    table.release(ticket)
    assert (table.status("a"), table.live()) == (UNKNOWN, 0)


def test_two_views_are_one_table(table: InflightTable) -> None:
    other = InflightTable(table.path)
    other.start(table.claim("a"), 7)
    assert table.status("a") == Status("running", 0, 7)
    assert other.cancel("a") == table.status("a") == Status("cancelling", 0, 7)


def test_requests_do_not_disturb_each_other(table: InflightTable) -> None:
    tickets = {name: table.claim(name) for name in "abcdef"}
    assert len(set(tickets.values())) == 6
    table.start(tickets["c"], 9)
    table.advance(tickets["c"])
    table.cancel("d")
    table.release(tickets["a"])
    states = {name: table.status(name).state for name in "abcdef"}
    assert states == dict(
        zip("abcdef", ("unknown", "queued", "running", "cancelling", "queued", "queued"), strict=True)
    )


def test_a_stale_ticket_does_no_harm(table: InflightTable) -> None:
    old = table.claim("old")
    table.release(old)
    new = table.claim("new")
    assert new % CAPACITY == old % CAPACITY and new != old, "the same slot, another generation"
    table.release(old)
    with pytest.raises(Cancelled):
        table.start(old, 4)
    assert table.status("new") == Status("queued")
    table.release(new)
    table.release(new)
    assert table.live() == 0


def test_tickets_never_repeat(table: InflightTable) -> None:
    tickets = set()
    for _ in range(1000):
        ticket = table.claim("again")
        tickets.add(ticket)
        table.release(ticket)
    assert len(tickets) == 1000


def test_no_ticket_is_nobodys(table: InflightTable) -> None:
    """Even while slot 0 is in use, and before it ever was."""
    for _ in range(2):
        table.release(inflight.NO_TICKET)
        with pytest.raises(Cancelled):
            table.start(inflight.NO_TICKET, 1)
        ticket = table.claim("first")
        assert ticket % CAPACITY == 0
        table.release(inflight.NO_TICKET)
        assert table.status("first").state == "queued"
        table.release(ticket)


def test_cancel_while_waiting(table: InflightTable) -> None:
    ticket = table.claim("a")
    assert table.cancel("a") == table.cancel("a") == Status("cancelling")
    with pytest.raises(Cancelled, match=r"'a' was cancelled at step 0 of 5"):
        table.start(ticket, 5)
    assert table.live() == 0


def test_cancel_while_running(table: InflightTable) -> None:
    ticket = table.claim("a")
    table.start(ticket, 5)
    assert table.advance(ticket)
    assert table.cancel("a") == Status("cancelling", 1, 5)
    assert not table.advance(ticket)
    assert table.live() == 1, "its worker has yet to give it back"
    table.release(ticket)
    again = table.claim("a")
    table.start(again, 5)
    assert table.advance(again), "the flag went with the slot"


def test_cancel_of_nobody(table: InflightTable) -> None:
    assert table.cancel("ghost") == UNKNOWN


def test_the_id_of_a_cancelled_wait_is_free_at_once(table: InflightTable) -> None:
    first = table.claim("a")
    table.cancel("a")
    second = table.claim("a")
    with pytest.raises(Cancelled):
        table.start(first, 5)
    assert table.start(second, 5) == 0


def test_a_swept_request_is_still_named(table: InflightTable) -> None:
    ticket = table.claim("a")
    table.cancel("a")
    assert table.live() == 0
    with pytest.raises(Cancelled, match="'a'"):
        table.start(ticket, 5)


def test_an_id_in_use(table: InflightTable) -> None:
    ticket = table.claim("a")
    with pytest.raises(RequestIdInUse, match="'a' is in use by a queued request"):
        table.claim("a")
    table.start(ticket, 1)
    with pytest.raises(RequestIdInUse, match="running"):
        table.claim("a")
    table.cancel("a")
    with pytest.raises(RequestIdInUse, match="cancelling"):
        table.claim("a")
    assert table.live() == 1


def test_no_id_may_be_used_many_times(table: InflightTable) -> None:
    tickets = [table.claim("") for _ in range(3)]
    assert len(set(tickets)) == 3
    assert table.status("") == table.cancel("") == UNKNOWN
    assert all(table.start(t, 1) == 0 for t in tickets)


@pytest.mark.parametrize("name", ["x" * MAX_ID_BYTES, "é" * (MAX_ID_BYTES // 2), "a b\n", "-", "🦊"])
def test_ids_are_text(table: InflightTable, name: str) -> None:
    table.claim(name)
    table.claim(name[:-1] + "?")
    assert table.cancel(name).state == "cancelling"
    assert table.status(name[:-1] + "?").state == "queued"


def test_a_full_queue(table: InflightTable) -> None:
    tickets = [table.claim(str(k)) for k in range(MAX_WAITING)]
    with pytest.raises(QueueFull, match=f"{MAX_WAITING} requests are waiting; at most {MAX_WAITING}"):
        table.claim("more")
    table.start(tickets[0], 1)
    table.claim("more")
    with pytest.raises(QueueFull):
        table.claim("yet more")
    table.cancel("more")
    table.claim("yet more")
    assert table.live() == MAX_WAITING + 1


def test_a_full_table(table: InflightTable) -> None:
    for k in range(CAPACITY):
        table.start(table.claim(str(k)), 1)
    with pytest.raises(QueueFull):
        table.claim("more")
    assert table.live() == CAPACITY


def test_draining(table: InflightTable) -> None:
    ticket = table.claim("a")
    table.drain()
    with pytest.raises(Draining):
        InflightTable(table.path).claim("b")
    assert table.start(ticket, 1) == 0, "what was admitted is finished"
    assert table.live() == 1


def test_a_lease_lapses(table: InflightTable, clock: Clock) -> None:
    lost, kept = table.claim("lost"), table.claim("kept")
    table.start(kept, 1)
    clock.wait(LEASE_S)
    assert table.live() == 2
    clock.wait(0.001)
    assert table.live() == 1, "a running request has no lease"
    assert table.claim("lost") != lost
    with pytest.raises(Cancelled):
        table.start(lost, 1)


def test_a_wait_lapses_soon_when_no_gpu_is_at_work(table: InflightTable, clock: Clock) -> None:
    """Triton drops a request between two steps without a word; beside an idle GPU nothing can be in its queue."""
    running = table.claim("running")
    table.start(running, 5)
    dropped = table.claim("dropped")
    clock.wait(IDLE_LEASE_S + 60)
    assert table.status("dropped").state == "queued", "the GPU is busy: it may still be waiting"
    table.release(running)
    clock.wait(IDLE_LEASE_S)
    assert table.status("dropped").state == "queued", "it has as long as it takes to get there"
    clock.wait(0.001)
    assert table.live() == 0
    with pytest.raises(Cancelled):
        table.start(dropped, 5)


def test_lapsed_leases_make_room(table: InflightTable, clock: Clock) -> None:
    for k in range(MAX_WAITING):
        table.claim(str(k))
    clock.wait(LEASE_S + 1)
    for k in range(MAX_WAITING):
        table.claim(str(k))
    assert table.live() == MAX_WAITING


def test_a_pid_that_is_used_again(table: InflightTable, monkeypatch: pytest.MonkeyPatch) -> None:
    table.start(table.claim("a"), 1)
    assert table.live() == 1
    started = process.started(os.getpid())
    monkeypatch.setattr(process, "started", lambda pid: started + 1)
    assert table.live() == 0


def test_when_a_process_started() -> None:
    mine = process.started(os.getpid())
    assert mine > 0
    assert mine == process.started(os.getpid()) >= process.started(1) >= 0
    assert process.started(2**22 + 1) == 0, "above the largest pid there is"


def test_requests_by_name(table: InflightTable) -> None:
    table.claim("first")
    table.start(second := table.claim("second"), 4)
    table.claim("")
    table.advance(second)
    assert table.requests() == [
        ("first", Status("queued")),
        ("second", Status("running", 1, 4)),
        ("", Status("queued")),
    ]


def test_a_reset_opens_the_door(table: InflightTable) -> None:
    """What was claimed before stays another's: an old ticket gives no slot back that is taken anew."""
    old = table.claim("a")
    table.drain()
    table.reset()
    assert table.live() == 0 and not table.draining
    table.claim("b")
    table.release(old)
    assert table.status("b").state == "queued"


def test_the_file_is_private(table: InflightTable) -> None:
    assert table.path.stat().st_mode & 0o777 == 0o600


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"precious")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="link"):
        InflightTable(tmp_path / "link")
    assert (tmp_path / "target").read_bytes() == b"precious"


@pytest.mark.parametrize("size", [1, 100, 10**6])
def test_a_file_of_another_size(tmp_path: Path, size: int) -> None:
    (tmp_path / "table").write_bytes(b"x" * size)
    with pytest.raises(ServerError, match=f"{size} bytes; this version's table has"):
        InflightTable(tmp_path / "table")
    assert (tmp_path / "table").read_bytes() == b"x" * size


def test_a_table_of_another_version(table: InflightTable) -> None:
    raw = table.path.read_bytes()
    table.path.write_bytes((99).to_bytes(4, "little") + raw[4:])
    with pytest.raises(ServerError, match="version"):
        InflightTable(table.path)
