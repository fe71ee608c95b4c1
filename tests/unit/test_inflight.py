"""The in-flight table in one process: life of a slot, tickets, leases, ids, refusals."""

import os
import re
import sys
from pathlib import Path

import pytest

from fluxserve import process
from fluxserve.contract import MAX_WAITING
from fluxserve.errors import Cancelled, Draining, InvalidRequest, QueueFull, RequestIdInUse, ServerError
from fluxserve.inflight import CAPACITY, MAX_ID_BYTES, InflightTable, Status
from tests.support import namespaces
from tests.support.admission import UNKNOWN, Clock, admitted


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def table(tmp_path: Path, clock: Clock) -> InflightTable:
    return InflightTable(tmp_path / "table", clock)


def test_a_whole_life(table: InflightTable, clock: Clock) -> None:
    assert table.status("a") == UNKNOWN
    ticket = table.claim("a")
    assert (table.status("a"), table.live()) == (Status("queued"), 1)
    clock.wait(30)
    table.enqueue(ticket, 3)
    assert (table.status("a"), table.live()) == (Status("queued"), 1), "decoding an image has no lease"
    clock.wait(0.5)
    assert table.start(ticket, 3) == pytest.approx(0.5)
    assert table.status("a") == Status("running", 0, 3)
    assert [table.advance(ticket) for _ in range(2)] == [True, True]
    assert table.status("a") == table.progress(ticket) == Status("running", 2, 3)
    table.release(ticket)
    assert (table.status("a"), table.live()) == (UNKNOWN, 0)


def test_two_views_are_one_table(table: InflightTable) -> None:
    other = InflightTable(table.path)
    other.start(admitted(table, "a"), 7)
    assert table.status("a") == Status("running", 0, 7)
    assert other.cancel("a") == table.status("a") == Status("cancelling", 0, 7)


def test_requests_do_not_disturb_each_other(table: InflightTable) -> None:
    tickets = {name: admitted(table, name) for name in "abcdef"}
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
    old = admitted(table, "old")
    table.release(old)
    slots = [admitted(table, str(k)) for k in range(MAX_WAITING)]
    table.release(old)
    with pytest.raises(InvalidRequest, match="which no waiting request has"):
        table.start(old, 4)
    assert table.live() == MAX_WAITING
    assert len({ticket % CAPACITY for ticket in slots}) == MAX_WAITING


def test_tickets_can_not_be_guessed(table: InflightTable) -> None:
    """Neither repeated nor counted up: of 1000 tickets every bit above the slot's number is set in about half."""
    tickets = set()
    for _ in range(1000):
        ticket = admitted(table, "again")
        tickets.add(ticket)
        table.release(ticket)
    assert len(tickets) == 1000
    assert all(0 < ticket < 2**63 for ticket in tickets)
    for bit in range(8, 63):
        assert 350 < sum(ticket >> bit & 1 for ticket in tickets) < 650, bit


@pytest.mark.parametrize("guess", [0, 1, -1, 255, 256, 2**62, -(2**63)])
def test_a_ticket_that_nobody_has(table: InflightTable, guess: int) -> None:
    """Before a slot was ever used, while it waits, and while it runs."""
    for _ in range(2):
        with pytest.raises(InvalidRequest, match=f"ticket: got {guess}, which no waiting request has; allowed: "):
            table.start(guess, 1)
        ticket = admitted(table, "first")
        table.release(guess)
        with pytest.raises(InvalidRequest):
            table.start(guess, 1)
        assert table.status("first") == Status("queued")
        table.start(ticket, 1)
        table.release(guess)
        with pytest.raises(InvalidRequest):
            table.start(guess, 1)
        assert table.status("first") == Status("running", 0, 1)
        table.release(ticket)


def test_a_ticket_is_for_one_use(table: InflightTable) -> None:
    ticket = admitted(table, "a")
    table.start(ticket, 5)
    with pytest.raises(InvalidRequest):
        table.start(ticket, 1)
    assert table.status("a") == Status("running", 0, 5), "the first use goes on"
    table.release(ticket)
    with pytest.raises(InvalidRequest):
        table.start(ticket, 1)


def test_a_claim_that_is_not_queued_yet_can_not_be_started(table: InflightTable) -> None:
    with pytest.raises(InvalidRequest):
        table.start(table.claim("a"), 1)


def test_cancel_before_the_job_is_handed_on(table: InflightTable) -> None:
    ticket = table.claim("a")
    assert table.cancel("a") == Status("cancelling")
    with pytest.raises(Cancelled, match="'a' was cancelled at step 0 of 7"):
        table.enqueue(ticket, 7)
    table.release(ticket)
    assert (table.live(), table.status("a")) == (0, UNKNOWN)


