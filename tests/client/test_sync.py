"""The blocking client: the same calls, inside event loops and threads, and Ctrl-C."""

from __future__ import annotations

import inspect
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from fluxserve_client import AsyncClient, Client, DeadlineExceeded, MockTransport, Progress, State, Unavailable

from tests.client.fakes import FakeFlux, Wire


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_the_whole_client(fake: FakeFlux) -> None:
    transport = MockTransport(fake)
    fake.steps, fake.step_s = 5, 0.02
    seen: list[Progress] = []
    with Client(transport=transport, poll_interval=0.01) as client:
        assert client.ready()
        assert client.generate("a fox", seed=7, progress=seen.append).seeds == (7,)
        assert client.status("x").state is client.cancel("x") is State.UNKNOWN
        with pytest.raises(DeadlineExceeded):
            client.generate("a fox", timeout=0.01)
    assert seen
    assert transport.closed
    client.close()  # once more does no harm
    with pytest.raises(RuntimeError, match="closed"):
        client.ready()
    assert not [thread for thread in threading.enumerate() if thread.name == "fluxserve-client"]


async def test_inside_a_running_event_loop(fake: FakeFlux) -> None:
    with Client(transport=MockTransport(fake)) as client:
        assert client.generate("a fox").image


def test_threads_share_one(fake: FakeFlux, wire: Wire) -> None:
    with Client(wire.url("grpc")) as client, ThreadPoolExecutor(8) as pool:
        seeds = pool.map(lambda seed: client.generate("a fox", seed=seed).seed, range(32))
        assert list(seeds) == list(range(32))


def test_a_call_from_its_own_callback_is_refused(fake: FakeFlux) -> None:
    fake.steps, fake.step_s = 1000, 0.01
    with (
        Client(transport=MockTransport(fake), poll_interval=0.01) as client,
        pytest.raises(RuntimeError, match="called from a progress callback"),
    ):
        client.generate("a fox", request_id="x", progress=lambda now: print(client.ready()))
    assert fake.actions[-1] == ("x", "cancel")


def test_methods_keep_signature_and_documentation() -> None:
    for name in ("generate", "status", "cancel", "ready"):
        ours, theirs = getattr(Client, name), getattr(AsyncClient, name)
        assert inspect.signature(ours) == inspect.signature(theirs)
        assert ours.__doc__ == theirs.__doc__
    assert str(inspect.signature(Client)) == str(inspect.signature(AsyncClient))


PROGRAM = """
import sys
from fluxserve_client import Client
with Client(sys.argv[1], cancel_timeout=0.5) as client:
    try:
        client.generate("a fox", request_id="x")
    except KeyboardInterrupt as stopped:
        print("stopped", getattr(stopped, "__notes__", []))
"""


def interrupted(url: str, fake: FakeFlux) -> str:
    command = [sys.executable, "-c", PROGRAM, url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        until(lambda: fake.table)
        process.send_signal(signal.SIGINT)
        return process.communicate(timeout=20)[0].strip()


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_ctrl_c_stops_the_server_first(fake: FakeFlux, wire: Wire, protocol: str) -> None:
    fake.steps, fake.step_s = 2000, 0.01
    assert interrupted(wire.url(protocol), fake) == "stopped []"
    assert ("x", "cancel") in fake.actions
    until(lambda: not fake.table)


def test_ctrl_c_tells_what_could_not_be_stopped(fake: FakeFlux, wire: Wire) -> None:
    fake.steps, fake.step_s = 200, 0.01
    fake.control_error = Unavailable("control is gone", status="UNAVAILABLE")
    assert "stopped ['request x may still run" in interrupted(wire.url("http"), fake)
