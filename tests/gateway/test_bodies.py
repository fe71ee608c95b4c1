"""Bodies: bounded before they are read and before they are parsed, and nobody waits while one is."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import time
import tracemalloc
from pathlib import Path

import pytest
from fluxserve_gateway import Config
from fluxserve_gateway.keys import Keys, Limits

from tests.client.fakes import FakeFlux
from tests.gateway.serving import Gateway, in_front_of, png, wait_for

MIB = 1 << 20
JSON = {"content-type": "application/json"}
URL = "data:image/png;base64," + base64.b64encode(png()).decode()


def answer_to_a_head(gateway: Gateway, path: str, length: int, *headers: str) -> bytes:
    """What is answered before a byte of the body was sent."""
    lines = [
        f"POST {path} HTTP/1.1",
        "host: localhost",
        "content-type: application/json",
        f"content-length: {length}",
        *headers,
    ]
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=5) as connection:
        connection.sendall("\r\n".join((*lines, "", "")).encode())
        return connection.recv(1 << 16)


def test_a_body_without_pictures_is_small(gateway: Gateway, fake: FakeFlux) -> None:
    refused = answer_to_a_head(gateway, "/v1/images/generations", MIB + 1)
    assert refused.startswith(b"HTTP/1.1 413 ")
    prompt = "\U0001f98a" * 32_000  # the longest, at its largest
    assert gateway.post(content=json.dumps({"prompt": prompt}), headers=JSON).status_code == 200
    assert fake.requests[-1][1]["prompt"][0].decode() == prompt
    words = "a" * (MIB + 1)  # beside a picture, the rest has the same bound
    answer = gateway.post("/v1/images/edits", json={"prompt": words, "images": [{"image_url": URL}]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert len(fake.requests) == 1


@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/images/edits"])
@pytest.mark.parametrize(
    "body",
    [
        "[" * 300,
        '{"a":' * 300,
        '{"prompt": [' + "[]," * 300_000 + "0]}",
        '{"prompt": [' + "1," * 500_000 + "1]}",
        '{"prompt": ["' + '","' * 300_000 + '"]}',
        "{" + ",".join(f'"{name}":1' for name in range(90_000)) + "}",
    ],
    ids=["lists", "objects", "empty", "numbers", "texts", "fields"],
)
def test_many_values_are_counted_and_not_parsed(gateway: Gateway, path: str, body: str) -> None:
    answer = gateway.post(path, content=body, headers=JSON)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")
    assert "256 values" in answer.text


def test_brackets_in_a_prompt_are_no_values(gateway: Gateway, fake: FakeFlux) -> None:
    prompt = '((fox)), {"image_url": "data:image/png;base64,AAAA"}, [' * 500 + '\\" \\'
    body = {"prompt": prompt, "images": [{"image_url": URL}]}
    for path, given in (("generations", {"prompt": prompt}), ("edits", body)):
        assert gateway.post(f"/v1/images/{path}", json=given).status_code == 200
        assert fake.requests[-1][1]["prompt"][0].decode() == prompt
    assert list(fake.requests[-1][1]["image"]) == [png()]


async def _longest_pause(done: asyncio.Event) -> float:
    longest = 0.0
    while not done.is_set():
        begun = time.perf_counter()
        await asyncio.sleep(0.001)
        longest = max(longest, time.perf_counter() - begun)
    return longest


def test_nobody_waits_for_a_parser(gateway: Gateway) -> None:
    """A hostile edit, as large as any: the event loop stops for a small part of what parsing all of it takes."""
    body = b'{"images": [' + b"[]," * (2 * MIB // 3) + b"0]}"
    begun = time.perf_counter()
    json.loads(body)
    parsing = time.perf_counter() - begun
    done = asyncio.Event()
    pause = asyncio.run_coroutine_threadsafe(_longest_pause(done), gateway._loop)
    answer = gateway.post("/v1/images/edits", content=body, headers=JSON)
    gateway._loop.call_soon_threadsafe(done.set)
    assert answer.status_code in (400, 413)
    assert pause.result(10) < parsing / 3


@pytest.mark.parametrize(
    "spelled",
    [
        URL,
        URL.replace("/", "\\/"),
        "".join(f"\\u{ord(letter):04X}" if letter in "+/=" else letter for letter in URL),
        "".join(f"\\u{ord(letter):04x}" for letter in URL),
    ],
    ids=["plain", "slashes", "signs", "everything"],
)
def test_data_urls_as_writers_of_json_spell_them(gateway: Gateway, fake: FakeFlux, spelled: str) -> None:
    for body in (
        f'{{"images":[{{"image_url":"{spelled}"}}],"prompt":"a"}}',
        f'{{"prompt": "a", "images" :[ {{ "image_url"\n:\t"{spelled}" }} ] }}',
    ):
        assert gateway.post("/v1/images/edits", content=body, headers=JSON).status_code == 200
        assert list(fake.requests[-1][1]["image"]) == [png()]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (f'{{"prompt": "a", "images": [{{"image_url": "{URL}}}', None),
        ('{"prompt": "a", "images": [{"image_url": "data:image/png;base64,#0"}]}', "images"),
        ('{"prompt": "a", "images": [{"image_url": "data:text/plain;base64,AAAA"}]}', "images"),
        (json.dumps({"prompt": "a", "images": [{"image_url": URL}] * 17}), "images"),
        (f'{{"prompt": "a", "image_url": "{URL}", "images": [{{"image_url": "{URL}"}}]}}', "image_url"),
    ],
    ids=["cut off", "no base64", "text", "too many", "no place for one"],
)
def test_data_urls_that_are_none(gateway: Gateway, fake: FakeFlux, body: str, param: str | None) -> None:
    answer = gateway.post("/v1/images/edits", content=body, headers=JSON)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert fake.requests == []


def test_a_rate_is_checked_before_the_body(tmp_path: Path, fake: FakeFlux) -> None:
    keys = Keys(tmp_path / "keys", create=True)
    with in_front_of(fake, config=Config(), keys=Keys(tmp_path / "keys")) as gateway:
        for limits, size in ((Limits(requests_per_minute=1), "16x16"), (Limits(pixels_per_minute=256), "16x16")):
            _, secret = keys.create("a", limits)
            bearer = f"authorization: Bearer {secret}"
            gateway.sdk(api_key=secret).images.generate(prompt="a", size=size)  # 512 pixels are drawn
            for path in ("generations", "edits"):
                refused = answer_to_a_head(gateway, f"/v1/images/{path}", 1000, bearer)
                assert refused.startswith(b"HTTP/1.1 429 "), refused
                assert b"retry-after" in refused


def _sent(gateway: Gateway, path: str, kind: str, *parts: bytes) -> socket.socket:
    """Send a body in small pieces, so that the sender has no copy of it."""
    length = sum(map(len, parts))
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", gateway.port))
    connection.sendall(head.encode())
    for part in parts:
        for start in range(0, len(part), 1 << 16):
            connection.sendall(memoryview(part)[start : start + (1 << 16)])
    return connection


@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=x", "application/json"])
def test_one_copy_of_an_upload_is_kept(gateway: Gateway, fake: FakeFlux, kind: str) -> None:
    fake.steps, fake.step_s = 1000, 0.01
    file = png() + bytes(3 * MIB)
    disposition = b'--x\r\ncontent-disposition: form-data; name="%s"%s\r\n\r\n'
    form = (disposition % (b"prompt", b"") + b"a\r\n", disposition % (b"image", b'; filename="a"'), file, b"\r\n--x--")
    url = b'{"prompt": "a", "images": [{"image_url": "data:image/png;base64,'
    parts = (url, base64.b64encode(file), b'"}]}') if kind == "application/json" else form
    tracemalloc.start()
    try:
        with _sent(gateway, "/v1/images/edits", kind, *parts):
            wait_for(lambda: fake.table)
            large = [trace.size for trace in tracemalloc.take_snapshot().traces if trace.size > 2 * MIB]
    finally:
        tracemalloc.stop()
    wait_for(lambda: not fake.table)
    assert len(large) == 1, large
