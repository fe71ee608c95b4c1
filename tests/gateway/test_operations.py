"""What an operator sees: health, metrics, one line of JSON a request, headers; and that the API keeps its document."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import schemathesis
from fluxserve_client.errors import QueueFull
from fluxserve_gateway import Config, Fleet
from fluxserve_gateway.log import JsonLine
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy
from schemathesis.specs.openapi.checks import positive_data_acceptance

from tests.client.fakes import FakeFlux
from tests.gateway.jobs import keeping
from tests.gateway.jobs import settings as job_settings
from tests.gateway.serving import Gateway, in_front_of, png, server_of, wait_for


def samples(gateway: Gateway) -> dict[str, float]:
    text = gateway.get("/metrics").text
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name.removeprefix("fluxserve_gateway_"): float(value) for name, value in lines}


@pytest.fixture
def fresh(fake: FakeFlux) -> Iterator[Gateway]:
    with in_front_of(fake) as opened:
        yield opened


def test_metrics(fresh: Gateway, fake: FakeFlux) -> None:
    gateway = fresh
    gateway.post(json={"prompt": "a", "n": 2})
    gateway.post(json={"prompt": "a", "n": 0})
    gateway.post(json={"prompt": "a", "model": "a caller's own words"})
    fake.error = QueueFull("queue: 64 requests are waiting")
    gateway.post("/v1/images/edits", data={"prompt": "a"}, files={"image": png()})
    found = samples(gateway)
    drawn, edited = 'model="tiny",operation="image_generation"', 'model="tiny",operation="image_edit"'
    unknown = 'model="",operation="image_generation"'
    assert found[f'requests_total{{{drawn},outcome="ok"}}'] == 1
    assert found[f'requests_total{{{unknown},outcome="invalid_value"}}'] == 1
    assert found[f'requests_total{{{unknown},outcome="model_not_found"}}'] == 1
    assert found[f'requests_total{{{edited},outcome="queue_full"}}'] == 1
    assert found[f"request_seconds_count{{{drawn}}}"] == found[f"request_seconds_count{{{edited}}}"] == 1
    assert found[f"request_seconds_count{{{unknown}}}"] == 2
    assert found['pixels_total{model="tiny"}'] == 2 * 16 * 32
    assert found['queue_seconds_sum{model="tiny"}'] == 0.0015
    assert found['server_ready{server="grpc://fake-0"}'] == 1
    assert found['server_in_flight{server="grpc://fake-0"}'] == 0
    assert "a caller's own words" not in gateway.get("/metrics").text


def test_health_tells_the_truth() -> None:
    awake, asleep = server_of(FakeFlux(), "grpc://a"), server_of(FakeFlux(), "grpc://b", ready=False)
    fleet = Fleet({"m": [awake, asleep], "n": [asleep]})
    with Gateway(fleet, Config(probe_interval=0.05)) as gateway:
        answer = gateway.get("/health/ready")
        models = {"m": {"servers": 2, "ready": 1}, "n": {"servers": 1, "ready": 0}}
        assert (answer.status_code, answer.json()) == (200, {"ready": True, "models": models})
        awake.client._transport.ready_models = ()  # type: ignore[attr-defined]
        wait_for(lambda: gateway.get("/health/ready").status_code == 503)
        assert gateway.get("/health/live").status_code == 200
        assert gateway.post(json={"prompt": "a", "model": "m"}).status_code == 503
        awake.client._transport.ready_models = ("flux", "control")  # type: ignore[attr-defined]
        wait_for(lambda: gateway.get("/health/ready").status_code == 200)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[list[dict[str, Any]]]:
    found: list[dict[str, Any]] = []

    class Reader(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(json.loads(JsonLine().format(record)))

    access, reader = logging.getLogger("fluxserve_gateway.access"), Reader()
    access.addHandler(reader)
    caplog.set_level(logging.INFO, access.name)
    yield found
    access.removeHandler(reader)


def test_a_line_for_each_request(fake: FakeFlux, lines: list[dict[str, Any]]) -> None:
    with in_front_of(fake) as gateway:
        answer = gateway.post(json={"prompt": "a secret", "n": 2, "size": "32x16"})
        wait_for(lambda: lines)
    (line,) = lines
    assert line["request_id"] == answer.headers["x-request-id"] == fake.requests[0][0]
    assert 0 <= line["seconds"] < 10
    told = {
        name: line[name] for name in ("method", "path", "status", "outcome", "model", "n", "size", "stream", "pixels")
    }
    assert told == {
        "method": "POST",
        "path": "/v1/images/generations",
        "status": 200,
        "outcome": "ok",
        "model": "tiny",
        "n": 2,
        "size": "32x16",
        "stream": False,
        "pixels": 1024,
    }
    assert "a secret" not in json.dumps(lines)


def test_prompts_are_logged_if_that_is_wanted(fake: FakeFlux, lines: list[dict[str, Any]]) -> None:
    with in_front_of(fake, config=Config(log_prompts=True)) as gateway:
        gateway.post(json={"prompt": "a\nb"})
        wait_for(lambda: lines)
    assert lines[0]["prompt"] == "a\nb"


def test_an_abandoned_request_is_logged_as_that(fake: FakeFlux, lines: list[dict[str, Any]]) -> None:
    from tests.gateway.test_leaving import cut

    fake.steps, fake.step_s = 100, 0.05
    with in_front_of(fake) as gateway:
        cut(gateway, fake, 1)
        wait_for(lambda: lines)
    assert (lines[0]["status"], lines[0]["outcome"]) == (499, "abandoned")


def test_a_fault_of_ours_says_nothing_outside(fake: FakeFlux, lines: list[dict[str, Any]]) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("a path: /etc/secret")

    fake.flux = broken  # type: ignore[assignment,method-assign]
    with in_front_of(fake) as gateway:
        for stream in (False, True):
            answer = gateway.post(json={"prompt": "a", "stream": stream})
            assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
            assert "secret" not in answer.text


@pytest.mark.parametrize("path", ["/health/live", "/health/ready", "/metrics"])
def test_balancers_may_ask_for_the_head_alone(gateway: Gateway, path: str) -> None:
    answer = httpx2.head(gateway.url + path, verify=False)
    assert (answer.status_code, answer.content) == (200, b"")


@pytest.mark.parametrize("path", ["/v1/models", "/health/live", "/nothing"])
def test_headers_of_every_answer(gateway: Gateway, path: str) -> None:
    headers = gateway.get(path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert headers["x-request-id"].startswith("req_")
    assert "strict-transport-security" not in headers


def test_paths_and_methods_that_are_not_there(gateway: Gateway) -> None:
    assert gateway.get("/nothing").json()["error"]["code"] == "not_found"
    answer = gateway.get("/v1/images/generations")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    for path in ("/docs", "/redoc"):  # their pages load scripts from elsewhere
        assert gateway.get(path).status_code == 404


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_the_api_keeps_its_document(gateway: Gateway, mode: schemathesis.GenerationMode) -> None:
    """schemathesis sends what the OpenAPI document allows, or forbids, and judges the answers by it."""
    tried = _judge_all(gateway, mode)
    assert {"POST /v1/images/generations", "POST /v1/images/edits", "GET /v1/models"} <= tried


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_so_do_jobs(fake: FakeFlux, tmp_path: Path, mode: schemathesis.GenerationMode) -> None:
    kept = job_settings(
        f"sqlite:///{tmp_path / 'jobs.sqlite'}", tmp_path / "files", webhook_origins=("https://a.example",)
    )
    with keeping(fake, kept) as gateway:
        tried = _judge_all(gateway, mode, "/v1/jobs", "/v1/files", "/v1/webhook_secret")
    assert {"POST /v1/jobs", "GET /v1/jobs", "DELETE /v1/jobs/{job_id}", "GET /v1/webhook_secret"} <= tried


def _judge_all(gateway: Gateway, mode: schemathesis.GenerationMode, *paths: str) -> set[str]:
    tried: set[str] = set()
    for found in schemathesis.openapi.from_url(f"{gateway.url}/openapi.json").get_all_operations():
        if not found.ok().path.startswith(paths or "/"):
            continue
        operation = found.ok()
        tried.add(operation.label)
        if operation.body or mode is schemathesis.GenerationMode.POSITIVE:
            _judge(operation.as_strategy(mode))
    return tried


def _judge(cases: SearchStrategy[schemathesis.Case]) -> None:
    @settings(max_examples=10, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(cases)
    def check(case: schemathesis.Case) -> None:
        # a document cannot say all that is refused: a model that is not served, bytes that are no picture
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    check()
