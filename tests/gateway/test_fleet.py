"""Which server gets a request: the ready one with the fewest in flight; another one only if nothing was begun."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import pytest
from fluxserve_client import AsyncClient
from fluxserve_client.errors import (
    ConnectionFailed,
    DeadlineExceeded,
    FluxserveError,
    InvalidRequest,
    QueueFull,
    from_status,
)
from fluxserve_gateway import Config, Fleet, Server
from fluxserve_gateway.errors import InvalidField, ModelNotFound, Overloaded

from fluxserve import errors
from tests.client.fakes import FakeFlux, Wire
from tests.gateway.serving import Gateway, server_of, wait_for

REFUSED = from_status("StatusCode.UNAVAILABLE", "failed to connect to all addresses; Connection refused (111)")
BROKEN = from_status("StatusCode.UNAVAILABLE", "Socket closed")


def fleet_of(*fakes: FakeFlux) -> Fleet:
    return Fleet({"m": [server_of(fake, f"grpc://{number}") for number, fake in enumerate(fakes)]})


async def draw(fleet: Fleet, number: int = 0) -> Any:
    return await fleet.draw("m", {"prompt": "a", "seed": number}, request_id=f"r{number}", timeout=10)


async def test_the_fewest_in_flight() -> None:
    fakes = [FakeFlux(steps=1, step_s=60), FakeFlux(), FakeFlux()]
    fleet = fleet_of(*fakes)
    await fleet.probe()
    held = asyncio.create_task(draw(fleet, 0))
    await asyncio.sleep(0.01)
    for number in range(1, 9):
        await draw(fleet, number)
    assert [len(fake.requests) for fake in fakes] == [1, 4, 4]
    assert [server.in_flight for server in fleet.servers] == [1, 0, 0]
    held.cancel()
    await asyncio.wait({held})
    assert fleet.servers[0].in_flight == 0


def unavailable(error: Exception) -> FluxserveError:
    """What the client raises for an error of the server's own."""
    return from_status("StatusCode.UNAVAILABLE", f"in ensemble 'flux', {error}")


NOT_BEGUN = [
    unavailable(errors.Draining()),
    unavailable(errors.QueueFull(64, 64)),
    unavailable(errors.ImagesFull(9, 1)),
    REFUSED,
]
MAYBE_BEGUN = [BROKEN, unavailable(errors.NoRoom(9, 1)), InvalidRequest("n: no", status="INVALID_ARGUMENT")]


@pytest.mark.parametrize("error", NOT_BEGUN, ids=repr)
async def test_what_was_not_begun_goes_to_another_server(error: FluxserveError) -> None:
    first, second = FakeFlux(error=error), FakeFlux()
    fleet = fleet_of(first, second)
    await fleet.probe()
    result = await draw(fleet)
    assert result.request_id == "r0"
    assert [len(fake.requests) for fake in (first, second)] == [1, 1]
    assert [server.in_flight for server in fleet.servers] == [0, 0]


@pytest.mark.parametrize("error", MAYBE_BEGUN, ids=repr)
async def test_what_may_have_been_begun_goes_nowhere_else(error: FluxserveError) -> None:
    first, second = FakeFlux(error=error), FakeFlux()
    fleet = fleet_of(first, second)
    await fleet.probe()
    with pytest.raises(type(error)):
        await draw(fleet)
    assert second.requests == []
    assert (("r0", "cancel") in first.actions) == (error is not MAYBE_BEGUN[-1])  # it may run on: it is stopped


async def test_each_server_is_tried_once() -> None:
    fakes = [FakeFlux(error=QueueFull("queue: 64 requests are waiting")) for _ in range(3)]
    fleet = fleet_of(*fakes)
    await fleet.probe()
    with pytest.raises(QueueFull):
        await draw(fleet)
    assert [len(fake.requests) for fake in fakes] == [1, 1, 1]


async def test_a_server_that_is_not_ready_gets_nothing() -> None:
    asleep, awake = FakeFlux(), FakeFlux()
    fleet = Fleet({"m": [server_of(asleep, "grpc://a", ready=False), server_of(awake, "grpc://b")]})
    with pytest.raises(Overloaded):
        await draw(fleet)  # nobody was asked yet
    await fleet.probe()
    for number in range(3):
        await draw(fleet, number)
    assert (len(asleep.requests), len(awake.requests)) == (0, 3)


async def test_a_broken_connection_ends_readiness_until_the_next_probe() -> None:
    fake = FakeFlux(error=BROKEN)
    fleet = fleet_of(fake)
    await fleet.probe()
    with pytest.raises(ConnectionFailed):
        await draw(fleet)
    assert not fleet.ready
    fake.error = None
    await fleet.probe()
    assert fleet.ready


