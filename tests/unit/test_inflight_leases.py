"""The in-flight table: a slot that waits is a lease, and when it lapses."""

from pathlib import Path

import pytest

from fluxserve.contract import MAX_WAITING, QUEUE_TIMEOUT_S
from fluxserve.errors import Cancelled, InvalidRequest, QueueFull
from fluxserve.inflight import HANDOVER_S, LEASE_S, InflightTable, Status, places
from tests.support.admission import UNKNOWN, Clock, admitted


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def table(tmp_path: Path, clock: Clock) -> InflightTable:
    return InflightTable(tmp_path / "table", clock)


def test_a_refusal_says_how_long_the_wait_would_be(table: InflightTable) -> None:
    for _ in range(3):
        table.claim("", 3, 1.98)
    with pytest.raises(QueueFull, match=r"3 requests are waiting; at most 3 may\. The wait would be about 6 s\. Try"):
        table.claim("", 3, 1.98)


@pytest.mark.parametrize(
    ("timeout", "each", "expected"),
    [
        (120, 1.98, 60),  # 64 would wait for 127 s
        (120, 0.3, MAX_WAITING),
        (120, 119.0, 1),
        (120, 600.0, 1),  # nobody could wait for the whole of it; one may try
        (10, 1.0, 10),
        (120, 0.0, MAX_WAITING),
    ],
)
def test_no_more_may_wait_than_are_drawn_in_time(timeout: float, each: float, expected: int) -> None:
    assert places(timeout, each) == expected


def test_a_lease_is_as_long_as_the_queues_timeout(table: InflightTable, clock: Clock) -> None:
    assert table.queue_timeout_s == QUEUE_TIMEOUT_S
    table.set_queue_timeout(300)
    table.start(admitted(table, "running"), 1)
    admitted(table, "waiting")
    clock.wait(LEASE_S + 1)
    assert InflightTable(table.path, clock).status("waiting").state == "queued"
    clock.wait(300)
    assert table.status("waiting") == UNKNOWN


def test_a_lease_lapses(table: InflightTable, clock: Clock) -> None:
    lost, kept = admitted(table, "lost"), admitted(table, "kept")
    table.start(kept, 1)
    clock.wait(LEASE_S)
    assert table.live() == 2
    clock.wait(0.001)
    assert table.live() == 1, "a running request has no lease"
    assert table.status("lost") == UNKNOWN
    assert admitted(table, "lost") != lost
    with pytest.raises(InvalidRequest):
        table.start(lost, 1)


def test_a_wait_lapses_soon_when_no_gpu_is_at_work(table: InflightTable, clock: Clock) -> None:
    """Triton drops a request between two steps without notice; beside an idle GPU nothing can be in its queue."""
    running = admitted(table, "running")
    table.start(running, 5)
    admitted(table, "dropped")
    clock.wait(LEASE_S)
    assert table.status("dropped").state == "queued", "the GPU is busy: it may still be waiting"
    clock.wait(-60)
    table.release(running)
    clock.wait(HANDOVER_S)
    assert table.status("dropped").state == "queued", "it has as long as it takes to get there"
    clock.wait(0.001)
    assert (table.live(), table.status("dropped")) == (0, UNKNOWN)


def test_a_lapsed_request_that_comes_late_is_drawn(table: InflightTable, clock: Clock) -> None:
    """A whole server may stand still for longer than a lease: nothing is lost by it."""
    late = admitted(table, "late")
    clock.wait(HANDOVER_S + 20)
    assert table.live() == 0
    others = [admitted(table, str(k)) for k in range(MAX_WAITING)]
    assert table.start(late, 5) == pytest.approx(HANDOVER_S + 20)
    assert table.status("late") == Status("running", 0, 5)
    assert late not in others


def test_a_lapsed_requests_id_goes_to_the_next_that_asks_for_it(table: InflightTable, clock: Clock) -> None:
    late = admitted(table, "a")
    clock.wait(HANDOVER_S + 1)
    again = admitted(table, "a")
    with pytest.raises(Cancelled, match="'a'"):
        table.start(late, 5)
    assert table.start(again, 5) == 0


def fill(table: InflightTable) -> list[int]:
    return [admitted(table, f"{k}") for k in range(MAX_WAITING - table.live())]


def test_claims_that_nobody_follows_up_make_room(table: InflightTable, clock: Clock) -> None:
    """Calls of `prepare` alone keep good requests out for HANDOVER_S, longer only beside a GPU that is busy longer."""
    early = [admitted(table, f"early-{k}") for k in range(9)]
    clock.wait(HANDOVER_S / 2)
    late = fill(table)
    with pytest.raises(QueueFull):
        table.claim("good")
    assert len(early) + len(late) == MAX_WAITING
    clock.wait(HANDOVER_S / 2 + 0.001)
    for k in range(10 * MAX_WAITING):
        ticket = admitted(table, f"good-{k}")
        assert table.start(ticket, 1) == 0
        table.release(ticket)


def test_overtaken_claims_make_room_beside_a_busy_gpu(table: InflightTable, clock: Clock) -> None:
    """Triton's queue is first in, first out: an older claim that is passed over is gone, or has a lower priority."""
    first = admitted(table, "first")
    table.start(first, 1)
    ghosts = [admitted(table, f"ghost-{k}") for k in range(MAX_WAITING - 1)]
    clock.wait(HANDOVER_S + 0.001)
    younger = admitted(table, "younger")
    with pytest.raises(QueueFull):
        table.claim("good")
    table.start(younger, 1)
    table.release(first)
    admitted(table, "good")
    assert table.status("ghost-3").state == "queued", "it may be waiting with a lower priority"
    assert table.cancel("ghost-3").state == "cancelling"
    with pytest.raises(Cancelled, match="'ghost-3'"):
        table.start(ghosts[3], 1)
    assert table.start(ghosts[4], 1) == pytest.approx(HANDOVER_S, abs=0.01)
    table.release(ghosts[4])
    table.release(younger)
    clock.wait(HANDOVER_S + 0.001)
    assert (table.status("ghost-5"), table.live()) == (UNKNOWN, 0)


def test_a_wait_that_may_still_be_served_counts_while_draining(table: InflightTable, clock: Clock) -> None:
    running, low = admitted(table, "running"), admitted(table, "low")
    table.start(running, 1)
    clock.wait(HANDOVER_S + 1)
    fill(table)
    younger = admitted(table, "younger")
    table.start(younger, 1)
    fill(table)
    table.claim("more")
    table.drain()
    waits = table.live()
    assert table.status("low").state == "queued"
    table.start(low, 1)
    assert table.live() == waits


def test_lapsed_leases_make_room(table: InflightTable, clock: Clock) -> None:
    for k in range(MAX_WAITING):
        admitted(table, str(k))
    clock.wait(LEASE_S + 1)
    for k in range(MAX_WAITING):
        admitted(table, str(k))
    assert table.live() == MAX_WAITING
