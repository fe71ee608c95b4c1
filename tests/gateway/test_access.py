"""Who may do what: keys and their limits, web pages, bounds on bodies and time."""

from __future__ import annotations

import base64
import io
import socket
import sqlite3
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from fluxserve_client.errors import QueueFull
from fluxserve_gateway import Config
from fluxserve_gateway.keys import Keys, KeysError, Limits
from fluxserve_gateway.limits import Bucket
from PIL import Image

from tests.client.fakes import FakeFlux
from tests.gateway.serving import Gateway, in_front_of, png, wait_for


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.sqlite"


class Guarded:
    """A gateway with keys. SQLite's connections belong to their thread, as a gateway's does."""

    def __init__(self, path: Path, fake: FakeFlux, config: Config | None = None) -> None:
        self.keys = Keys(path, create=True)
        self.gateway = in_front_of(fake, config=config, keys=Keys(path))


@pytest.fixture
def guarded(path: Path, fake: FakeFlux) -> Iterator[Guarded]:
    made = Guarded(path, fake)
    with made.gateway:
        yield made


def test_without_a_key_nothing_is_read(guarded: Guarded, fake: FakeFlux) -> None:
    """401 comes before the body: whoever has no key cannot make the gateway hold megabytes."""
    with socket.create_connection(("127.0.0.1", guarded.gateway.port), timeout=5) as connection:
        head = b"POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        connection.sendall(head + b"content-length: 1000000\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 401 ")
    for path in ("/v1/models", "/v1/models/tiny", "/metrics"):
        assert guarded.gateway.get(path).status_code == 401
    assert guarded.gateway.post("/v1/images/edits", data={"prompt": "a"}, files={"image": png()}).status_code == 401
    assert guarded.gateway.get("/health/ready").status_code == 200
    assert fake.requests == []


def test_a_key_until_it_is_revoked(guarded: Guarded, path: Path) -> None:
    key, secret = guarded.keys.create("alice", Limits())
    client = guarded.gateway.sdk(api_key=secret)
    assert client.images.generate(prompt="a").data
    guarded.keys.revoke(key.id)
    with pytest.raises(openai.AuthenticationError) as caught:
        client.images.generate(prompt="a")
    assert caught.value.code == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError):
        guarded.gateway.sdk(api_key="fs-wrong").models.list()
    with pytest.raises(KeysError):
        guarded.keys.revoke(key.id)
    assert secret.encode() not in path.read_bytes()  # its hash alone is kept
    assert [(each.name, bool(each.revoked)) for each in guarded.keys.all()] == [("alice", True)]


def test_the_file_of_keys_is_its_owners(path: Path, tmp_path: Path) -> None:
    with pytest.raises(KeysError, match="keys create"):
        Keys(path)
    Keys(path, create=True).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o640)
    with pytest.raises(KeysError, match="mode 640"):
        Keys(path)
    path.chmod(0o400)
    Keys(path).close()  # a gateway need not be able to write
    path.chmod(0o600)
    other = tmp_path / "text"
    other.write_text("no database " * 200)
    other.chmod(0o600)
    with pytest.raises(KeysError, match="cannot be used"):
        Keys(other)
    assert sqlite3.connect(path).execute("SELECT count(*) FROM keys").fetchone() == (0,)


def test_requests_a_minute(guarded: Guarded) -> None:
    _, secret = guarded.keys.create("a", Limits(requests_per_minute=2))
    _, other = guarded.keys.create("b", Limits())
    client = guarded.gateway.sdk(api_key=secret)
    for _ in range(2):
        client.images.generate(prompt="a")
    with pytest.raises(openai.RateLimitError) as caught:
        client.images.generate(prompt="a")
    assert caught.value.code == "rate_limit_exceeded"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 30
    assert guarded.gateway.sdk(api_key=other).images.generate(prompt="a").data


def test_pixels_a_minute(guarded: Guarded) -> None:
    _, secret = guarded.keys.create("a", Limits(pixels_per_minute=64 * 64 * 2))
    client = guarded.gateway.sdk(api_key=secret)
    with pytest.raises(openai.RateLimitError) as caught:
        client.images.generate(prompt="a", size="64x64", n=3)  # more than ever fits
    assert caught.value.response.headers["x-should-retry"] == "false"
    for _ in range(3):  # the fake server's pictures have 512 pixels, and that is what counts in the end
        client.images.generate(prompt="a", size="64x64")
    with pytest.raises(openai.RateLimitError):
        client.images.generate(prompt="a", size="64x64", n=2)


