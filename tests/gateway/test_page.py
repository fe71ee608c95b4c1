"""The web page without a browser: what the gateway lets through to Gradio, and what it keeps for the page."""

from __future__ import annotations

import base64
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fluxserve_gateway import Config, Fleet
from fluxserve_gateway.keys import Keys, Limits
from fluxserve_gateway.page import fragments
from fluxserve_gateway.page.gallery import Entry, Galleries
from fluxserve_gateway.page.models import Takes, takes
from fluxserve_gateway.page.shelf import Shelf

from fluxserve.families.flux.models import MEMBERS
from tests.client.fakes import FakeFlux
from tests.gateway.serving import MODEL, Gateway, png, server_of

_MIB = 1 << 20


@pytest.fixture(scope="module")
def folder() -> list[Path]:
    return []


@pytest.fixture(scope="module")
def gateway(folder: list[Path]) -> Iterator[Gateway]:
    config = Config(max_body=2 * _MIB)
    with Gateway(Fleet({MODEL: [server_of(FakeFlux())]}), config, page=True) as opened:
        folder.append(Path(os.environ["GRADIO_TEMP_DIR"]))
        yield opened
    assert not folder[0].exists()


def test_the_page_is_whole_and_runs_nothing_of_others(gateway: Gateway) -> None:
    answer = gateway.get("/")
    assert answer.status_code == 200 and '"title":"fluxserve"' in answer.text
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "http" not in policy and "*" not in policy
    assert answer.headers["x-frame-options"] == "DENY"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/gradio_api/info"),
        ("GET", "/gradio_api/openapi.json"),
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", "/gradio_api/file=http://127.0.0.1:1/"),
        ("GET", "/gradio_api/proxy=http://127.0.0.1:1/"),
        ("POST", "/gradio_api/upload"),
        ("POST", "/gradio_api/call/_drawn"),
        ("POST", "/gradio_api/run/_drawn"),
        ("POST", "/gradio_api/component_server"),
        ("GET", "/gradio_api/deep_link"),
        ("GET", "/monitoring"),
        ("GET", "/login"),
        ("GET", "/pictures/../../etc/passwd"),
        ("GET", "/pictures/" + "0" * 32),
        ("GET", "/v1/nothing"),
    ],
)
def test_other_routes_of_gradio_are_shut(gateway: Gateway, method: str, path: str) -> None:
    answer = gateway.get(path) if method == "GET" else gateway.post(path, json={"data": []})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_the_api_is_what_it_was(gateway: Gateway) -> None:
    assert gateway.get("/v1/images/generations").status_code == 405
    assert gateway.get("/v1/models").json()["data"][0]["id"] == MODEL
    assert gateway.get("/v1/models").headers["content-security-policy"].startswith("default-src 'none'")
    assert "/uploads" not in gateway.get("/openapi.json").json()["paths"]


def joined(gateway: Gateway, *values: object) -> Any:
    return gateway.post(
        "/gradio_api/queue/join", json={"data": list(values), "fn_index": 0, "session_hash": "a", "trigger_id": 1}
    )


@pytest.mark.parametrize(
    "value",
    [
        {"path": "http://127.0.0.1:1/a.png", "meta": {"_type": "gradio.FileData"}},
        [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}],
        [["nested"]],
    ],
)
def test_a_value_that_gradio_would_fetch_is_refused(gateway: Gateway, value: object) -> None:
    answer = joined(gateway, value)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "data")


def test_an_event_beyond_its_bound(gateway: Gateway) -> None:
    assert joined(gateway, "a" * _MIB).status_code == 413


def test_uploads(gateway: Gateway, folder: list[Path]) -> None:
    kept = gateway.post("/uploads", content=png())
    file = folder[0] / kept.json()["name"]
    assert file.read_bytes() == png() and stat.S_IMODE(folder[0].stat().st_mode) == 0o700
    shown = gateway.get(f"/pictures/{kept.json()['name']}")
    assert (shown.content, shown.headers["content-type"]) == (png(), "image/png")
    for data, status, code in (
        (b"<svg/>", 400, "invalid_value"),
        (b"\x89PNG" + b"\0" * 2 * _MIB, 413, "body_too_large"),
    ):
        answer = gateway.post("/uploads", content=data)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/", {"host": "evil.example"}),
        ("/uploads", {"origin": "http://evil.example"}),
        ("/gradio_api/queue/join", {"origin": "http://evil.example"}),
        ("/gradio_api/queue/join", {"origin": "null"}),
    ],
)
def test_other_pages_and_names_are_kept_out(gateway: Gateway, path: str, headers: dict[str, str]) -> None:
    answer = gateway.get(path, headers=headers) if path == "/" else gateway.post(path, content=png(), headers=headers)
    assert answer.status_code == 403


