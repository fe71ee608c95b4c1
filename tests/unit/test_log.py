"""Triton's output: passed on whatever becomes of its reader, and read for the reason of an end."""

import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fluxserve.console import Outlet
from fluxserve.supervisor.log import Log, reason

LOST = "failed to load 'prepare' version 1: Internal: CheckpointError: /m: no such folder"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], ""),
        (["I1130 loading", "", "+-----+", "the last words", "+---+"], "the last words"),
        (
            [
                f'E1130 12:00:00.1 7 model_lifecycle.cc:642] "{LOST}\\n\\nAt:\\n  /usr/x.py(3): load\\n"',
                "E1130 12:00:00.1 7 model_lifecycle.cc:642] \"failed to load 'generate' version 1: Internal: "
                'CheckpointError: /m: no such folder"',
                "error: creating server: Internal - failed to load all models",
            ],
            "prepare, generate: CheckpointError: /m: no such folder",
        ),
        (
            [f'"{LOST}"', '"failed to load \'control\' version 1: Internal: Error: got \\"a\\""'],
            'prepare: CheckpointError: /m: no such folder; control: Error: got "a"',
        ),
        (
            ["/opt/bin/tritonserver: unrecognized option '--nonsense'", "Usage: tritonserver [options]", "  --help"],
            "tritonserver: unrecognized option '--nonsense'",
        ),
        (
            ["/x/tritonserver: error while loading shared libraries: libdcgm.so.3: cannot open shared object file"],
            "tritonserver: error while loading shared libraries: libdcgm.so.3: cannot open shared object file",
        ),
        (["terminate called after throwing", "  what():  std::bad_alloc", "a"], "what():  std::bad_alloc"),
        (["error: creating server: Internal - no room", "Aborted"], "error: creating server: Internal - no room"),
        (
            ['E1130 15:36:19.198836 31789 main.cc:245] "failed to start GRPC service: Unavailable"', "I1130 x"],
            "failed to start GRPC service: Unavailable",
        ),
        (["fluxserve: /x/tritonserver: Permission denied"], "fluxserve: /x/tritonserver: Permission denied"),
    ],
)
def test_why_a_server_ended(lines: list[str], expected: str) -> None:
    assert reason(lines) == expected


def within(seconds: float, what: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not what() and time.monotonic() < deadline:
        time.sleep(0.01)
    return what()


def test_a_log_is_passed_on_and_its_end_is_kept(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as file:
        log = Log(file.fileno())
        for start in (1, 2):
            log.forget()
            reading, writing = os.pipe()
            log.read(os.fdopen(reading, "rb"))
            os.write(writing, b"first\n\xff\nlast of %d" % start)
            os.close(writing)
            assert log.ended() == log.last() == f"last of {start}"
        log.close()
    assert (tmp_path / "log").read_bytes() == b"first\n\xff\nlast of 1first\n\xff\nlast of 2"


def test_nobody_waits_for_a_reader_that_does_not_read() -> None:
    """A terminal stopped by Ctrl-S, a pager: text is dropped, and the next that arrives says how much."""
    reading, writing = os.pipe()
    outlet, line = Outlet(writing), b"x" * 4095 + b"\n"
    begin = time.monotonic()
    for _ in range(12_000):
        outlet.write(line)
    assert time.monotonic() - begin < 30
    received: list[bytes] = []

    def read() -> None:
        while piece := os.read(reading, 1 << 16):
            received.append(piece)

    reader = threading.Thread(target=read)
    reader.start()
    assert within(30, lambda: sum(map(len, received)) >= 10_000 * len(line))
    outlet.write(b"the end\n")
    outlet.close(30)
    os.close(writing)
    reader.join()
    os.close(reading)
    text = b"".join(received)
    told = [int(count) for count in re.findall(rb"\[fluxserve: (\d+) lines dropped\]\n", text)]
    assert 0 < sum(told) == 12_000 - text.count(line) <= 2_000 and text.endswith(b"the end\n")


def test_a_reader_that_is_gone() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    outlet = Outlet(writing)
    for _ in range(3):
        outlet.write(b"nobody reads this\n")
    outlet.close()
    os.close(writing)


def test_a_full_disk() -> None:
    with Path("/dev/full").open("wb") as full:
        outlet = Outlet(full.fileno())
        outlet.write(b"no room for this\n")
        outlet.close()


def test_a_stream_that_does_not_block() -> None:
    """As a terminal is that a program before has left so."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    outlet = Outlet(writing)
    outlet.write(bytes(1 << 20))
    size = 0
    while size < 1 << 20:
        size += len(os.read(reading, 1 << 16))
    outlet.close()
    os.close(writing)
    os.close(reading)
