"""The table of the models' processes: who is there, who is dead, who hangs, and who only could not be looked at."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fluxserve import process
from fluxserve.errors import ServerError
from fluxserve.serving import processes
from fluxserve.serving.processes import LOADING_SILENCE_S, SILENCE_S, Heartbeat, Pace, ProcessTable

ROOT = Path(__file__).parents[2]

# Loads, says so, and then does what it reads.
WORKER = """
import ctypes, sys
from pathlib import Path
from fluxserve.serving.processes import Heartbeat, ProcessTable
heartbeat = Heartbeat(ProcessTable(Path(sys.argv[1])), "generate")
heartbeat.loaded()
print("loaded", flush=True)
for line in sys.stdin:
    exec(line)
"""
HOLD_THE_LOCK = "ctypes.PyDLL(None).usleep(60_000_000)\n"


@contextmanager
def worker(table: ProcessTable) -> Iterator["subprocess.Popen[str]"]:
    with subprocess.Popen(
        [sys.executable, "-c", WORKER, str(table.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as running:
        assert running.stdout is not None and running.stdout.readline() == "loaded\n"
        yield running
        running.kill()


def told(table: ProcessTable, patience: float = 20.0) -> str:
    """What is wrong, once something is."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if trouble := table.trouble():
            return trouble
        time.sleep(0.05)
    raise AssertionError("nothing was said")


class Clock:
    """Nanoseconds that only pass when they are told to."""

    def __init__(self) -> None:
        self.ns = 10**12

    def __call__(self) -> int:
        return self.ns

    def sleep(self, seconds: float) -> None:
        self.ns += int(seconds * 1e9)


@pytest.fixture
def table(tmp_path: Path) -> ProcessTable:
    return ProcessTable(tmp_path / "table")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def mine(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Heartbeat]:
    """This process's own entry, whose beats come only with the clock of the test."""
    monkeypatch.setattr(processes, "BEAT_S", 3600.0)
    heartbeat = Heartbeat(ProcessTable(tmp_path / "mine", clock), "prepare")
    yield heartbeat
    heartbeat.close()


def test_who_is_there(table: ProcessTable) -> None:
    other = ProcessTable(table.path)
    heartbeat = Heartbeat(table, "generate")
    assert other.pids("generate") == [], "it has not loaded yet"
    assert not other.gone()
    heartbeat.loaded()
    assert other.pids("generate") == [os.getpid()] and other.pids("prepare") == []
    heartbeat.close()
    assert other.pids("generate") == [] and other.gone()


def test_a_dead_process(table: ProcessTable) -> None:
    with worker(table) as running:
        assert table.trouble() is None
        running.kill()
        os.waitid(os.P_PID, running.pid, os.WEXITED | os.WNOWAIT)  # a zombie is dead
        assert told(table) == "a process of generate died" and table.gone()
        table.reset()
        assert table.trouble() is None and table.pids("generate") == []


def test_a_stopped_process(table: ProcessTable) -> None:
    with worker(table) as running:
        running.send_signal(signal.SIGSTOP)
        assert told(table).startswith("a process of generate is stopped: no sign of life for")
        assert table.trouble(fresh_ns=time.monotonic_ns()) is None, "who was paused too grants a new bound"
        running.send_signal(signal.SIGCONT)
        time.sleep(3 * processes.BEAT_S)
        assert table.trouble() is None


def test_a_process_that_holds_the_interpreters_lock(table: ProcessTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "SILENCE_S", 2.0)
    with worker(table) as running:
        assert running.stdin is not None
        running.stdin.write(HOLD_THE_LOCK)
        running.stdin.flush()
        assert told(table).startswith("a process of generate hangs: no sign of life for")
        assert not process.stopped(running.pid)


def test_silence(mine: Heartbeat, clock: Clock) -> None:
    table = mine._table
    clock.sleep(LOADING_SILENCE_S - 1)
    assert table.trouble() is None
    clock.sleep(2)
    assert table.trouble() == f"a process of prepare hangs: no sign of life for {LOADING_SILENCE_S + 1:.1f} s"
    assert table.trouble(fresh_ns=clock.ns) is None
    mine.loaded()
    assert table.trouble(fresh_ns=clock.ns - int((SILENCE_S + 1) * 1e9)) is not None


def test_progress_that_was_promised(mine: Heartbeat, clock: Clock) -> None:
    """A thread beats on beside a device that hangs."""
    table = mine._table
    mine.begin(3.0)
    assert table.busy()
    clock.sleep(2)
    mine.progress(5.0)
    clock.sleep(4.9)
    assert table.trouble() is None
    clock.sleep(0.2)
    assert table.trouble() == "a process of prepare hangs: no progress for 5.1 s, where it promised some within 5.0 s"
    assert table.trouble(fresh_ns=clock.ns) is None
    mine.begin(1.0)
    mine.end()
    assert table.busy(), "one of two is answered"
    mine.end()
    clock.sleep(9)
    assert not table.busy() and table.trouble() is None


def test_a_pace_learns_from_steps(mine: Heartbeat, clock: Clock) -> None:
    pace = Pace(mine, warm_up_s=10.0, clock=lambda: clock.ns / 1e9)

    def promised() -> float:
        return float(mine._entry["promised_ns"][0]) / 1e9

    pace.begin()
    assert promised() == 200, "nothing is known but the warm-up"
    pace.draw()
    pace.step(last=False)
    assert promised() == 200, "the first step has the encoders before it"
    clock.sleep(2)
    pace.step(last=False)
    assert promised() == 20
    clock.sleep(0.1)
    pace.step(last=False)
    assert promised() == 20, "the slowest counts"
    pace.step(last=True)
    assert promised() == 200, "the VAE comes next"
    pace.draw()
    for _ in range(3):
        clock.sleep(0.001)
        pace.step(last=False)
    assert promised() == Pace.LEAST_S
    pace.end()
    assert promised() == 0
    assert Pace(mine, warm_up_s=0.1)._unknown_s == Pace.UNKNOWN_LEAST_S


def test_the_file_is_private_and_of_one_version(table: ProcessTable, tmp_path: Path) -> None:
    assert table.path.stat().st_mode & 0o777 == 0o600
    assert table.path.stat().st_blocks * 512 >= table.path.stat().st_size, "its pages are there"
    (tmp_path / "short").write_bytes(b"x")
    with pytest.raises(ServerError, match="short: 1 bytes; this version's table has"):
        ProcessTable(tmp_path / "short")
    (tmp_path / "link").symlink_to(table.path)
    with pytest.raises(OSError, match="link"):
        ProcessTable(tmp_path / "link")


def test_the_time_between_two_pictures_of_all_gpus(table: ProcessTable) -> None:
    assert table.seconds_each() == 0.0
    mine = Heartbeat(table, "generate")
    assert table.seconds_each() == 0.0, "it has not said"
    mine.draws_in(2.0)
    assert table.seconds_each() == pytest.approx(2.0)
    with worker(table) as other:
        assert other.stdin is not None and other.stdout is not None
        other.stdin.write("heartbeat.draws_in(2.0); print('said', flush=True)\n")
        other.stdin.flush()
        assert other.stdout.readline() == "said\n"
        assert table.seconds_each() == pytest.approx(1.0)
    other.wait()
    assert table.seconds_each() == pytest.approx(2.0), "the dead draw nothing"
    mine.close()
    assert table.seconds_each() == 0.0