def test_cancel_while_waiting(table: InflightTable) -> None:
    ticket = admitted(table, "a")
    assert table.cancel("a") == table.cancel("a") == Status("cancelling")
    with pytest.raises(Cancelled, match=r"'a' was cancelled at step 0 of 5"):
        table.start(ticket, 5)
    assert table.live() == 0


def test_cancel_while_running(table: InflightTable) -> None:
    ticket = admitted(table, "a")
    table.start(ticket, 5)
    assert table.advance(ticket)
    assert table.cancel("a") == Status("cancelling", 1, 5)
    assert not table.advance(ticket)
    assert table.live() == 1, "its worker has yet to give it back"
    table.release(ticket)
    again = admitted(table, "a")
    table.start(again, 5)
    assert table.advance(again), "the flag went with the slot"


def test_cancel_of_nobody(table: InflightTable) -> None:
    assert table.cancel("ghost") == UNKNOWN


def test_the_id_of_a_cancelled_wait_is_free_at_once(table: InflightTable) -> None:
    first = admitted(table, "a")
    table.cancel("a")
    second = admitted(table, "a")
    with pytest.raises(Cancelled):
        table.start(first, 5)
    assert table.start(second, 5) == 0


def test_a_swept_request_is_still_named(table: InflightTable) -> None:
    ticket = admitted(table, "a")
    table.cancel("a")
    assert table.live() == 0
    with pytest.raises(Cancelled, match="'a'"):
        table.start(ticket, 5)


def test_an_id_in_use(table: InflightTable) -> None:
    ticket = admitted(table, "a")
    with pytest.raises(RequestIdInUse, match="'a' is in use by a queued request"):
        admitted(table, "a")
    table.start(ticket, 1)
    with pytest.raises(RequestIdInUse, match="running"):
        admitted(table, "a")
    table.cancel("a")
    with pytest.raises(RequestIdInUse, match="cancelling"):
        admitted(table, "a")
    assert table.live() == 1


def test_no_id_may_be_used_many_times(table: InflightTable) -> None:
    tickets = [admitted(table, "") for _ in range(3)]
    assert len(set(tickets)) == 3
    assert table.status("") == table.cancel("") == UNKNOWN
    assert all(table.start(t, 1) == 0 for t in tickets)


@pytest.mark.parametrize("name", ["x" * MAX_ID_BYTES, "é" * (MAX_ID_BYTES // 2), "a b ", "-", "🦊"])
def test_ids_are_text(table: InflightTable, name: str) -> None:
    admitted(table, name)
    admitted(table, name[:-1] + "?")
    assert table.cancel(name).state == "cancelling"
    assert table.status(name[:-1] + "?").state == "queued"


def test_a_full_queue(table: InflightTable) -> None:
    tickets = [admitted(table, str(k)) for k in range(MAX_WAITING)]
    with pytest.raises(QueueFull, match=f"{MAX_WAITING} requests are waiting; at most {MAX_WAITING}"):
        admitted(table, "more")
    table.start(tickets[0], 1)
    admitted(table, "more")
    with pytest.raises(QueueFull):
        admitted(table, "yet more")
    table.cancel("more")
    admitted(table, "yet more")
    assert table.live() == MAX_WAITING + 1


def test_a_full_table(table: InflightTable) -> None:
    for k in range(CAPACITY):
        table.start(admitted(table, str(k)), 1)
    with pytest.raises(QueueFull):
        admitted(table, "more")
    assert table.live() == CAPACITY


def test_draining(table: InflightTable) -> None:
    ticket = admitted(table, "a")
    table.drain()
    with pytest.raises(Draining):
        admitted(InflightTable(table.path), "b")
    assert table.start(ticket, 1) == 0, "what was admitted is finished"
    assert table.live() == 1


def test_a_pid_that_is_used_again(table: InflightTable, monkeypatch: pytest.MonkeyPatch) -> None:
    table.start(admitted(table, "a"), 1)
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
    second = table.claim("second")
    table.enqueue(second, 4)
    table.start(second, 4)
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


def test_the_pages_are_reserved(table: InflightTable) -> None:
    """A page that is first touched when there is no room left would end the process by SIGBUS."""
    assert table.path.stat().st_blocks * 512 >= table.path.stat().st_size > 0


FULL = """
import sys
from pathlib import Path
from fluxserve.errors import ServerError
from fluxserve.inflight import InflightTable
folder = Path(sys.argv[1])
(folder / "other").write_bytes(bytes(56 * 1024))
try:
    InflightTable(folder / "table")
except ServerError as error:
    print(error)
print([file.name for file in folder.iterdir()])
"""


def test_no_room_for_the_table(tmp_path: Path) -> None:
    done = namespaces.run(tmp_path, 64 * 1024, [sys.executable, "-c", FULL, str(tmp_path)])
    assert done.returncode == 0, done.stderr
    error, left = done.stdout.splitlines()
    assert re.fullmatch(r".*/table: no room for a table of \d+ bytes: No space left on device", error)
    assert left == "['other']"


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
