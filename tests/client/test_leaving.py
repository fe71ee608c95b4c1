"""Every way to leave a call early: the wait ends, and the server hears of it."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import re
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from textwrap import dedent

import pytest
from fluxserve_client import AsyncClient, Client, DeadlineExceeded, MockTransport, Progress

from tests.client.fakes import FakeFlux, Wire

PROTOCOLS = pytest.mark.parametrize("protocol", ["grpc", "http"])
SOON_S = 20.0  # far beyond what a loaded machine takes


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.fixture
def endless(fake: FakeFlux) -> FakeFlux:
    fake.steps, fake.step_s = 100_000, 0.01
    return fake


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", dedent(program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def said(program: str, *arguments: str) -> str:
    ended = run(program, *arguments)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


# --- out of a callback ------------------------------------------------------------------------------------------------

Callback = Callable[[Progress], Awaitable[None] | None]


def plainly(error: BaseException) -> Callback:
    def callback(now: Progress) -> None:
        raise error

    return callback


def awaited(error: BaseException) -> Callback:
    async def callback(now: Progress) -> None:
        await asyncio.sleep(0)
        raise error

    return callback


@pytest.mark.parametrize("make", [plainly, awaited])
@pytest.mark.parametrize(
    ("kind", "raised"),
    [(kind, kind) for kind in (ValueError, TimeoutError, KeyboardInterrupt, SystemExit, asyncio.CancelledError)]
    + [(kind, RuntimeError) for kind in (StopIteration, GeneratorExit)],
)
def test_what_leaves_a_callback_ends_the_wait(
    endless: FakeFlux,
    kind: type[BaseException],
    raised: type[BaseException],
    make: Callable[[BaseException], Callback],
) -> None:
    with Client(transport=MockTransport(endless), poll_interval=0.01) as client:
        with pytest.raises(raised):
            client.generate("a fox", request_id="x", progress=make(kind("enough")))
        assert endless.actions[-1] == ("x", "cancel")
        assert client.ready(), "the client goes on"


@PROTOCOLS
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_what_leaves_a_callback_of_asyncio_stops_the_server_first(
    endless: FakeFlux, wire: Wire, protocol: str, kind: type[BaseException]
) -> None:
    async def main() -> None:
        async with AsyncClient(wire.url(protocol), poll_interval=0.01) as client:
            await client.generate("a fox", request_id="x", progress=plainly(kind("enough")))

    with pytest.raises(kind):
        asyncio.run(main())
    until(lambda: endless.ended == [("x", "cancelled")])


async def test_an_asynchronous_callback_is_awaited(fake: FakeFlux) -> None:
    fake.steps, fake.step_s = 10, 0.02
    seen: list[Progress] = []

    async def callback(now: Progress) -> None:
        await asyncio.sleep(0)
        seen.append(now)

    async with AsyncClient(transport=MockTransport(fake), poll_interval=0.01) as client:
        await client.generate("a fox", progress=callback)
    assert seen


def test_a_timeout_holds_while_a_callback_blocks(endless: FakeFlux) -> None:
    goes_on = threading.Event()
    transport = MockTransport(endless)
    with Client(transport=transport, poll_interval=0.01, cancel_timeout=0.1) as client:
        with pytest.raises(DeadlineExceeded, match="a progress callback holds the client's thread") as caught:
            client.generate("a fox", request_id="x", timeout=0.2, progress=lambda now: goes_on.wait(SOON_S) and None)
        assert "until that callback returns" in caught.value.__notes__[0]
        goes_on.set()
        until(lambda: endless.actions[-1] == ("x", "cancel"))


@pytest.mark.parametrize("timeout", [float("nan"), "soon"])
def test_a_timeout_that_is_none_is_refused(fake: FakeFlux, timeout: float) -> None:
    with Client(transport=MockTransport(fake)) as client:
        with pytest.raises((TypeError, ValueError)):
            client.generate("a fox", timeout=timeout)
        with pytest.raises(DeadlineExceeded):
            client.generate("a fox", timeout=-1)
    assert not fake.table


# --- out of the event loop and the thread ----------------------------------------------------------------------------


def test_a_callback_that_stops_the_event_loop(endless: FakeFlux) -> None:
    with Client(transport=MockTransport(endless), poll_interval=0.01) as client:
        with pytest.raises(RuntimeError, match="event loop was ended before the answer came"):
            client.generate("a fox", request_id="x", progress=lambda now: asyncio.get_running_loop().stop())
        assert endless.actions[-1] == ("x", "cancel")
        assert client.ready(), "the client goes on"


def test_an_exception_thrown_into_the_thread(endless: FakeFlux, wire: Wire) -> None:
    """As libraries do it that give functions a time limit."""

    def kill() -> None:
        until(lambda: endless.table)
        (thread,) = (each for each in threading.enumerate() if each.name == "fluxserve-client")
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))

    with Client(wire.url("http"), poll_interval=0.01) as client:
        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises((RuntimeError, SystemExit)):
            client.generate("a fox", request_id="x", progress=lambda now: None)
        killer.join()
    until(lambda: endless.ended == [("x", "cancelled")])


@PROTOCOLS
def test_the_end_of_an_event_loop_stops_its_requests(endless: FakeFlux, wire: Wire, protocol: str) -> None:
    async def main() -> asyncio.Task[object]:
        client = AsyncClient(wire.url(protocol))
        task: asyncio.Task[object] = asyncio.create_task(client.generate("a fox", request_id="x"))
        while not endless.table:
            await asyncio.sleep(0.01)
        return task

    assert asyncio.run(main()).cancelled()
    until(lambda: endless.ended == [("x", "cancelled")])


def test_a_call_dropped_with_its_event_loop_says_so(endless: FakeFlux, caplog: pytest.LogCaptureFixture) -> None:
    loop = asyncio.new_event_loop()
    client = AsyncClient(transport=MockTransport(endless))
    task = loop.create_task(client.generate("a fox", request_id="x"))
    loop.run_until_complete(asyncio.wait({task}, timeout=0.05))
    with caplog.at_level(logging.WARNING):
        task.get_coro().close()
    assert "request x may still run on the server: its event loop ended" in caplog.text
    for left in asyncio.all_tasks(loop):
        left.cancel()
    loop.run_until_complete(asyncio.sleep(0.05))
    loop.close()


@PROTOCOLS
def test_close_from_another_thread(endless: FakeFlux, wire: Wire, protocol: str) -> None:
    client = Client(wire.url(protocol))

    def close() -> None:
        until(lambda: endless.table)
        client.close()

    closer = threading.Thread(target=close)
    closer.start()
    with pytest.raises(RuntimeError, match="this client was closed before the answer came"):
        client.generate("a fox", request_id="x")
    closer.join()
    until(lambda: endless.ended == [("x", "cancelled")])
    with pytest.raises(RuntimeError, match="this client is closed"):
        client.ready()


@PROTOCOLS
async def test_close_from_another_task(endless: FakeFlux, wire: Wire, protocol: str) -> None:
    client = AsyncClient(wire.url(protocol))
    tasks = [asyncio.create_task(client.generate("a fox", request_id=f"x{k}")) for k in range(3)]
    while len(endless.table) < 3:
        await asyncio.sleep(0.01)
    await client.close()
    assert sorted(name for name, action in endless.actions if action == "cancel") == ["x0", "x1", "x2"]
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(outcome, RuntimeError) and "was closed before" in str(outcome)
    with pytest.raises(RuntimeError, match="this client is closed"):
        await client.status("x")


def test_a_client_that_nobody_closed_keeps_no_thread(fake: FakeFlux) -> None:
    client = Client(transport=MockTransport(fake))
    assert client.ready()
    del client
    gc.collect()
    until(lambda: not [each for each in threading.enumerate() if each.name == "fluxserve-client"])


@PROTOCOLS
def test_the_end_of_the_program_stops_what_daemons_wait_for(endless: FakeFlux, wire: Wire, protocol: str) -> None:
    program = """
        import sys, threading
        from fluxserve_client import Client, State
        client = Client(sys.argv[1])
        threading.excepthook = lambda told: print(told.exc_value)
        threading.Thread(target=client.generate, args=["a fox"], kwargs={"request_id": "x"}, daemon=True).start()
        while client.status("x").state is not State.RUNNING:
            pass
    """
    assert said(program, wire.url(protocol)) in ("", "this client was closed before the answer came")
    until(lambda: endless.ended == [("x", "cancelled")])


# --- forks ------------------------------------------------------------------------------------------------------------

FORK = """
    import asyncio, os, sys
    from fluxserve_client import AsyncClient, Client

    def draw(who):
        try:
            print(who, client.generate("a fox", seed=7, timeout=20).seed, flush=True)
        except RuntimeError as error:
            print(who, error, flush=True)

    client = Client(sys.argv[1])
    if sys.argv[2] == "used":
        draw("before")
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        draw("parent")
        sys.exit(os.waitstatus_to_exitcode(status))
    draw("child")
    sys.exit()  # with every destructor, as gunicorn's workers do
