"""What only a real connection shows: addresses, headers, TLS, broken and refused connections, odd answers."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from fluxserve_client import AsyncClient, Client, ConnectionFailed, MockTransport, Result, Retry, ServerError, Tls
from fluxserve_client.transports.endpoint import Endpoint

from tests.client.fakes import FakeFlux, Wire
from tests.support import certificates

PROTOCOLS = pytest.mark.parametrize("protocol", ["grpc", "http"])


@pytest.mark.parametrize(
    ("url", "protocol", "expected"),
    [
        ("localhost", None, ("grpc", "localhost:8001", False)),
        ("localhost", "http", ("http", "localhost:8000", False)),
        ("flux.example:9", None, ("grpc", "flux.example:9", False)),
        ("grpc://flux.example", None, ("grpc", "flux.example:8001", False)),
        ("grpcs://flux.example", "grpc", ("grpc", "flux.example:443", True)),
        ("http://flux.example:80/", None, ("http", "flux.example:80", False)),
        ("https://flux.example/team/flux/", None, ("http", "flux.example:443/team/flux", True)),
        ("[::1]:9", "http", ("http", "[::1]:9", False)),
    ],
)
def test_addresses(url: str, protocol: str | None, expected: tuple[str, str, bool]) -> None:
    endpoint = Endpoint.parse(url, protocol)
    assert (endpoint.protocol, endpoint.address, endpoint.tls is not None) == expected


def test_certificates_turn_tls_on_for_a_bare_address() -> None:
    tls = Tls(ca="ca.pem")
    assert Endpoint.parse("flux.example", tls=tls) == Endpoint("grpc", "flux.example:443", tls)


@pytest.mark.parametrize(
    ("url", "protocol", "tls", "message"),
    [
        ("ftp://x", None, None, "url: got scheme 'ftp', expected one of grpc"),
        ("http://x", "grpc", None, "protocol: got 'grpc' with url 'http://x', which says 'http'"),
        ("x", "soap", None, "protocol: got 'soap', expected one of grpc, http"),
        ("http://x", None, Tls(), "tls: given with url 'http://x', which is not encrypted; use https://"),
        ("grpcs://x", None, Tls(insecure=True), "tls: gRPC cannot skip verification"),
        ("grpc://x/path", None, None, "a path is possible over HTTP only"),
        ("", None, None, "url: got ''"),
        ("http://user@x", None, None, "url: got 'http://user@x'"),
    ],
)
def test_contradictions(url: str, protocol: str | None, tls: Tls | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AsyncClient(url, protocol=protocol, tls=tls)


@pytest.mark.parametrize("url", ["grpcs://x", "https://x"])
def test_certificates_are_read_at_once_and_named(tmp_path: Path, url: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pem"):
        AsyncClient(url, tls=Tls(ca=tmp_path / "none.pem"))
    (tmp_path / "junk.pem").write_text("junk")
    with pytest.raises(ValueError, match=r"junk\.pem, expected PEM files"):
        AsyncClient(url, tls=Tls(ca=tmp_path / "junk.pem"))


@pytest.mark.parametrize("url", ["grpc://x", "http://x"])
@pytest.mark.parametrize("headers", [{"a b": "c"}, {"a": "b\r\nc: d"}, {"é": "x"}, {"a": "é"}, {"": "x"}])
def test_headers_that_no_wire_carries(url: str, headers: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="headers: got") as caught:
        AsyncClient(url, headers=headers)
    assert "c: d" not in str(caught.value), "a value may be a secret"


@pytest.mark.parametrize("port", ["99999", "abc", "b:c"])
def test_a_port_that_is_none_names_the_address(port: str) -> None:
    with pytest.raises(ValueError, match=f"url: got 'http://x:{port}'"):
        AsyncClient(f"http://x:{port}")


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("localhost", True),
        ("127.8.9.1", True),
        ("[::1]", True),
        ("a.localhost", True),
        ("flux.example", False),
        ("10.0.0.1", False),
        ("localhost.example", False),
        ("0.0.0.0", False),
    ],
)
def test_loopback(address: str, expected: bool) -> None:
    assert Endpoint.parse(address).is_loopback is expected


def test_half_a_client_certificate() -> None:
    with pytest.raises(ValueError, match="cert, key: got one of them"):
        Tls(cert="c.pem")


@PROTOCOLS
async def test_headers_travel_with_every_call(fake: FakeFlux, wire: Wire, protocol: str) -> None:
    async with AsyncClient(wire.url(protocol), headers={"Authorization": "Bearer t"}) as client:
        await client.generate("a fox")
        await client.status("x")
    assert [headers["authorization"] for headers in fake.headers] == ["Bearer t"] * 2


@PROTOCOLS
async def test_headers_of_one_request(fake: FakeFlux, wire: Wire, protocol: str) -> None:
    async with AsyncClient(wire.url(protocol), headers={"X-Team": "foxes", "x-b": "all"}, poll_interval=0.01) as client:
        await client.generate("a fox", headers={"Traceparent": "00-1", "X-B": "one"}, progress=lambda _: None)
        await client.generate("a fox")
        with pytest.raises(ValueError, match="headers: got 'a b'"):
            await client.generate("a fox", headers={"a b": "c"})
    seen = [(sent.get("traceparent"), sent["x-b"], sent["x-team"]) for sent in fake.headers]
    assert seen.count(("00-1", "one", "foxes")) == 1
    assert set(seen) == {("00-1", "one", "foxes"), (None, "all", "foxes")}
    assert len(fake.requests) == 2


def test_headers_of_one_request_without_asyncio(fake: FakeFlux, wire: Wire) -> None:
    with Client(wire.url("grpc"), retry=Retry(attempts=2)) as client:
        client.generate("a fox", headers={"traceparent": "00-1"})
    assert [sent["traceparent"] for sent in fake.headers] == ["00-1"]


@pytest.mark.parametrize(("headers", "expected"), [({}, "identity"), ({"Accept-Encoding": "gzip"}, "gzip")])
async def test_compression_is_for_who_asks_for_it(
    fake: FakeFlux, wire: Wire, headers: dict[str, str], expected: str
) -> None:
    """Triton compresses for every client that would take it, and pictures are compressed as it is."""
    async with AsyncClient(wire.url("http"), headers=headers) as client:
        await client.generate("a fox")
    assert [seen["accept-encoding"] for seen in fake.headers] == [expected]


@PROTOCOLS
async def test_many_at_once_do_not_hold_up_a_cancel(fake: FakeFlux, wire: Wire, protocol: str) -> None:
    fake.steps, fake.step_s = 1000, 0.01
    async with AsyncClient(wire.url(protocol), cancel_timeout=5) as client:
        tasks = [asyncio.create_task(client.generate("a fox")) for _ in range(120)]
        async with asyncio.timeout(5):
            while len(fake.table) < 120:
                await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        async with asyncio.timeout(5):
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
    assert len([action for _, action in fake.actions if action == "cancel"]) == 120


async def test_pings_keep_a_long_request_where_the_server_allows_them() -> None:
    """gRPC sends one a second at most, and a server bears two too many."""

    async def draw(allowed_s: float) -> object:
        with Wire(FakeFlux(steps=60, step_s=0.1), ping_interval_s=allowed_s) as wire:
            async with AsyncClient(wire.url("grpc"), keepalive=0.2) as client:
                return await client.generate("a fox", timeout=60)

    patient, default = await asyncio.gather(draw(0.1), draw(300.0), return_exceptions=True)
    assert isinstance(patient, Result)
    assert isinstance(default, ConnectionFailed)
    assert "the server allows fewer: see `keepalive`" in str(default)


@pytest.mark.parametrize(("url", "keepalive"), [("http://x", 10), ("grpc://x", 0), ("grpc://x", float("nan"))])
def test_pings_that_cannot_be_sent(url: str, keepalive: float) -> None:
    with pytest.raises(ValueError, match="keepalive: got"):
        AsyncClient(url, keepalive=keepalive)


@PROTOCOLS
async def test_nobody_there(protocol: str) -> None:
    with socket.socket() as taken:  # bound and not listening: refuses, and nobody else can take the port
        taken.bind(("127.0.0.1", 0))
        async with AsyncClient(f"{protocol}://127.0.0.1:{taken.getsockname()[1]}") as client:
            for call in (client.generate("a fox"), client.status("x"), client.ready()):
                with pytest.raises(ConnectionFailed):
                    await call


@asynccontextmanager
async def answering(answer: bytes) -> AsyncIterator[int]:
    """A port that reads the head of a request, says `answer` and hangs up."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1000)
        writer.write(answer)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


