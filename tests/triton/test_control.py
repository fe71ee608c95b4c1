"""Status and cancel against the live server, by both protocols, by hand and through the client distribution."""

import asyncio
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fluxserve_client import AsyncClient
from fluxserve_client import errors as client_errors
from tritonclient.utils import InferenceServerException

from fluxserve import contract, inflight
from fluxserve.supervisor import TritonServer
from tests.triton.conftest import LONG, PATIENCE, PlainClient, code_of, plain, running, status_of, tensors, wait_for

pytestmark = pytest.mark.xdist_group("triton")


def test_status_follows_the_steps(client: PlainClient) -> None:
    seen: list[tuple[str, int, int]] = []
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(
            client.draw, request_id="follow", height=128, width=128, num_inference_steps=50, num_images=2
        )
        while not future.done():
            seen.append(client.control("follow", "status"))
        future.result()
    steps = [step for state, step, of in seen if state == "running" and of == 100]
    assert len(set(steps)) > 10
    assert steps == sorted(steps)
    assert client.control("follow", "status") == ("unknown", 0, 0)


def test_cancel_a_running_request(client: PlainClient, server: TritonServer) -> None:
    with running(client, "doomed") as future:
        state, at, of = client.control("doomed", "cancel")
        assert (state, of) == ("cancelling", 100)
        answer = future.result(PATIENCE)
    assert code_of(answer) == "CANCELLED"
    stopped = int(answer[1].split("at step ")[1].split()[0])
    assert at <= stopped <= at + 2, "the worker is free within two steps"
    assert client.control("doomed", "status")[0] == "unknown"
    begin = time.monotonic()
    client.draw(height=64, width=64, num_inference_steps=1)
    assert time.monotonic() - begin < 5.0, "the next one runs at once: the cancelled one had ten seconds and more to go"


def test_cancel_a_waiting_request(client: PlainClient) -> None:
    with running(client, "first") as first, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.refused, lambda: client.draw(request_id="second", **LONG))
        wait_for(lambda: client.control("second", "status")[0] == "queued")
        assert client.control("second", "cancel")[0] == "cancelling"
        assert client.control("first", "status")[0] == "running"
        client.control("first", "cancel")
        assert code_of(first.result(PATIENCE)) == code_of(waiting.result(PATIENCE)) == "CANCELLED"


def test_cancelling_one_of_a_batch_leaves_the_other(server: TritonServer) -> None:
    client = plain(server, "grpc")
    size = {"height": 256, "width": 256, "num_inference_steps": 40}
    with running(client, "ahead") as ahead, ThreadPoolExecutor(2) as pool:
        out = pool.submit(client.refused, lambda: client.draw(request_id="out", seed=1, **size))
        stay = pool.submit(client.draw, request_id="stay", seed=2, **size)
        wait_for(lambda: client.control("stay", "status")[0] == client.control("out", "status")[0] == "queued")
        client.control("ahead", "cancel")
        assert code_of(ahead.result(PATIENCE)) == "CANCELLED"
        client.control("out", "cancel")
        assert code_of(out.result(PATIENCE)) == "CANCELLED"
        together = stay.result(PATIENCE)["images"][0]
    assert together == client.draw(seed=2, **size)["images"][0]


def test_an_id_in_use_is_refused(client: PlainClient) -> None:
    with running(client, "mine") as future:
        refusal = client.refused(lambda: client.draw(request_id="mine"))
        assert code_of(refusal) == "ALREADY_EXISTS"
        assert "'mine' is in use by a running request" in refusal[1]
        client.control("mine", "cancel")
        future.result(PATIENCE)
    assert client.draw(request_id="mine", height=64, width=64, num_inference_steps=1)["images"].shape == (1,)


def test_an_unknown_id(client: PlainClient) -> None:
    assert client.control("nobody", "status") == ("unknown", 0, 0)
    assert client.control("nobody", "cancel") == ("unknown", 0, 0)


def test_a_full_queue_is_unavailable(server: TritonServer) -> None:
    client = plain(server, "grpc")
    with running(client, "hog") as hog:
        waiting = [server.table.claim(f"filler-{k}") for k in range(contract.MAX_WAITING)]
        try:
            for protocol in ("grpc", "http"):
                status, message = plain(server, protocol).refused(lambda p=protocol: plain(server, p).draw())
                assert status == "UNAVAILABLE"
                assert f"queue: {contract.MAX_WAITING} requests are waiting; at most {contract.MAX_WAITING}" in message
        finally:
            for ticket in waiting:
                server.table.release(ticket)
        client.control("hog", "cancel")
        hog.result(PATIENCE)


