"""OpenAI's SDK and curl → the gateway → the real server: the pictures are those of the client alone."""

import base64
import io
import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from fluxserve_client import AsyncClient, Client, Result
from fluxserve_gateway import Fleet, Server
from PIL import Image

from fluxserve.supervisor import TritonServer
from tests.gateway.serving import Gateway
from tests.support import programs
from tests.triton.conftest import plain, wait_for

pytestmark = pytest.mark.xdist_group("triton")

FIELDS = {"prompt": "a red apple on a blue table", "size": "96x64"}
OURS = {"seed": 7, "num_inference_steps": 4}
LONG = {"prompt": "a red apple", "size": "512x512", "num_inference_steps": 100}


class Watched(AsyncClient):
    """Keeps the id of the last request."""

    last = ""

    async def generate(self, *given: Any, **fields: Any) -> Result:
        self.last = fields["request_id"]
        return await super().generate(*given, **fields)


@pytest.fixture(scope="module", params=["grpc", "http"])
def gateway(request: pytest.FixtureRequest, server: TritonServer) -> Iterator[Gateway]:
    url = f"{request.param}://{server.grpc_url if request.param == 'grpc' else server.http_url}"
    with Gateway(Fleet({"tiny": [Server(url, Watched(url))]})) as opened:
        yield opened


@pytest.fixture(scope="module")
def alone(server: TritonServer) -> Iterator[Client]:
    with Client(server.grpc_url) as client:
        yield client


def files(answer: openai.types.ImagesResponse) -> list[bytes]:
    return [base64.b64decode(image.b64_json or "") for image in answer.data or []]


def test_the_pictures_of_the_client_alone(gateway: Gateway, alone: Client) -> None:
    answer = gateway.sdk().images.generate(**FIELDS, n=2, output_format="webp", output_compression=60, extra_body=OURS)  # type: ignore[arg-type]
    expected = alone.generate(
        FIELDS["prompt"], height=64, width=96, num_images=2, output_format="webp", quality=60, **OURS
    )
    assert files(answer) == list(expected.images)
    assert (answer.size, answer.output_format) == ("96x64", "webp")
    assert [image.seed for image in answer.data or []] == [7, 8]  # type: ignore[attr-defined]


def test_an_edit(gateway: Gateway, alone: Client, tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.effect_mandelbrot((96, 80), (-2, -1, 1, 1), 20).convert("RGB").save(path)
    with path.open("rb") as file:
        answer = gateway.sdk().images.edit(image=file, prompt="b", extra_body={**OURS, "strength": 0.5})
    assert files(answer) == list(alone.generate("b", image=path, strength=0.5, **OURS).images)
    assert answer.size == "96x80"


def test_a_stream(gateway: Gateway, alone: Client) -> None:
    events = list(gateway.sdk().images.generate(**FIELDS, stream=True, partial_images=3, extra_body=OURS))  # type: ignore[call-overload]
    assert [event.type for event in events if "partial" not in event.type] == ["image_generation.completed"]
    assert base64.b64decode(events[-1].b64_json) == alone.generate(FIELDS["prompt"], height=64, width=96, **OURS).image


def test_curl(gateway: Gateway, tmp_path: Path) -> None:
    curl, picture = programs.needed("curl"), tmp_path / "a.png"
    Image.new("RGB", (64, 64), "green").save(picture)

    def answer(*options: str) -> bytes:
        return subprocess.run([curl, "-sS", *options], check=True, capture_output=True, timeout=60).stdout

    kind, body = "content-type: application/json", json.dumps({**FIELDS, **OURS})
    drawn = json.loads(answer(f"{gateway.url}/v1/images/generations", "-H", kind, "-d", body))
    assert Image.open(io.BytesIO(base64.b64decode(drawn["data"][0]["b64_json"]))).size == (96, 64)
    form = ("-F", f"image[]=@{picture};type=image/png", "-F", "prompt=b", "-F", "seed=3", "-F", "num_inference_steps=4")
    edited = json.loads(answer(f"{gateway.url}/v1/images/edits", *form))
    assert edited["size"] == "64x64"
    events = answer("-N", f"{gateway.url}/v1/images/edits", *form, "-F", "stream=true").decode()
    assert "event: image_edit.completed\ndata: {" in events
    told = json.loads(events.split("data: ", 1)[1].split("\n", 1)[0])
    assert told["b64_json"] == edited["data"][0]["b64_json"]


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"n": 9}, "n"),
        ({"size": "100x64"}, "size"),
        ({"size": "64x100"}, "size"),
        ({"size": "9984x9984"}, "size"),
        ({"prompt": " "}, "prompt"),
        ({"prompt": "é" * 4_000}, "prompt"),
        ({"num_inference_steps": 10_000}, "num_inference_steps"),
        ({"guidance_scale": 1e9}, "guidance_scale"),
        ({"seed": 2**63 - 1, "n": 2}, "seed"),
    ],
)
def test_what_the_model_refuses_is_named_as_the_caller_wrote_it(
    gateway: Gateway, given: dict[str, object], param: str
) -> None:
    answer = gateway.post(json={"prompt": "a", **given})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error"), error
    assert "allowed:" in error["message"]


def test_an_input_that_is_damaged(gateway: Gateway) -> None:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "green").save(file, "PNG")
    answer = gateway.post("/v1/images/edits", data={"prompt": "a"}, files={"image": file.getvalue()[:-40]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "image")


@pytest.mark.parametrize("stream", [False, True])
def test_a_cut_socket_stops_the_request_within_two_steps(gateway: Gateway, server: TritonServer, stream: bool) -> None:
    """Without a stream, too, where the caller has no sign of life."""
    probe = plain(server, "grpc")
    (behind,) = gateway.fleet.servers
    assert isinstance(behind.client, Watched)
    behind.client.last = ""
    body = json.dumps({**LONG, "stream": stream}).encode()
    head = b"POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", gateway.port)) as connection:
        connection.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        wait_for(lambda: behind.in_flight == 1 and probe.control(behind.client.last, "status")[1] >= 3)
    last = cut = probe.control(behind.client.last, "status")[1]
    while (now := probe.control(behind.client.last, "status"))[0] == "running":
        last = now[1]
    assert last <= cut + 2
    wait_for(lambda: behind.in_flight == 0)
    assert probe.control(behind.client.last, "status")[0] in ("cancelling", "unknown")
