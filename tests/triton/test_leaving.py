"""Requests that their caller leaves: the real server stops them, wherever they are."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from fluxserve_client import AsyncClient, Client, DeadlineExceeded

from fluxserve.supervisor import TritonServer
from tests.triton.conftest import LONG, PATIENCE, counters, plain, running, wait_for

pytestmark = pytest.mark.xdist_group("triton")

PROTOCOLS = pytest.mark.parametrize("protocol", ["grpc", "http"])


def url(server: TritonServer, protocol: str) -> str:
    return f"{protocol}://{server.grpc_url if protocol == 'grpc' else server.http_url}"


def state(server: TritonServer, request_id: str) -> str:
    return plain(server, "grpc").control(request_id, "status")[0]


def cancellations(server: TritonServer) -> float:
    return sum(value for name, value in counters(server).items() if "cancellations" in name)


@PROTOCOLS
def test_a_timeout_while_queued(server: TritonServer, protocol: str) -> None:
    """Cancelled where it waits: the request before it goes on."""
    probe = plain(server, "grpc")
    with running(probe, "ahead") as ahead:
        with Client(url(server, protocol)) as client, pytest.raises(DeadlineExceeded) as caught:
            client.generate("a fox", request_id="behind", timeout=0.5)
        assert not hasattr(caught.value, "__notes__"), "the server confirmed"
        assert state(server, "ahead") == "running"
        assert state(server, "behind") in ("cancelling", "unknown")
        probe.control("ahead", "cancel")
        ahead.result(PATIENCE)
    wait_for(lambda: state(server, "behind") == "unknown")


def test_tritons_own_timeout_has_no_effect(server: TritonServer) -> None:
    """Neither while a request waits nor while it runs: the README says so, and what to do in its place."""
    probe = plain(server, "grpc")
    with running(probe, "ahead") as ahead, ThreadPoolExecutor(1) as pool:
        behind = pool.submit(probe.call, "flux", {"prompt": "a fox", "height": 64, "width": 64}, "behind", timeout=1)
        wait_for(lambda: state(server, "behind") == "queued")
        probe.control("ahead", "cancel")
        ahead.result(PATIENCE)
        assert len(behind.result(PATIENCE)["images"]) == 1


@PROTOCOLS
def test_the_end_of_an_event_loop(server: TritonServer, protocol: str) -> None:
    async def main() -> None:
        client = AsyncClient(url(server, protocol))
        task = asyncio.create_task(client.generate("a fox", request_id="left", **LONG))
        async with asyncio.timeout(PATIENCE):
            while (await client.status("left")).step < 2:
                await asyncio.sleep(0.01)
        assert not task.done()

    before = cancellations(server)
    asyncio.run(main())
    wait_for(lambda: state(server, "left") == "unknown")
    wait_for(lambda: cancellations(server) == before + 1)


@PROTOCOLS
def test_close_from_another_thread(server: TritonServer, protocol: str) -> None:
    client, before = Client(url(server, protocol)), cancellations(server)

    def close() -> None:
        wait_for(lambda: state(server, "closed") == "running")
        client.close()

    closer = threading.Thread(target=close)
    closer.start()
    with pytest.raises(RuntimeError, match="this client was closed before the answer came"):
        client.generate("a fox", request_id="closed", **LONG)
    closer.join()
    wait_for(lambda: cancellations(server) == before + 1)