@PROTOCOLS
async def test_a_connection_that_breaks(protocol: str) -> None:
    async with answering(b"") as port, AsyncClient(f"{protocol}://127.0.0.1:{port}") as client:
        with pytest.raises(ConnectionFailed):
            await client.generate("a fox")


async def test_a_proxys_error_page() -> None:
    page = b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 20\r\n\r\n<h1>Bad gateway</h1>"
    async with answering(page) as port, AsyncClient(f"http://127.0.0.1:{port}") as client:
        with pytest.raises(ServerError, match="<h1>Bad gateway</h1>") as caught:
            await client.generate("a fox")
    assert caught.value.status == "HTTP 502"


async def test_not_ready() -> None:
    async with AsyncClient(transport=MockTransport(FakeFlux(), ready_models=["flux"])) as client:
        assert not await client.ready()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return certificates.make(tmp_path_factory.mktemp("tls"))


@PROTOCOLS
async def test_tls(fake: FakeFlux, certificate: tuple[Path, Path], protocol: str) -> None:
    with Wire(fake, certificate) as wire:
        async with AsyncClient(wire.url(protocol), tls=Tls(ca=certificate[0])) as client:
            assert (await client.generate("a fox")).image
        async with AsyncClient(wire.url(protocol)) as client:  # does not trust it
            with pytest.raises(ConnectionFailed):
                await client.generate("a fox")


@pytest.mark.parametrize("other", ["grpc", "http"])
async def test_a_port_with_tls_is_asked_about(fake: FakeFlux, certificate: tuple[Path, Path], other: str) -> None:
    with Wire(fake, certificate) as wire:
        async with AsyncClient(wire.url(other).replace(f"{other}s://", "grpc://")) as client:
            with pytest.raises(ConnectionFailed, match="or one with TLS"):
                await client.ready()


async def test_tls_without_verification(fake: FakeFlux, certificate: tuple[Path, Path]) -> None:
    with Wire(fake, certificate) as wire:
        async with AsyncClient(wire.url("http"), tls=Tls(insecure=True)) as client:
            assert (await client.generate("a fox")).image
    assert Tls(insecure=True).context().verify_mode is ssl.CERT_NONE
    assert Tls().context().verify_mode is ssl.CERT_REQUIRED
