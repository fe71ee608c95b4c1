"""A caller who hangs up: the request stops on the server within two steps, and the gateway keeps nothing of it."""

from __future__ import annotations

import json
import socket
import threading
import time
import tracemalloc

import pytest
from fluxserve_gateway import Config

from tests.client.fakes import FakeFlux
from tests.gateway.serving import Gateway, in_front_of, png, wait_for

STEP_S = 0.05


def cut(gateway: Gateway, fake: FakeFlux, at_step: int, **fields: object) -> bytes:
    """Send a request by hand, close its socket once the server did `at_step` steps; what had been answered by then."""
    body = json.dumps({"prompt": "a", **fields}).encode()
    head = "POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    connection = socket.create_connection(("127.0.0.1", gateway.port))
    with connection:
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        wait_for(lambda: any(slot.step >= at_step for slot in list(fake.table.values())))
        connection.setblocking(False)
        try:
            return connection.recv(1 << 20)
        except BlockingIOError:
            return b""


@pytest.mark.parametrize("stream", [False, True])
def test_a_cut_socket_stops_the_request(gateway: Gateway, fake: FakeFlux, stream: bool) -> None:
    fake.steps, fake.step_s = 100, STEP_S
    answered = cut(gateway, fake, 3, stream=stream)
    assert (b"200 OK" in answered) == stream
    reached = max(slot.step for slot in list(fake.table.values()))
    wait_for(lambda: fake.ended)
    assert [outcome for _, outcome in fake.ended] == ["cancelled"]
    cancels = [action for _, action in fake.actions if action == "cancel"]
    assert cancels
    assert reached <= 6  # cut at 3: found out and cancelled within two steps, one to spare for the test's own look
    (server,) = gateway.fleet.servers
    wait_for(lambda: server.in_flight == 0)


def test_a_cut_before_the_body_is_there(gateway: Gateway, fake: FakeFlux) -> None:
    with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
        head = b"POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        connection.sendall(head + b'content-length: 100\r\n\r\n{"prompt"')
    assert gateway.sdk().images.generate(prompt="a").data  # others are answered, and nothing of it was sent
    assert len(fake.requests) == 1


def test_many_abandoned_streams_leave_nothing(gateway: Gateway, fake: FakeFlux) -> None:
    fake.steps, fake.step_s = 1000, 0.01
    callers = [threading.Thread(target=cut, args=(gateway, fake, 1), kwargs={"stream": True}) for _ in range(60)]
    before = gateway.tasks
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(20)
    (server,) = gateway.fleet.servers
    wait_for(lambda: server.in_flight == 0 and not fake.table)
    assert [outcome for _, outcome in fake.ended] == ["cancelled"] * 60
    wait_for(lambda: gateway.connections == 0)
    wait_for(lambda: gateway.tasks == before)


def test_a_step_has_no_time_to_be_wasted(gateway: Gateway, fake: FakeFlux) -> None:
    """The first event of a stream is there before the third step."""
    fake.steps, fake.step_s = 100, STEP_S
    answered = cut(gateway, fake, 3, stream=True)
    assert b"\n: running " in answered or b"\r\n: running " in answered


@pytest.mark.parametrize("stream", [False, True])
def test_who_never_reads_leaves_nothing(fake: FakeFlux, stream: bool) -> None:
    """The slot is freed, and so are the connection and the answer, of which most was not sent."""
    fake.pictures = (png() + bytes(24 << 20),)  # more than the kernel takes
    body = json.dumps({"prompt": "a", "stream": stream}).encode()
    head = "POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with in_front_of(fake, config=Config(send_timeout=0.5, max_requests=1)) as gateway:
        before = gateway.tasks
        tracemalloc.start()
        try:
            with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
                connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
                wait_for(lambda: _blocks(1 << 20))
                wait_for(lambda: gateway.connections == 0)
                wait_for(lambda: gateway.tasks == before)
                wait_for(lambda: not _blocks(1 << 17))
        finally:
            tracemalloc.stop()
        fake.pictures = None
        assert gateway.post(json={"prompt": "a"}).status_code == 200


def _blocks(least: int) -> list[int]:
    return [trace.size for trace in tracemalloc.take_snapshot().traces if trace.size > least]


def test_who_reads_slowly_is_answered(fake: FakeFlux) -> None:
    fake.pictures = (png() + bytes(6 << 20),)
    with (
        in_front_of(fake, config=Config(send_timeout=0.5)) as gateway,
        socket.socket() as connection,
    ):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 18)
        connection.connect(("127.0.0.1", gateway.port))
        body = b'{"prompt": "a"}'
        head = "POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        connection.sendall(
            f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body
        )
        got = 0
        begun = time.monotonic()
        while data := connection.recv(1 << 18):
            got += len(data)
            time.sleep(0.04)
        assert got > 8 << 20
        assert time.monotonic() - begun > 1  # longer than the bound of one part