@pytest.mark.parametrize("error", [DeadlineExceeded("late"), BROKEN], ids=repr)
async def test_one_late_probe_ends_no_readiness(error: FluxserveError) -> None:
    fleet = fleet_of(FakeFlux())
    (server,) = fleet.servers
    answers: list[bool | FluxserveError] = [True, error, error, True, error, error, error, True, False, True, REFUSED]

    async def ready(**_: object) -> bool:
        answer = answers.pop(0)
        if isinstance(answer, FluxserveError):
            raise answer
        return answer

    server.client.ready = ready  # type: ignore[method-assign]
    seen = []
    while answers:
        await fleet.probe()
        seen.append(server.ready)
    assert seen == [True, True, True, True, True, True, False, True, False, True, False]


async def test_a_probe_that_fails_in_its_own_way_is_followed_by_another() -> None:
    fleet = fleet_of(FakeFlux())
    (server,) = fleet.servers
    ready = server.client.ready
    watching = asyncio.create_task(fleet.watch(0.01))
    server.ready = True
    for expected, probe in ((False, _broken), (True, ready)):
        server.client.ready = probe  # type: ignore[method-assign]
        async with asyncio.timeout(10):
            while fleet.ready != expected:
                await asyncio.sleep(0.01)
    watching.cancel()


async def _broken(**_: object) -> bool:
    raise RuntimeError("a fault of the library")


async def test_names() -> None:
    shared = server_of(FakeFlux())
    fleet = Fleet({"a": [shared], "b": [shared]})
    assert fleet.servers == (shared,)
    assert fleet.named("b") == "b"
    with pytest.raises(InvalidField, match="allowed: a, b"):
        fleet.named(None)
    with pytest.raises(ModelNotFound, match="allowed: a, b"):
        fleet.named("dall-e-3")
    assert Fleet({"a": [shared]}).named(None) == "a"


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_server_that_dies(protocol: str) -> None:
    """Over a real wire. The words of a refused connection are known as such: the other server gets the request."""
    fakes = [FakeFlux(), FakeFlux()]
    with Wire(fakes[1]) as alive:
        dying = Wire(fakes[0])
        with dying:
            servers = [Server(wire.url(protocol), AsyncClient(wire.url(protocol))) for wire in (dying, alive)]
            gateway = Gateway(Fleet({"m": servers[:1], "both": servers}), Config(probe_interval=3600))
            gateway.__enter__()
            for _ in range(2):
                assert gateway.post(json={"prompt": "a", "model": "both"}).status_code == 200
            assert [len(fake.requests) for fake in fakes] == [1, 1]
        try:
            assert gateway.get("/health/ready").json()["models"]["m"] == {"servers": 1, "ready": 1}
            assert (
                gateway.post(json={"prompt": "a", "model": "both"}).status_code == 200
            )  # its turn: tried, and refused
            assert [len(fake.requests) for fake in fakes] == [1, 2]
            assert gateway.get("/health/ready").json()["models"]["m"] == {"servers": 1, "ready": 0}
            servers[0].ready = True  # as if it had died just now
            answer = gateway.post(json={"prompt": "a", "model": "m"})
            assert (answer.status_code, answer.headers["x-should-retry"]) == (502, "true")
            assert "localhost" not in answer.text  # addresses stay inside
            answer = gateway.post(json={"prompt": "a", "model": "m"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_not_ready")
        finally:
            gateway.__exit__(None, None, None)


async def test_two_hundred_callers_are_each_answered_rightly() -> None:
    """By picture, or by an error with a retry-after; nobody gets another's picture."""
    fakes = [FakeFlux(steps=2, step_s=0.01) for _ in range(2)]
    for fake in fakes:
        bound(fake, 40)
    servers = [server_of(fake, f"grpc://{number}") for number, fake in enumerate(fakes)]
    limits = httpx2.Limits(max_connections=None)
    with Gateway(Fleet({"m": servers}), Config(max_requests=150)) as gateway:
        async with httpx2.AsyncClient(base_url=gateway.url, limits=limits, timeout=30, verify=False) as client:

            async def call(seed: int) -> tuple[int, bool]:
                body = {"prompt": f"number {seed}", "seed": seed}
                answer = await client.post("/v1/images/generations", json=body)
                if answer.status_code == 200:
                    return 200, answer.json()["data"][0]["seed"] == seed
                return answer.status_code, "retry-after" in answer.headers

            answers = await asyncio.gather(*map(call, range(200)))
        assert all(right for _, right in answers)
        assert {status for status, _ in answers} == {200, 503}
        assert sum(status == 200 for status, _ in answers) >= 80
        wait_for(lambda: all(server.in_flight == 0 for server in servers))
        wait_for(lambda: gateway.connections == 0)


def bound(fake: FakeFlux, most: int) -> None:
    """Give the server a bounded queue."""
    original = fake.flux

    async def flux(inputs: Any, request_id: str) -> Any:
        if len(fake.table) >= most:
            raise QueueFull(f"queue: {most} requests are waiting")
        return await original(inputs, request_id)

    fake.flux = flux  # type: ignore[method-assign]