def test_who_hangs_up_pays_and_who_is_refused_does_not(guarded: Guarded, fake: FakeFlux) -> None:
    _, secret = guarded.keys.create("a", Limits(pixels_per_minute=64 * 64))
    client = guarded.gateway.sdk(api_key=secret)
    fake.error = QueueFull("queue: 64 requests are waiting")
    for _ in range(3):
        with pytest.raises(openai.InternalServerError):
            client.images.generate(prompt="a", size="64x64")
    fake.error, fake.steps, fake.step_s = None, 1000, 0.01
    client.images.generate(prompt="a", size="64x64", stream=True).close()
    wait_for(lambda: fake.ended)
    with pytest.raises(openai.RateLimitError, match="pixels a minute"):
        client.images.generate(prompt="a", size="64x64")


def test_requests_at_a_time(guarded: Guarded, fake: FakeFlux) -> None:
    fake.steps, fake.step_s = 1000, 0.01
    _, secret = guarded.keys.create("a", Limits(at_a_time=1))
    client = guarded.gateway.sdk(api_key=secret)
    stream = client.images.generate(prompt="a", stream=True)
    with pytest.raises(openai.RateLimitError, match="at a time"):
        client.images.generate(prompt="a")
    stream.close()
    wait_for(lambda: not fake.table)
    fake.steps = 1
    wait_for(
        lambda: guarded.gateway.post(json={"prompt": "a"}, headers={"authorization": f"Bearer {secret}"}).is_success
    )


def test_a_body_that_is_on_its_way_counts_as_a_request(guarded: Guarded) -> None:
    """Or one key could hold all places of the gateway with bodies that never end."""
    _, secret = guarded.keys.create("a", Limits(at_a_time=1))
    head = f"POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {secret}"
    client = guarded.gateway.sdk(api_key=secret)
    with socket.create_connection(("127.0.0.1", guarded.gateway.port)) as connection:
        connection.sendall(f"{head}\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n{{".encode())
        wait_for(lambda: _limited(client))
    wait_for(lambda: not _limited(client))


def _limited(client: openai.OpenAI) -> bool:
    try:
        client.images.generate(prompt="a")
    except openai.RateLimitError:
        return True
    return False


def test_a_bucket_fills_evenly_and_never_over() -> None:
    now = 0.0
    bucket = Bucket(60, lambda: now)
    bucket.take(90)  # 30 owed
    assert bucket.wait(10) == 40
    now = 40.0
    assert bucket.wait(10) == 0
    now = 4000.0
    assert bucket.wait(60) == 0
    assert bucket.wait(61) == 1


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:1"}, 200),
        ({"host": "[::1]"}, 200),
        ({"host": "rebound.example"}, 403),
        ({"host": "[bad"}, 403),
        ({"origin": "https://example.com"}, 403),
        ({"origin": "null"}, 403),
        ({"host": "localhost:8", "origin": "http://localhost:8"}, 200),
    ],
)
def test_without_keys_web_pages_are_kept_out(fake: FakeFlux, headers: dict[str, str], status: int) -> None:
    """A browser lets any page send a form to this machine: it must not draw."""
    with in_front_of(fake) as gateway:
        answer = gateway.post("/v1/images/edits", data={"prompt": "a"}, files={"image": png()}, headers=headers)
        assert answer.status_code == status
        assert len(fake.requests) == (status == 200)


def test_other_origins_are_told_nothing_unless_named(fake: FakeFlux) -> None:
    origin = {"origin": "https://a.example"}
    with in_front_of(fake) as gateway:
        assert "access-control-allow-origin" not in gateway.post(json={"prompt": "a"}, headers=origin).headers
    with in_front_of(fake, config=Config(cors_origins=("https://a.example",))) as gateway:
        allowed = gateway.post(json={"prompt": "a"}, headers=origin).headers["access-control-allow-origin"]
        assert allowed == "https://a.example"


def test_a_body_is_counted_while_it_arrives(fake: FakeFlux) -> None:
    """Without a length, the answer comes before the body's end; with one that says too much, before its beginning."""
    with in_front_of(fake, config=Config(max_body=100_000)) as gateway:
        for framing, body in (
            ("transfer-encoding: chunked", b"20000\r\n" + b" " * 0x20000),
            ("content-length: 100001", b""),
        ):
            with socket.create_connection(("127.0.0.1", gateway.port), timeout=5) as connection:
                head = "POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json"
                connection.sendall(f"{head}\r\n{framing}\r\n\r\n".encode() + body)
                assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")
        answer = gateway.post(json={"prompt": "a" * 200_000})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        assert gateway.post(json={"prompt": "a"}).status_code == 200


