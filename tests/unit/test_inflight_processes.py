"""The in-flight table among processes: a worker that dies, and many that do everything at once."""

import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from fluxserve.inflight import CAPACITY, InflightTable, Status
from tests.support.admission import admitted

ROOT = Path(__file__).parents[2]
PROCESSES, SECONDS = 4, 2.0

WORKER = """
import sys, time
from pathlib import Path
from fluxserve.inflight import InflightTable
table = InflightTable(Path(sys.argv[1]))
ticket = table.claim("doomed")
table.enqueue(ticket, 9)
table.start(ticket, 9)
table.advance(ticket)
table.enqueue(table.claim("waiting"), 9)
table.claim("decoding")
print("started", flush=True)
time.sleep(60)
"""

# Claims, then starts and advances, cancels itself or a neighbour, or walks away. Writes [ticket, from, to] for
# everything it ran: from after `start`, to before `release`.
CROWD = """
import json, random, sys, time
from pathlib import Path
from fluxserve.errors import Cancelled, RequestIdInUse
from fluxserve.inflight import InflightTable
path, me, processes, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
table, rng, ran, claimed, cancelled, refused = InflightTable(Path(path)), random.Random(me), [], [], 0, 0
end = time.monotonic() + seconds
while time.monotonic() < end:
    names = {f"{me}-{rng.randrange(50)}" for _ in range(rng.randrange(1, 5))} | {"everybody's"}
    mine = []
    for name in names:
        try:
            ticket = table.claim(name)
        except RequestIdInUse:
            refused += 1
            continue
        claimed.append(ticket)
        try:
            table.enqueue(ticket, 3)
            mine.append((name, ticket))
        except Cancelled:
            cancelled += 1
            table.release(ticket)
    if rng.random() < 0.5:
        table.cancel(f"{rng.randrange(processes)}-{rng.randrange(50)}")
    for name, ticket in mine:
        if rng.random() < 0.2:
            table.cancel(name)
        try:
            table.start(ticket, 3)
        except Cancelled:
            cancelled += 1
            continue
        begin = time.monotonic_ns()
        assert table.progress(ticket).step == 0, "somebody else wrote here"
        steps = 0
        while steps < 3:
            steps += 1
            if not table.advance(ticket):
                break
        assert table.progress(ticket).step == steps, "somebody else wrote here"
        ran.append((ticket, begin, time.monotonic_ns()))
        table.release(ticket)
        if rng.random() < 0.1:
            table.release(ticket)
print(json.dumps({"ran": ran, "claimed": claimed, "cancelled": cancelled, "refused": refused}))
"""


def start(script: str, *arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.fixture
def table(tmp_path: Path) -> InflightTable:
    return InflightTable(tmp_path / "table")


@pytest.fixture
def dead(table: InflightTable) -> int:
    """The pid of a worker that was killed while it ran a request."""
    with start(WORKER, table.path) as process:
        assert process.stdout is not None and process.stdout.readline() == "started\n"
        assert table.status("doomed") == Status("running", 1, 9)
        assert table.live() == 3
        process.send_signal(signal.SIGKILL)
    return process.pid


def test_a_dead_workers_slot_is_free(table: InflightTable, dead: int) -> None:
    assert table.live() == 1, "what waits is not lost: another worker may take it; what was being decoded is"
    assert table.status("waiting").state == "queued"
    table.start(admitted(table, "doomed"), 2)
    assert table.status("doomed") == Status("running", 0, 2)


def test_a_dead_workers_request_does_not_run(table: InflightTable, dead: int) -> None:
    assert table.status("doomed").state == "unknown"


def test_a_zombie_is_dead(table: InflightTable) -> None:
    """Killed, and not waited for: /proc still has it."""
    with start(WORKER, table.path) as process:
        assert process.stdout is not None and process.stdout.readline() == "started\n"
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert Path(f"/proc/{process.pid}/stat").exists()
        assert table.live() == 1


def test_a_crowd(table: InflightTable) -> None:
    crowd = [start(CROWD, table.path, me, PROCESSES, SECONDS) for me in range(PROCESSES)]
    answers = [json.loads(process.communicate(timeout=60)[0]) for process in crowd]
    assert [process.returncode for process in crowd] == [0] * PROCESSES
    assert table.live() == 0
    claimed = [ticket for a in answers for ticket in a["claimed"]]
    assert len(claimed) == len(set(claimed)) > 100, "no ticket was given twice"
    assert all(a["cancelled"] > 0 and a["refused"] > 0 for a in answers), "everything happened"
    check_owners([tuple(r) for a in answers for r in a["ran"]])


def check_owners(ran: list[tuple[int, int, int]]) -> None:
    """No slot had two owners at a time."""
    for slot in {ticket % CAPACITY for ticket, _, _ in ran}:
        spans = sorted((begin, end) for ticket, begin, end in ran if ticket % CAPACITY == slot)
        assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))


def test_the_check_sees_two_owners() -> None:
    with pytest.raises(AssertionError):
        check_owners([(CAPACITY, 0, 10), (2 * CAPACITY, 5, 15)])
