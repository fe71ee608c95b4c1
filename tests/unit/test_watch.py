"""The watch over a server that is only said to be one: what counts as a death, what is given up, what is waited for."""

from collections.abc import Callable
from typing import Any

import pytest

from fluxserve.errors import ServerError
from fluxserve.inflight import Status
from fluxserve.supervisor import watch
from fluxserve.supervisor.server import READY_TIMEOUT_S
from fluxserve.supervisor.watch import RESTARTS_WITHIN_S, Watch

LOADS_S = 3.0


class Server:
    """Loads for a while whenever it is started; the rest is what a test says."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.table = self
        self.troubles: dict[float, str] = {}
        self.starts: list[float] = []
        self.refuses: list[ServerError] = []
        self.loads = LOADS_S
        self.holds, self.drains_at, self.draining = 100 << 20, 0.0, False
        self.lost: list[tuple[str, Status]] = []

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def trouble(self) -> str | None:
        due = [at for at in self.troubles if at <= self.now]
        return self.troubles.pop(due[0]) if due else None

    def kill(self, hurry: Callable[[], bool]) -> None:
        assert hurry() in (True, False)
        self.lost, self.draining = [], False

    def start(self) -> None:
        self.starts.append(self.now)
        if self.refuses:
            self.troubles[self.now] = "tritonserver ended with SIGKILL"
            raise self.refuses.pop()

    def why(self) -> str:
        return ": its log says so"

    def late(self, seconds: float) -> str:
        return f"tritonserver was not ready within {seconds:.0f} s: generate did not load"

    def is_up(self) -> bool:
        return self.now - self.starts[-1] >= self.loads

    def requests(self) -> list[tuple[str, Status]]:
        return self.lost

    def memory(self) -> int:
        return self.holds

    def drain(self) -> None:
        self.draining = True

    def drained(self) -> bool:
        return self.now >= self.drains_at


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    made = Server()
    monkeypatch.setattr(watch.time, "monotonic", lambda: made.now)
    monkeypatch.setattr(watch.time, "sleep", made.sleep)
    return made


def watched(server: Any, seconds: float, **options: Any) -> list[str]:
    """What the watch reports in so many seconds."""
    end, reports = server.now + seconds, list[str]()
    Watch(server, lambda: server.now >= end, reports.append, **options).run()
    return reports


def test_nothing_happens(server: Server) -> None:
    assert watched(server, 3600) == [] and server.starts == []


def test_a_death_while_it_loads_is_one_of_four(server: Server) -> None:
    server.troubles = {1010.0: "a died", 1011.0: "b hangs", 1012.0: "c died"}
    assert watched(server, 60)[-1] == f"tritonserver is back after {LOADS_S:.1f} s"
    assert len(server.starts) == 3
    server.troubles = {1100.0 + k: "d died" for k in range(4)}
    with pytest.raises(ServerError, match=r"d died: its log says so, the 4th death in 3 s; giving up"):
        watched(server, 60)


def test_a_death_while_it_loads_has_the_reason_that_the_log_gives(server: Server) -> None:
    server.troubles = {1010.0: "a died", 1011.0: "b died"}
    first, second, _ = watched(server, 60)
    assert first.startswith("a died; starting it again") and second.startswith("b died: its log says so; starting")


def test_deaths_long_ago_do_not_count(server: Server) -> None:
    server.troubles = {1000 + k * RESTARTS_WITHIN_S / 2.9: f"{k} died" for k in range(12)}
    assert sum("is back" in line for line in watched(server, 5 * RESTARTS_WITHIN_S)) == 12


def test_a_start_that_is_refused_is_tried_again(server: Server) -> None:
    """Somebody has taken the port meanwhile."""
    server.troubles = {1010.0: "a died"}
    server.refuses = [ServerError("--http-port: can't be had")] * 2
    reports = watched(server, 60)
    assert reports.count("--http-port: can't be had") == 2 and "is back" in reports[-1]
    server.troubles, server.refuses = {server.now: "a died"}, [ServerError("--http-port: can't be had")] * 9
    with pytest.raises(ServerError, match="giving up"):
        watched(server, 60)


def test_a_load_that_never_ends_is_a_death(server: Server) -> None:
    server.troubles, server.loads = {1010.0: "a died"}, 1e9
    reports = watched(server, READY_TIMEOUT_S + 60)
    assert reports[-1].startswith("tritonserver was not ready within 600 s: generate did not load")
    assert len(server.starts) == 2


def test_memory_is_drained_and_no_death(server: Server) -> None:
    server.holds = 300 << 20
    reports: list[str] = []
    begin, end = server.now, server.now + 100

    def stopping() -> bool:
        if server.starts:
            server.holds = 100 << 20
        elif server.now - begin > 10:
            server.holds, server.drains_at = 500 << 20, begin + 30
        return server.now >= end

    Watch(server, stopping, reports.append, memory_limit=400 << 20).run()  # type: ignore[arg-type]
    held, back = reports
    assert held.startswith("tritonserver holds 500 MiB, more than the limit of 400 MiB") and "is back" in back
    assert len(server.starts) == 1 and server.starts[0] >= begin + 30, "what was admitted is answered first"
    assert not server.draining


def test_draining_ends_with_its_timeout_and_with_a_death(server: Server) -> None:
    server.holds, server.drains_at = 300 << 20, 1e9
    kept = Watch(server, lambda: len(server.starts) == 1, [].append, 400 << 20, drain_timeout=20)  # type: ignore[arg-type]
    server.holds = 500 << 20
    begin = server.now
    kept.run()
    assert 20 < server.now - begin < 25
    server.starts, server.holds = [], 300 << 20
    server.troubles = {server.now + 10: "a died"}
    kept = Watch(server, lambda: len(server.starts) == 1, [].append, 400 << 20, drain_timeout=999)  # type: ignore[arg-type]
    server.holds, begin = 500 << 20, server.now
    kept.run()
    assert 10 <= server.now - begin < 15


def test_a_limit_below_what_is_loaded_is_given_up(server: Server) -> None:
    reports = watched(server, 60, memory_limit=50 << 20)
    assert reports == ["memory limit: 50 MiB are less than the 100 MiB after loading; not watched"]
    assert server.starts == []


def test_who_was_lost(server: Server) -> None:
    server.troubles = {1010.0: "a died"}
    server.lost = [("order-7", Status("running", 3, 28)), *[(f"w{k}", Status("queued")) for k in range(9)]]
    died, _ = watched(server, 60)
    assert "; lost: 'order-7' (running, step 3 of 28), 'w0' (queued), " in died and died.endswith("and 2 more")