def test_all_bodies_have_a_bound_together(fake: FakeFlux) -> None:
    fake.steps, fake.step_s = 1000, 0.01
    config = Config(max_bodies=150_000)
    with in_front_of(fake, config=config) as gateway:
        large = {
            "prompt": "a",
            "images": [{"image_url": "data:image/png;base64," + base64.b64encode(_noise()).decode()}],
        }
        stream = threading.Thread(target=gateway.post, args=("/v1/images/edits",), kwargs={"json": large})
        stream.start()
        wait_for(lambda: fake.table)
        answer = gateway.post("/v1/images/edits", json=large)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
        next(iter(fake.table.values())).cancelling = True
        stream.join()
        fake.steps = 1
        assert gateway.post("/v1/images/edits", json=large).status_code == 200


def test_requests_have_a_bound_together(fake: FakeFlux) -> None:
    with in_front_of(fake, config=Config(max_requests=1)) as gateway:
        for _ in range(3):
            assert gateway.post(json={"prompt": "a"}).status_code == 200
        assert gateway.post(json={"prompt": ""}).status_code == 400
        fake.steps, fake.step_s = 1000, 0.01
        with gateway.sdk().images.generate(prompt="a", stream=True):
            answer = gateway.post(json={"prompt": "a"})
            assert (answer.status_code, answer.headers["x-should-retry"]) == (503, "true")
        fake.steps = 1
        wait_for(lambda: gateway.post(json={"prompt": "a"}).status_code == 200)


def _noise() -> bytes:
    import random

    file = io.BytesIO()
    Image.frombytes("RGB", (160, 160), random.Random(0).randbytes(160 * 160 * 3)).save(file, "PNG")
    return file.getvalue()


def test_a_body_that_never_comes(fake: FakeFlux) -> None:
    with (
        in_front_of(fake, config=Config(body_timeout=0.2)) as gateway,
        socket.create_connection(("127.0.0.1", gateway.port), timeout=5) as connection,
    ):
        head = b"POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        connection.sendall(head + b"content-length: 50\r\n\r\n{")
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_a_request_that_takes_too_long_is_stopped(fake: FakeFlux) -> None:
    fake.steps, fake.step_s = 1000, 0.01
    with in_front_of(fake, config=Config(request_timeout=0.2)) as gateway:
        answer = gateway.post(json={"prompt": "a"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        assert answer.headers["x-should-retry"] == "false"
        wait_for(lambda: fake.ended)
        assert fake.ended[0][1] == "cancelled"


def test_the_pixels_of_an_input_image_have_a_bound(fake: FakeFlux) -> None:
    """Few bytes may be many pixels: the header is looked at, and nothing is decoded."""
    file = io.BytesIO()
    Image.new("1", (5000, 5000)).save(file, "PNG")
    assert len(file.getvalue()) < 10_000
    with in_front_of(fake, config=Config(max_image_pixels=1_000_000, max_images=2)) as gateway:
        for files in ([file.getvalue()], [b"GIF89a" + bytes(20)], [b"not a picture"], [png()] * 3):
            answer = gateway.post("/v1/images/edits", data={"prompt": "a"}, files=[("image[]", each) for each in files])
            assert answer.status_code == 400, answer.text
        assert fake.requests == []
        assert gateway.post("/v1/images/edits", data={"prompt": "a"}, files={"image": png()}).status_code == 200


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"[]", "application/json", 400),
        (b'{"prompt": "a", "prompt": "b"}', "application/json", 400),
        (b'{"prompt": "a", "guidance_scale": NaN}', "application/json", 400),
        (b"\xff\xfe{}", "application/json", 400),
        (b'{"prompt": "a"}', "text/plain", 415),
        (b"prompt=a", "application/x-www-form-urlencoded", 415),
    ],
)
def test_bodies_that_are_none(gateway: Gateway, body: bytes, kind: str, status: int) -> None:
    answer = gateway.post(content=body, headers={"content-type": kind})
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--x\r\n",
        b"--x\r\nnothing\r\n\r\na\r\n--x--\r\n",
        b"--y\r\n",
        b"--x\r\ncontent-disposition: form-data\r\n\r\na\r\n--x--",
    ],
)
def test_forms_that_are_none(gateway: Gateway, body: bytes) -> None:
    answer = gateway.post("/v1/images/edits", content=body, headers={"content-type": "multipart/form-data; boundary=x"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")


def test_a_field_given_twice(gateway: Gateway) -> None:
    answer = gateway.post("/v1/images/edits", data={"prompt": ["a", "b"]}, files={"image": png()})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt")
