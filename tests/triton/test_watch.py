"""What the supervisor does when a process dies or hangs, or holds too much memory: a server for each test."""

import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from fluxserve_client import Client, Retry

from fluxserve import process
from fluxserve.errors import ServerError
from fluxserve.serving import processes
from fluxserve.supervisor import TritonServer, memory
from tests.triton.conftest import LONG, READY_S, wait_for
from tests.triton.supervised import SMALL, outcome, serve, supervised, tree

pytestmark = pytest.mark.xdist_group("lifecycle")


TRITONS_OWN_S = 0.9
"""Soon after this Triton itself answers for a dead process, with INTERNAL: on a machine too busy for the watch."""


def draw_with_retries(url: str) -> bytes:
    with Client(url, retry=Retry(attempts=200, most=1)) as client:
        return client.generate("a red apple", **SMALL, request_id="saved").image


def test_a_worker_that_dies_costs_nothing_but_time() -> None:
    """Every request of that time is UNAVAILABLE, readiness says no from the death on, and all comes back."""
    with supervised() as watched, ThreadPoolExecutor(9) as pool:
        server, client = watched.server, watched.client
        lost = [pool.submit(outcome, lambda: client.draw(request_id="orphan", **LONG))]
        wait_for(lambda: client.control("orphan", "status")[1] > 0)
        lost += [pool.submit(outcome, lambda k=k: client.draw(request_id=f"w{k}", **LONG)) for k in range(7)]
        saved = pool.submit(draw_with_retries, server.grpc_url)
        wait_for(lambda: server.table.live() == 9)
        (worker,) = server.processes.pids("generate")
        os.kill(worker, signal.SIGKILL)
        noticed = wait_for(lambda: watched.reports != [])
        wait_for(lambda: worker not in server.processes.pids("generate"))
        seen, ready = set(), set()
        while len(watched.reports) < 2:
            ready.add(server.readiness(None, 0.5) and not server.processes.pids("generate"))
            seen.add(outcome(lambda: client.draw(**SMALL)))
        assert seen <= {"UNAVAILABLE", "OK"} and "UNAVAILABLE" in seen
        assert True not in ready
        late = {"INTERNAL"} if noticed > TRITONS_OWN_S else set()
        assert {each.result(30) for each in lost} <= {"UNAVAILABLE"} | late
        assert len(saved.result(READY_S)) > 1000, "who tries again gets a picture"
        assert server.table.live() == 0 and worker not in server.processes.pids("generate")
        assert client.draw(request_id="orphan", **SMALL)["images"].shape == (1,), "its id is free again"
        died, _ = watched.reports
        assert "a process of generate died" in died and "'orphan' (running, step" in died and "' (queued)" in died


GREEDY = b'{"inputs":[{"name":"seed","shape":[2000000000],"datatype":"INT64","data":[1]}]}'
"""Triton 2.51 allocates 8 bytes an element, 16 GB, before it looks at the data."""


def take_all_memory(server: TritonServer) -> int:
    """Send the request that does, until Triton ends; returns the most that it held."""
    most, pid = 0, server.pid
    head = b"POST /v2/models/flux/infer HTTP/1.1\r\nHost: here\r\nContent-Length: %d\r\n\r\n" % len(GREEDY)
    with socket.create_connection(("127.0.0.1", server.ports.http)) as connection:
        connection.sendall(head + GREEDY)
        deadline = time.monotonic() + READY_S
        while process.started(pid) and time.monotonic() < deadline:
            most = max(most, memory.held(pid, []))
    return most


def loading(server: TritonServer) -> int:
    """One of the processes that have registered and not loaded yet."""
    return int(server.processes._registered()["pid"][0])


