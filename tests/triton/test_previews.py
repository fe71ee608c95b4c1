"""Previews of running requests on the live server, over both protocols, to the client and to OpenAI's SDK."""

import base64
import io
import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fluxserve_client import AsyncClient, Client, Preview
from fluxserve_gateway import Fleet, Server
from PIL import Image

from fluxserve.supervisor import TritonServer
from tests.gateway.serving import Gateway
from tests.triton.conftest import LONG, PlainClient, pixels, running, wait_for

pytestmark = pytest.mark.xdist_group("triton")

MIDDLING = {"height": 256, "width": 192, "num_inference_steps": 24}


def look(client: PlainClient, request_id: str, **fields: object) -> tuple[str, int, bytes]:
    out = client.call("control", {"request_id": request_id, "action": "preview", **fields})
    return out["state"][0].decode(), int(out["preview_step"][0]), out["preview"][0]


def files(server: TritonServer) -> list[Path]:
    name = server.table.path.name
    return [file for file in server.table.path.parent.glob(f"{name}-*") if not file.name.endswith("-processes")]


def test_a_look_at_a_running_request(client: PlainClient, server: TritonServer) -> None:
    name = f"look-{client.protocol}"
    assert look(client, name) == ("unknown", 0, b"")
    with running(client, name) as future:
        assert files(server) == [], "nobody has asked"
        seen: list[tuple[int, bytes]] = []

        def newer() -> bool:
            state, step, image = look(client, name, after=np.array([seen[-1][0] if seen else 0], np.int32))
            assert state == "running"
            if image:
                seen.append((step, image))
            return len(seen) == 3

        wait_for(newer)
        assert [step for step, _ in seen] == sorted({step for step, _ in seen})
        assert {pixels(image).shape for _, image in seen} == {(64, 64, 3)}
        wait_for(lambda: look(client, name, kind="partial")[2] != b"")
        _, _, image = look(client, name, kind="partial")
        assert pixels(image).shape == (512, 512, 3)
        assert all(b"trainedAlgorithmicMedia" in file for file in (image, seen[0][1])), "each says what drew it"
        assert {file.stat().st_mode & 0o777 for file in files(server)} == {0o600}
        assert look(client, "somebody else") == ("unknown", 0, b"")
        client.control(name, "cancel")
        assert future.result()[0]
    wait_for(lambda: files(server) == [])
    assert look(client, name)[2] == b""


def test_three_partial_images_and_no_more(client: PlainClient) -> None:
    name = f"greedy-{client.protocol}"
    with running(client, name) as future:
        steps, step = {0}, 0
        while step < max(steps) + 3 or len(steps) < 4:  # three, and then three steps without another
            steps.add(look(client, name, kind="partial", after=np.array([max(steps)], np.int32))[1])
            step = client.control(name, "status")[1]
            assert len(steps - {0}) <= 3
        client.control(name, "cancel")
        future.result()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "poster"}, "kind: got 'poster'; allowed: glimpse, partial"),
        ({"encoding": "hex"}, "encoding: got 'hex'; allowed: binary, base64"),
        ({"after": np.array([-1], np.int32)}, "after: got -1; allowed: 0 or more"),
    ],
)
def test_refusals(client: PlainClient, fields: dict[str, object], message: str) -> None:
    status, said = client.refused(lambda: look(client, "x", **fields))
    assert status == "INVALID_ARGUMENT" and message in said


def test_plain_json(client: PlainClient, server: TritonServer) -> None:
    """Without any library: base64, which JSON can hold."""
    name = f"json-{client.protocol}"
    texts = {"request_id": name, "action": "preview", "encoding": "base64"}
    inputs = [{"name": n, "shape": [1], "datatype": "BYTES", "data": [text]} for n, text in texts.items()]
    request = urllib.request.Request(
        f"http://{server.http_url}/v2/models/control/infer", json.dumps({"inputs": inputs}).encode()
    )

    def image() -> str:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return str({o["name"]: o["data"][0] for o in json.load(answer)["outputs"]}["preview"])

    with running(client, name) as future:
        wait_for(lambda: image() != "")
        assert pixels(base64.b64decode(image())).shape == (64, 64, 3)
        client.control(name, "cancel")
        future.result()


def test_the_client(client: PlainClient) -> None:
    """Both kinds of preview, the second request on top of the first; and the picture is the same as without."""
    seen: list[Preview] = []
    with Client(f"{client.protocol}://{client.url}", poll_interval=0.02) as ours:
        options, full = {"seed": 5, **MIDDLING}, {"partial_images": 2, "output_format": "jpeg"}
        glimpsed = ours.generate("a red apple", on_preview=seen.append, **options)
        partial = ours.generate("a red apple", on_preview=seen.append, **full, **options)
        assert glimpsed.image == ours.generate("a red apple", **options).image
    assert partial.format == "jpeg"
    small = [one for one in seen if (one.width, one.height) == (24, 32)]
    large = [one for one in seen if (one.width, one.height) == (192, 256)]
    assert small and large and len(small) + len(large) == len(seen)
    assert {one.format for one in small} == {"png"} and {one.format for one in large} == {"jpeg"}
    assert len(large) <= 2


def test_openais_sdk(client: PlainClient, server: TritonServer) -> None:
    url = f"{client.protocol}://{client.url}"
    with Gateway(Fleet({"tiny": [Server(url, AsyncClient(url, poll_interval=0.02))]})) as gateway:
        wait_for(lambda: gateway.fleet.ready)
        fields = {"prompt": "a red apple", "size": "256x256", "extra_body": {"num_inference_steps": 40, "seed": 1}}
        events = list(gateway.sdk().images.generate(**fields, stream=True, partial_images=3))  # type: ignore[call-overload]
    kinds = [event.type for event in events]
    assert kinds[-1] == "image_generation.completed" and len(kinds) > 1
    assert set(kinds[:-1]) == {"image_generation.partial_image"} and len(kinds) <= 4
    assert [event.partial_image_index for event in events[:-1]] == list(range(len(events) - 1))
    pictures = [Image.open(io.BytesIO(base64.b64decode(event.b64_json))) for event in events]
    assert {picture.size for picture in pictures} == {(256, 256)}
    arrays = [np.asarray(picture, float) for picture in pictures]
    far = [np.abs(array - arrays[-1]).mean() for array in arrays[:-1]]
    assert far == sorted(far, reverse=True), "each is nearer to the picture"


def test_the_first_event_comes_before_the_third_step(client: PlainClient) -> None:
    url = f"{client.protocol}://{client.url}"
    with Gateway(Fleet({"tiny": [Server(url, AsyncClient(url))]})) as gateway, ThreadPoolExecutor(1) as pool:
        wait_for(lambda: gateway.fleet.ready)
        body = {"prompt": "a", "size": "512x512", "num_inference_steps": LONG["num_inference_steps"], "stream": True}

        def first() -> str:
            request = urllib.request.Request(
                f"{gateway.url}/v1/images/generations", json.dumps(body).encode(), {"content-type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=20) as answer:
                return str(answer.readline().decode())

        said = pool.submit(first).result()
    state, _, steps = said.removeprefix(": ").strip().partition(" ")
    assert state in ("queued", "running") and int(steps.split("/")[0]) < 3
