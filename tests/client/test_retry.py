"""Trying again: what is, what is not, how often, and how long between."""

import asyncio
import json
import statistics
from collections.abc import Callable

import numpy as np
import pytest
from fluxserve_client import (
    AsyncClient,
    Cancelled,
    Client,
    ConnectionFailed,
    DeadlineExceeded,
    FluxserveError,
    InvalidRequest,
    MockTransport,
    QueueFull,
    RequestIdInUse,
    Retry,
    ServerError,
    Timings,
    Unavailable,
)
from fluxserve_client.contract import CONTROL, Tensors

ANSWER: Tensors = {
    "images": np.array([b"\x89PNG\r\n\x1a\n"], dtype=object),
    "seeds": np.array([7], np.int64),
    "timings": np.array([json.dumps(dict.fromkeys(Timings.__dataclass_fields__, 1.0)).encode()], dtype=object),
    "image_size": np.array([64, 64], np.int32),
}


class Failing:
    """Fails so often in these ways, and then answers; notes ids and waits."""

    def __init__(self, *failures: type[FluxserveError]) -> None:
        self._failures = list(failures)
        self.ids: list[str] = []
        self.waits: list[float] = []

    def __call__(self, model: str, inputs: Tensors, request_id: str) -> Tensors:
        self.ids.append(request_id)
        if self._failures:
            raise self._failures.pop(0)("not now")
        return ANSWER

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)

    async def generate(self, attempts: int | None = 4) -> int:
        retry = None if attempts is None else Retry(attempts, sleep=self.sleep)
        async with AsyncClient(transport=MockTransport(self), retry=retry) as client:
            return (await client.generate("a fox")).seed


@pytest.mark.parametrize("failure", [Unavailable, QueueFull, ConnectionFailed])
async def test_what_may_work_later_is_sent_again(failure: type[FluxserveError]) -> None:
    failing = Failing(failure, failure, failure)
    assert await failing.generate() == 7
    assert len(failing.ids) == 4 and len(set(failing.ids)) == 1 and failing.ids[0], "under the same id"
    assert len(failing.waits) == 3


@pytest.mark.parametrize("failure", [InvalidRequest, Cancelled, DeadlineExceeded, ServerError, RequestIdInUse])
async def test_nothing_else_is(failure: type[FluxserveError]) -> None:
    failing = Failing(failure)
    with pytest.raises(failure):
        await failing.generate()
    assert len(failing.ids) == 1


async def test_off_by_default() -> None:
    failing = Failing(Unavailable)
    with pytest.raises(Unavailable):
        await failing.generate(attempts=None)
    assert len(failing.ids) == 1


async def test_it_ends() -> None:
    failing = Failing(*[Unavailable] * 9)
    with pytest.raises(Unavailable):
        await failing.generate(attempts=3)
    assert len(failing.ids) == 3 and len(failing.waits) == 2


async def test_a_request_that_still_runs_is_waited_for() -> None:
    """The connection broke, and the server draws on: its own id is in use for a while."""
    failing = Failing(ConnectionFailed, RequestIdInUse, RequestIdInUse)
    assert await failing.generate() == 7


def test_waits_grow_and_differ() -> None:
    retry = Retry(first=0.5, most=8)
    for attempt, longest in ((1, 0.5), (2, 1), (3, 2), (5, 8), (20, 8)):
        waits = [retry.wait(attempt) for _ in range(200)]
        assert longest / 2 <= min(waits) and max(waits) <= longest
        assert statistics.stdev(waits) > longest / 20


async def test_a_deadline_ends_the_waiting() -> None:
    async with AsyncClient(
        transport=MockTransport(Failing(*[Unavailable] * 99)), retry=Retry(99, first=60, most=60), cancel_timeout=0.1
    ) as client:
        async with asyncio.timeout(20):
            with pytest.raises(DeadlineExceeded):
                await client.generate("a fox", timeout=0.2)


def test_the_blocking_client_too() -> None:
    failing = Failing(Unavailable)
    with Client(transport=MockTransport(failing), retry=Retry(sleep=failing.sleep)) as client:
        assert client.generate("a fox").seed == 7


@pytest.mark.parametrize("make", [lambda: Retry(0), lambda: Retry(first=-1), lambda: Retry(most=-1)])
def test_numbers_that_can_not_be(make: Callable[[], Retry]) -> None:
    with pytest.raises(ValueError, match="expected"):
        make()


async def test_control_is_tried_again_too() -> None:
    failures = [Unavailable("not now")]

    def handler(model: str, inputs: Tensors, request_id: str) -> Tensors:
        assert model == CONTROL
        if failures:
            raise failures.pop()
        return {"state": np.array([b"queued"], object), "step": np.array([0]), "steps": np.array([0])}

    async with AsyncClient(transport=MockTransport(handler), retry=Retry(2, first=0)) as client:
        assert (await client.status("a")).state == "queued"