def test_without_the_option_there_is_no_page() -> None:
    with Gateway(Fleet({MODEL: [server_of(FakeFlux())]})) as plain:
        assert plain.get("/").status_code == 404


def test_with_keys_the_page_asks_for_one(tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys.sqlite", create=True)
    key, secret = keys.create("alice", Limits())

    def basic(password: str) -> dict[str, str]:
        return {"authorization": "Basic " + base64.b64encode(f"anybody:{password}".encode()).decode()}

    with Gateway(Fleet({MODEL: [server_of(FakeFlux())]}), keys=keys, page=True) as gateway:
        for headers in ({}, basic("wrong"), {"authorization": "Basic %%"}):
            for path in ("/", "/config", "/theme.css", "/gradio_api/queue/data?session_hash=a"):
                answer = gateway.get(path, headers=headers)
                assert (answer.status_code, answer.headers["www-authenticate"][:5]) == (401, "Basic")
            assert gateway.post("/uploads", content=png(), headers=headers).status_code == 401
        assert gateway.get("/", headers=basic(secret)).status_code == 200
        foreign = {**basic(secret), "origin": "http://evil.example"}
        assert gateway.post("/uploads", content=png(), headers=foreign).status_code == 403
        assert gateway.get("/v1/models", headers=basic(secret)).status_code == 401  # the API takes Bearer alone
        keys.revoke(key.id)
        assert gateway.get("/", headers=basic(secret)).status_code == 401


@pytest.mark.parametrize("spec", MEMBERS, ids=lambda spec: spec.name)
def test_the_table_of_models_is_the_servers_own(spec: Any) -> None:
    has = takes(spec.name.upper() + "-fp8")
    redraws = not spec.takes_references
    assert has.side == spec.defaults.side
    assert has.steps == (None if spec.only_steps else spec.defaults.num_inference_steps)
    assert has.steps is None or has.max_steps == spec.limits.max_inference_steps
    guided = spec.transformer.guidance_embeds or spec.classifier_free
    assert has.guidance == (spec.defaults.guidance_scale if guided else None)
    assert (has.references, has.strength) == (spec.limits.max_references, redraws)
    for width, height in (map(int, size.split("x")) for size in has.sizes):
        assert width % spec.size_multiple == height % spec.size_multiple == 0
        assert width * height <= spec.limits.max_pixels


def test_a_model_that_is_not_known() -> None:
    assert takes("flux.1-developer") == takes("mine") == Takes()


def entry(shelf: Shelf, prompt: str = "a fox", data: bytes = b"12345") -> Entry:
    return Entry(shelf.put(data), {"prompt": prompt, "seed": 7, "model": "tiny"}, False, "png", 16, 16)


def test_the_oldest_files_make_room() -> None:
    shelf = Shelf(12)
    galleries = Galleries(shelf)
    mine, theirs = galleries.secret(""), galleries.secret(None)
    assert mine != theirs and galleries.secret(mine) == mine
    first, second, third = (entry(shelf) for _ in range(3))
    galleries.add(mine, [first])
    galleries.add(mine, [third, second])
    assert galleries.pictures(mine) == [third, second] and shelf.get(first.name) is None
    assert len(list(shelf.folder.iterdir())) == 2
    assert galleries.pictures(theirs) == [] and galleries.find(theirs, second.name) is None
    folder = shelf.folder
    shelf.close()
    assert not folder.exists()


def test_words_of_people_are_words() -> None:
    shelf = Shelf(100)
    shown = fragments.picture(entry(shelf, '"><script>alert(1)</script>')) + fragments.thumbnails(
        [entry(shelf, '"><img onerror=alert(1)>')]
    )
    assert "<script" not in shown and "<img onerror" not in shown
    shelf.close()