def test_grpc_cancel_of_generate_itself(server: TritonServer) -> None:
    """Called without the ensemble, with what `prepare` gave, `generate` sees gRPC's own cancellation."""
    import tritonclient.grpc as triton

    client = plain(server, "grpc")
    job = client.call("prepare", {"prompt": "a fox", **LONG}, "inner")
    ended = threading.Event()
    with triton.InferenceServerClient(server.grpc_url) as c:
        call = c.async_infer("generate", tensors("grpc", job), lambda result, error: ended.set())
        wait_for(lambda: client.control("inner", "status")[1] > 1)
        assert not ended.is_set()
        call.cancel()
        assert ended.wait(PATIENCE)
    wait_for(lambda: client.control("inner", "status")[0] == "unknown", 5.0)


@pytest.mark.slow
def test_a_thousand_abandoned_requests_leak_nothing(server: TritonServer) -> None:
    """Sent, and their callers gone at once: the slots come back, and the next request runs."""

    async def abandon(client: AsyncClient, k: int) -> None:
        task = asyncio.create_task(
            client.generate("a fox", height=64, width=64, num_inference_steps=2, request_id=f"gone-{k}")
        )
        await asyncio.sleep(0.002 * (k % 7))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def crowd() -> None:
        async with AsyncClient(f"grpc://{server.grpc_url}") as client:
            for first in range(0, 1000, 50):
                await asyncio.gather(*(abandon(client, k) for k in range(first, first + 50)))

    asyncio.run(crowd())
    # The cancelled ones leave Triton's queue as `generate` gets to them; until then one more may be refused.
    client = plain(server, "http")
    drawn: list[int] = []

    def draws() -> bool:
        try:
            drawn.append(len(client.draw(height=64, width=64)["images"]))
        except InferenceServerException as error:
            if status_of(error) != "UNAVAILABLE":
                raise
        return bool(drawn)

    wait_for(draws, PATIENCE)
    wait_for(lambda: server.table.live() == 0, inflight.HANDOVER_S + PATIENCE)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
async def test_the_client_cancels_when_its_task_is(server: TritonServer, protocol: str) -> None:
    url = server.grpc_url if protocol == "grpc" else server.http_url
    steps: list[int] = []
    async with AsyncClient(f"{protocol}://{url}") as client:
        task = asyncio.create_task(
            client.generate("a fox", request_id=f"task-{protocol}", progress=lambda p: steps.append(p.step), **LONG)
        )
        while not steps or steps[-1] < 2:
            assert not task.done(), task
            await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await asyncio.to_thread(wait_for, lambda: server.table.status(f"task-{protocol}").state == "unknown", 5.0)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
async def test_the_client_cancels_at_its_deadline(server: TritonServer, protocol: str) -> None:
    url = server.grpc_url if protocol == "grpc" else server.http_url
    async with AsyncClient(f"{protocol}://{url}") as client:
        with pytest.raises(client_errors.DeadlineExceeded):
            await client.generate("a fox", timeout=0.5, request_id=f"late-{protocol}", **LONG)
    await asyncio.to_thread(wait_for, lambda: server.table.status(f"late-{protocol}").state == "unknown", 5.0)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_ctrl_c_stops_the_work(server: TritonServer, protocol: str, tmp_path: Path) -> None:
    """The client's command line, interrupted as a user would."""
    url = server.grpc_url if protocol == "grpc" else server.http_url
    size = [f"--{name.replace('_', '-')}={value}" for name, value in LONG.items() if name != "num_inference_steps"]
    command = [sys.executable, "-m", "fluxserve_client", "generate", "a fox", "--url", f"{protocol}://{url}"]
    request_id = f"interrupted-{protocol}"
    process = subprocess.Popen(
        [*command, *size, "--steps", "100", "--request-id", request_id, "-o", str(tmp_path / "x.png")]
    )
    try:
        wait_for(lambda: server.table.status(request_id).step >= 2)
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130
    finally:
        process.kill()
    wait_for(lambda: server.table.status(request_id).state == "unknown", 5.0)


@pytest.mark.parametrize("protocol", ["grpc", "http"])
async def test_the_client_knows_the_errors(server: TritonServer, protocol: str) -> None:
    url = server.grpc_url if protocol == "grpc" else server.http_url
    async with AsyncClient(f"{protocol}://{url}") as client:
        with pytest.raises(client_errors.InvalidRequest, match="height: got 17; allowed"):
            await client.generate("a fox", height=17)
        task = asyncio.create_task(client.generate("a fox", request_id="twice", **LONG))
        while (await client.status("twice")).step < 1:
            assert not task.done(), task
            await asyncio.sleep(0.05)
        with pytest.raises(client_errors.RequestIdInUse):
            await client.generate("a fox", request_id="twice")
        await client.cancel("twice")
        with pytest.raises(client_errors.Cancelled):
            await task