def test_the_fourth_death_ends_the_watch_and_no_other() -> None:
    """Whatever dies, also what loads again. After an end of Triton it serves about as soon as at its first start."""
    with supervised() as watched:
        server, begin = watched.server, time.monotonic()
        before = server.pid
        os.kill(server.processes.pids("prepare")[-1], signal.SIGKILL)
        wait_for(lambda: server.pid != before and not server.processes.gone(), READY_S)
        os.kill(loading(server), signal.SIGKILL)
        watched.back(1)
        loads = time.monotonic() - begin
        assert len(watched.deaths()) == 2, watched.reports
        assert watched.client.draw(**SMALL)["images"].shape == (1,)
        assert take_all_memory(server) < 4 << 30, "its limit ends Triton first"
        watched.back(2)
        assert "tritonserver ended with SIGABRT; starting it again; no admitted request was lost" in watched.reports
        assert float(watched.reports[-1].split()[-2]) < 3 * loads + 5
        assert watched.client.control("nobody", "status")[0] == "unknown"
        os.kill(server.processes.pids("control")[0], signal.SIGKILL)
        with pytest.raises(ServerError, match="a process of control died, the 4th death in"):
            watched.watching.result(20)


def test_a_process_that_hangs_is_replaced() -> None:
    """While it draws, and while nothing is to do."""
    with supervised() as watched, ThreadPoolExecutor(1) as pool:
        server, client = watched.server, watched.client
        running = pool.submit(outcome, lambda: client.draw(request_id="hangs", **LONG))
        wait_for(lambda: client.control("hangs", "status")[1] > 0)
        for times in (1, 2):
            (worker,) = server.processes.pids("generate")
            os.kill(worker, signal.SIGSTOP)
            wait_for(lambda: not server.readiness(None, 0.5), processes.STOPPED_SILENCE_S + 10)
            watched.back(times)
            assert "a process of generate is stopped: no sign of life for" in watched.reports[2 * times - 2]
            assert client.draw(**SMALL)["images"].shape == (1,)
        assert running.result(0) == "UNAVAILABLE"
        assert "'hangs' (running" in watched.reports[0]


def test_a_pause_of_everybody_costs_nothing_and_a_second_signal_all() -> None:
    """A paused container: the supervisor, Triton and its models stop and go on, and the running picture arrives.

    Then two signals: the first finishes what runs, the second ends it.
    """
    with serve() as served, ThreadPoolExecutor(1) as pool:
        client = served.client
        running = pool.submit(client.draw, request_id="paused", **LONG)
        wait_for(lambda: client.control("paused", "status")[1] > 0)
        everybody = sorted(tree(served.process.pid))
        for pid in everybody:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(6)
        for pid in everybody:  # the supervisor first: it sees the others stopped for a moment
            os.kill(pid, signal.SIGCONT)
        assert running.result(120)["images"].shape == (1,)
        assert not served.said("starting it again")
        lost = pool.submit(outcome, lambda: client.draw(request_id="lost", **LONG))
        wait_for(lambda: client.control("lost", "status")[1] > 0)
        served.process.send_signal(signal.SIGTERM)
        wait_for(lambda: served.said("stopping"))
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(10) == 0
        assert lost.result(10) == "UNAVAILABLE"


def test_a_signal_is_heard_while_models_load_again() -> None:
    """Also where they never will: the process that loads is stopped."""
    with serve() as served:
        (worker,) = served.models("generate")
        os.kill(worker, signal.SIGKILL)
        wait_for(lambda: served.said("starting it again"))
        wait_for(lambda: served.models("generate") - {worker}, READY_S)
        os.kill(*served.models("generate"), signal.SIGSTOP)
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(20) == 0


def test_too_much_memory_is_drained_and_given_back() -> None:
    """At a limit the door closes, what runs is finished, and a new server takes over: no death, nothing lost."""
    with supervised(grows=24 << 20) as watched, ThreadPoolExecutor(1) as pool:
        server, client = watched.server, watched.client
        before = server.pid
        assert pool.submit(outcome, lambda: client.draw(request_id="large", **LONG)).result(READY_S) == "OK"
        watched.back(1)
        assert "more than the limit of" in watched.reports[0] and watched.deaths() == []
        assert server.pid != before and not server.table.draining
        assert client.draw(**SMALL)["images"].shape == (1,), "the door is open again"