"""


@pytest.mark.parametrize(
    ("protocol", "before", "expected"),
    [
        ("http", "used", "before 7|child 7|parent 7"),
        ("http", "unused", "child 7|parent 7"),
        ("grpc", "unused", "child 7|parent 7"),
        ("grpc", "used", "before 7|child gRPC was used before this process was forked, .*|parent 7"),
    ],
)
def test_a_client_made_before_a_fork(fake: FakeFlux, wire: Wire, protocol: str, before: str, expected: str) -> None:
    lines = said(FORK, wire.url(protocol), before)
    assert re.fullmatch(expected.replace("|", "\n"), lines), lines


def test_a_fork_does_not_disturb_a_running_request(fake: FakeFlux, wire: Wire) -> None:
    """The child shares the parent's sockets and epoll instance, and must not tidy either up."""
    program = """
        import gc, multiprocessing, sys, threading
        from fluxserve_client import Client, State

        def child():
            gc.collect()
            print("child", client.generate("a fox", request_id="child", timeout=20).seed, flush=True)
            client.close()

        client = Client(sys.argv[1])
        answers = []
        drawing = threading.Thread(target=lambda: answers.append(client.generate("a fox", request_id="x", seed=3)))
        drawing.start()
        while client.status("x").state is not State.RUNNING:
            pass
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join()
        drawing.join()
        print("parent", answers[0].seed, process.exitcode)
        client.close()
    """
    fake.steps, fake.step_s = 100, 0.01
    assert said(program, wire.url("http")) == "child 5\nparent 3 0"
    assert sorted(fake.ended) == [("child", "done"), ("x", "done")]


