"""How many requests may wait, and for how long: both are settings, and a refusal says how long the wait would be."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from fluxserve.supervisor import TritonServer
from tests.triton.conftest import PATIENCE, plain, running, serving, wait_for

pytestmark = pytest.mark.xdist_group("lifecycle")

TIMEOUT_S, PLACES = 2, 3


@pytest.fixture(scope="module")
def bounded() -> Iterator[TritonServer]:
    with serving(queue_timeout=str(TIMEOUT_S), max_waiting=str(PLACES)) as server:
        yield server


def test_bounds_of_the_queue(bounded: TritonServer) -> None:
    client = plain(bounded, "grpc")
    with running(client, "hog", num_images=8) as hog, ThreadPoolExecutor(PLACES) as pool:
        waiting = [pool.submit(client.refused, lambda k=k: client.draw(request_id=f"w{k}")) for k in range(PLACES)]
        wait_for(lambda: bounded.table.counts()[0] == PLACES)
        status, message = client.refused(client.draw)
        assert status == "UNAVAILABLE"
        expected = rf"queue: {PLACES} requests are waiting; at most {PLACES} may\. The wait would be about \d+ s\. Try"
        assert re.search(expected, message)
        assert [w.result(PATIENCE)[0] for w in waiting] == ["UNAVAILABLE"] * PLACES
        assert not hog.done(), "they were refused while the GPU was at work"
        client.control("hog", "cancel")
        hog.result(PATIENCE)
    assert client.draw(num_inference_steps=1)["images"].shape == (1,)
