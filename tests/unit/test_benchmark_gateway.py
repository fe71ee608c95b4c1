"""The gateway's benchmark: it measures, and a process that does not come up ends it."""

import socket

import pytest

from benchmarks import gateway


def test_it_measures() -> None:
    result = gateway.measure(n=5, size=10_000, stream=False)
    assert set(result["p50_p90_ms"]) == {"client", "gateway", "decoding"}
    assert all(0 < p50 <= p90 for p50, p90 in result["p50_p90_ms"].values())


@pytest.mark.parametrize(
    ("program", "said"),
    [("raise SystemExit(3)", "ended with status 3"), ("import time; time.sleep(60)", "does not listen")],
)
def test_a_process_that_does_not_come_up_ends_it(program: str, said: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and not listening: no other process gets the port
        port = taken.getsockname()[1]
        with pytest.raises(RuntimeError, match=said), gateway._running(port, "-c", program, patience=2.0):
            pytest.fail("it waited for nothing")