def test_an_async_client_on_both_sides_of_a_fork(fake: FakeFlux, wire: Wire) -> None:
    program = """
        import asyncio, os, sys
        from fluxserve_client import AsyncClient
        client = AsyncClient(sys.argv[1])
        async def draw(who):
            print(who, (await client.generate("a fox", timeout=20)).seed, flush=True)
        asyncio.run(draw("before"))
        child = os.fork()
        if child:
            os.waitpid(child, 0)
        asyncio.run(draw("parent" if child else "child"))
    """
    assert said(program, wire.url("http")) == "before 5\nchild 5\nparent 5"


# --- several event loops ----------------------------------------------------------------------------------------------


@PROTOCOLS
def test_one_async_client_in_several_event_loops(fake: FakeFlux, wire: Wire, protocol: str) -> None:
    """One after the other, and two at the same time."""
    client = AsyncClient(wire.url(protocol))
    both = threading.Barrier(2)

    async def draw(seed: int, meet: bool) -> int:
        first = await client.generate("a fox", seed=seed, timeout=SOON_S)
        if meet:
            both.wait(SOON_S)
        return (await client.generate("a fox", seed=first.seed + 1, timeout=SOON_S)).seed

    assert [asyncio.run(draw(seed, meet=False)) for seed in (1, 2)] == [2, 3]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda seed: asyncio.run(draw(seed, meet=True)), (3, 4))) == [4, 5]


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("way", ["asyncio.run(draw())", "asyncio.run(draw()); asyncio.run(draw())", "blocking()"])
def test_a_client_that_nobody_closed_leaves_nothing_open(fake: FakeFlux, wire: Wire, protocol: str, way: str) -> None:
    program = """
        import asyncio, sys
        from fluxserve_client import AsyncClient, Client
        client = AsyncClient(sys.argv[1])
        async def draw():
            await client.generate("a fox")
        def blocking():
            global client
            client = Client(sys.argv[1])
            client.generate("a fox")
        exec(sys.argv[2])
    """
    ended = run(program, wire.url(protocol), way)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
