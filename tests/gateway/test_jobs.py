"""Jobs over HTTP: from a request to its pictures, on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fluxserve_client.errors import ConnectionFailed, InvalidRequest, QueueFull
from fluxserve_gateway.keys import Keys, Limits

from tests.client.fakes import FakeFlux
from tests.gateway.jobs import ended, keeping, look, settings, submit, submitted
from tests.gateway.serving import Gateway, png, wait_for


@pytest.fixture
def gateway(fake: FakeFlux, database: str, tmp_path: Path) -> Iterator[Gateway]:
    with keeping(fake, settings(database, tmp_path / "files")) as opened:
        yield opened


def test_from_a_request_to_its_pictures(gateway: Gateway, fake: FakeFlux, tmp_path: Path) -> None:
    fake.steps, fake.step_s, fake.pictures = 20, 0.02, (b"\x89PNG\r\n\x1a\n one", b"\x89PNG\r\n\x1a\n two")
    answer = submit(gateway, seed=7, n=2, size="32x16")
    assert answer.status_code == 202
    job = answer.json()
    assert (job["status"], job["object"], job["queue_position"], job["result"]) == ("queued", "job", None, None)
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    wait_for(lambda: 0 < look(gateway, job["id"])["step"] < 20)
    done = ended(gateway, job["id"])
    assert done["status"] == "completed", done
    assert (done["result"]["size"], done["result"]["output_format"]) == ("32x16", "png")
    assert done["expires_at"] - done["completed_at"] == 86_400
    assert [each["seed"] for each in done["result"]["data"]] == [7, 8]
    pictures = [gateway.get(each["url"]) for each in done["result"]["data"]]
    assert [picture.content for picture in pictures] == list(fake.pictures)
    assert pictures[0].headers["content-type"] == "image/png"
    assert gateway.get(f"/v1/jobs/{job['id']}/images/2").status_code == 404
    assert gateway.get(f"/v1/jobs/{job['id']}/images/-1").status_code == 404
    assert len(fake.requests) == 1


def test_an_edit_as_a_form_and_as_json(gateway: Gateway, fake: FakeFlux) -> None:
    """Written down either way it is the same request."""
    header = {"idempotency-key": "k"}
    data = {"prompt": "a", "strength": 0.5}
    form = gateway.post("/v1/jobs", data=data, files=[("image[]", png()), ("image[]", png(8))], headers=header)
    assert form.status_code == 202, form.text
    urls = [f"data:image/png;base64,{base64.b64encode(each).decode()}" for each in (png(), png(8))]
    images = [{"image_url": url} for url in urls]
    json = gateway.post("/v1/jobs", json={**data, "images": images}, headers=header)
    assert (json.status_code, json.json()["id"]) == (202, form.json()["id"]), json.text
    job = ended(gateway, form.json()["id"])
    assert (job["status"], job["operation"]) == ("completed", "image_edit")
    (sent,) = [inputs for _, inputs in fake.requests]
    assert list(sent["image"]) == [png(), png(8)]
    assert job["result"]["usage"]["input_tokens_details"]["image_tokens"] == (16 * 16 + 8 * 8) // 256


def test_what_is_refused_is_not_kept(gateway: Gateway) -> None:
    refused: dict[str, Any] = {
        "stream": True,
        "response_format": "b64_json",
        "webhook": "https://a.example/x",
        "n": 11,
        "nonsense": 1,
        "images": [],
        "model": "none",
    }
    for param, value in refused.items():
        answer = submit(gateway, **{param: value})
        assert answer.status_code in (400, 404)
        assert answer.json()["error"]["param"] == param
    assert gateway.get("/v1/jobs").json()["data"] == []


def test_one_idempotency_key_is_one_job(fake: FakeFlux, database: str, tmp_path: Path) -> None:
    """Sent sixteen times at once, to two gateways: one job, drawn once."""
    jobs = settings(database, tmp_path / "files")
    with keeping(fake, jobs) as one, keeping(fake, jobs) as other:
        answers: list[httpx2.Response] = []

        def call(to: Gateway) -> None:
            answers.append(submit(to, key="k"))

        calls = [threading.Thread(target=call, args=(to,)) for to in (one, other) * 8]
        for each in calls:
            each.start()
        for each in calls:
            each.join(20)
        assert [answer.status_code for answer in answers] == [202] * 16
        (job_id,) = {answer.json()["id"] for answer in answers}
        assert sum("idempotent-replayed" not in answer.headers for answer in answers) == 1
        assert ended(one, job_id)["status"] == "completed"
        again = submit(other, key="k")
        assert (again.status_code, again.json()["status"]) == (202, "completed")
        assert len(fake.requests) == 1


def test_an_idempotency_key_belongs_to_one_request(gateway: Gateway, tmp_path: Path) -> None:
    submitted(gateway, "a", "k", seed=1)
    answer = submit(gateway, "a", "k", seed=2)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "idempotency_mismatch")
    assert answer.headers["x-should-retry"] == "false"
    header = {"idempotency-key": "edit"}

    def edit(picture: bytes) -> httpx2.Response:
        return gateway.post("/v1/jobs", data={"prompt": "a"}, files={"image": picture}, headers=header)

    first = edit(png())
    assert edit(png()).json()["id"] == first.json()["id"]
    assert edit(png(8)).status_code == 409
    wait_for(lambda: {each.name for each in (tmp_path / "files").iterdir()} >= {first.json()["id"]})
    assert len(gateway.get("/v1/jobs").json()["data"]) == 2
    for key in ("", "é".encode(), "a" * 256):
        assert gateway.post("/v1/jobs", json={"prompt": "a"}, headers={"idempotency-key": key}).status_code == 400


def test_cancel_what_waits_and_what_is_drawn(fake: FakeFlux, database: str, tmp_path: Path) -> None:
    fake.steps, fake.step_s = 1000, 0.02
    with keeping(fake, settings(database, tmp_path / "files", at_a_time=1)) as gateway:
        drawn, first, second = (submitted(gateway, prompt) for prompt in "abc")
        wait_for(lambda: look(gateway, drawn)["step"] > 0)
        assert [look(gateway, job_id)["queue_position"] for job_id in (drawn, first, second)] == [None, 0, 1]
        assert gateway.delete(f"/v1/jobs/{first}").json()["status"] == "cancelled"
        assert look(gateway, second)["queue_position"] == 0
        (slot,) = fake.table.values()
        at = slot.step
        assert gateway.delete(f"/v1/jobs/{drawn}").json()["status"] == "cancelling"
        assert ended(gateway, drawn)["status"] == "cancelled"
        assert slot.step <= at + 6  # two steps, and the test's own way there
        wait_for(lambda: fake.table)
        assert gateway.delete(f"/v1/jobs/{second}").status_code == 200
        assert ended(gateway, second)["status"] == "cancelled"
        assert gateway.delete(f"/v1/jobs/{first}").json()["status"] == "cancelled"
        assert gateway.delete("/v1/jobs/job_none").status_code == 404
        wait_for(lambda: [outcome for _, outcome in fake.ended] == ["cancelled"] * 2)  # the server is told first
        assert 'jobs_ended_total{model="tiny",status="cancelled"} 3.0' in gateway.get("/metrics").text


def test_another_gateway_cancels(fake: FakeFlux, database: str, tmp_path: Path) -> None:
    fake.steps, fake.step_s = 1000, 0.02
    jobs = settings(database, tmp_path / "files")
    with keeping(fake, jobs) as one:
        job_id = submitted(one)
        wait_for(lambda: fake.table)
        with keeping(fake, jobs) as other:
            assert other.delete(f"/v1/jobs/{job_id}").json()["status"] == "cancelling"
            assert ended(other, job_id)["status"] == "cancelled"


def test_pages(gateway: Gateway) -> None:
    ids = [submitted(gateway, str(number)) for number in range(5)]

    def page(**query: object) -> dict[str, Any]:
        found: dict[str, Any] = gateway.get("/v1/jobs", params=query).json()
        return found

    assert [job["id"] for job in page()["data"]] == ids[::-1]
    first = page(limit=2, order="asc")
    assert ([job["id"] for job in first["data"]], first["has_more"]) == (ids[:2], True)
    rest = page(limit=3, order="asc", after=first["last_id"])
    assert ([job["id"] for job in rest["data"]], rest["has_more"]) == (ids[2:], False)
    assert page(after=ids[0]) == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
    for query in ({"limit": 0}, {"limit": "x"}, {"limit": 101}, {"after": "job_x"}, {"order": "up"}):
        assert gateway.get("/v1/jobs", params=query).status_code == 400


def test_a_key_sees_its_own_jobs_alone(fake: FakeFlux, database: str, tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys", create=True)
    secrets = [keys.create(name, Limits())[1] for name in ("a", "b")]
    mine, theirs = ({"authorization": f"Bearer {secret}", "idempotency-key": "k"} for secret in secrets)
    with keeping(fake, settings(database, tmp_path / "files"), Keys(tmp_path / "keys")) as gateway:
        assert gateway.post("/v1/jobs", json={"prompt": "a"}).status_code == 401
        job_id = gateway.post("/v1/jobs", json={"prompt": "a"}, headers=mine).json()["id"]
        path = f"/v1/jobs/{job_id}"
        wait_for(lambda: gateway.get(path, headers=mine).json()["status"] == "completed")
        for each in (path, f"{path}/images/0"):
            assert gateway.get(each).status_code == 401
            assert gateway.get(each, headers=theirs).status_code == 404
            assert gateway.get(each, headers=mine).status_code == 200
        assert gateway.delete(path, headers=theirs).status_code == 404
        assert gateway.get("/v1/jobs", headers=theirs).json()["data"] == []
        assert gateway.get("/v1/jobs", params={"after": job_id}, headers=theirs).status_code == 400
        other = gateway.post("/v1/jobs", json={"prompt": "b"}, headers=theirs)  # its idempotency keys are its own
        assert other.status_code == 202
        assert other.json()["id"] != job_id


def test_bounds(fake: FakeFlux, database: str, tmp_path: Path) -> None:
    fake.steps, fake.step_s = 1000, 0.02
    keys = Keys(tmp_path / "keys", create=True)
    few = keys.create("few", Limits(pixels_per_minute=64 * 64 * 3))[1]
    many = keys.create("many", Limits())[1]
    jobs = settings(database, tmp_path / "files", at_a_time=1, max_queued=3, max_queued_per_key=2)
    with keeping(fake, jobs, Keys(tmp_path / "keys")) as gateway:

        def send(secret: str, key: str | None = None, **fields: object) -> httpx2.Response:
            headers = {"authorization": f"Bearer {secret}", **({"idempotency-key": key} if key else {})}
            return gateway.post("/v1/jobs", json={"prompt": "a", "size": "64x64", **fields}, headers=headers)

        assert send(many).status_code == 202
        wait_for(lambda: fake.table)
        assert [send(many, "k").status_code, send(many).status_code] == [202, 202]
        answer = send(many)
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "too_many_jobs")
        assert int(answer.headers["retry-after"]) > 0
        assert send(many, "k").status_code == 202  # it is there already
        assert send(few, n=4).status_code == 429  # more pixels than a minute has
        assert send(few, "k2").status_code == 202
        assert send(few, "k2").status_code == 202  # costs nothing
        answer = send(few)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "queue_full")
        assert answer.headers["x-should-retry"] == "true"


def test_results_are_kept_for_a_time(fake: FakeFlux, database: str, tmp_path: Path) -> None:
    files = tmp_path / "files"
    with keeping(fake, settings(database, files, keep=1.0, sweep=0.1)) as gateway:
        answer = gateway.post("/v1/jobs", data={"prompt": "a"}, files={"image": png()})
        job_id = answer.json()["id"]
        assert ended(gateway, job_id)["status"] == "completed"
        assert len(list((files / job_id).iterdir())) == 2
        wait_for(lambda: gateway.get(f"/v1/jobs/{job_id}").status_code == 404)
        assert gateway.get(f"/v1/jobs/{job_id}/images/0").status_code == 404
        assert list(files.glob("job_*")) == []
        waits = submitted(gateway, model="tiny")
        gateway.fleet.servers[0].ready = False
        assert ended(gateway, waits)["status"] in ("completed", "failed")


def test_a_job_that_nobody_can_draw_fails(fake: FakeFlux, database: str, tmp_path: Path) -> None:
    fake.error = QueueFull("queue: 64 requests are waiting")
    with keeping(fake, settings(database, tmp_path / "files", keep=1.5, sweep=0.1)) as gateway:
        job = ended(gateway, submitted(gateway))
        assert (job["status"], job["error"]["code"]) == ("failed", "queue_timeout")


def test_how_jobs_fail(gateway: Gateway, fake: FakeFlux) -> None:
    fake.error = InvalidRequest("num_images: got 9; allowed: 1 to 8")
    job = ended(gateway, submitted(gateway))
    assert (job["status"], job["error"]["param"], job["result"]) == ("failed", "n", None)
    assert "allowed: 1 to 8" in job["error"]["message"]
    fake.error = QueueFull("queue: 64 requests are waiting")
    waits = submitted(gateway)
    wait_for(lambda: len(fake.requests) >= 2)
    fake.error = None
    assert ended(gateway, waits)["status"] == "completed"


def test_a_job_that_takes_its_server_with_it_is_not_drawn_for_ever(
    gateway: Gateway, fake: FakeFlux, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fluxserve_gateway.jobs.worker._RETRY_S", 0.01)
    (server,) = gateway.fleet.servers
    fake.error = ConnectionFailed("the connection broke")
    job_id = submitted(gateway)

    def over() -> bool:
        server.ready = True  # as a probe says once it is back
        return look(gateway, job_id)["status"] == "failed"

    wait_for(over)
    assert look(gateway, job_id)["error"]["code"] == "lost"
    assert len(fake.requests) == 3


def test_a_gateway_that_ends_gives_its_jobs_back(fake: FakeFlux, database: str, tmp_path: Path) -> None:
    fake.steps, fake.step_s = 1000, 0.02
    jobs = settings(database, tmp_path / "files", lease=60.0)
    with keeping(fake, jobs) as gateway:
        job_id = submitted(gateway)
        wait_for(lambda: fake.table)
    assert "cancel" in {action for _, action in fake.actions}
    fake.steps = 1
    with keeping(fake, jobs) as gateway:
        assert ended(gateway, job_id)["status"] == "completed"


def test_jobs_are_counted(gateway: Gateway, fake: FakeFlux) -> None:
    ended(gateway, submitted(gateway))
    text = gateway.get("/metrics").text
    assert 'fluxserve_gateway_jobs_ended_total{model="tiny",status="completed"} 1.0' in text
    assert 'fluxserve_gateway_jobs_queued{model="tiny"}' in text
    assert 'fluxserve_gateway_jobs_running{model="tiny"}' in text
    assert 'fluxserve_gateway_requests_total{model="tiny",operation="job",outcome="ok"} 1.0' in text
    assert 'fluxserve_gateway_pixels_total{model="tiny"} 512.0' in text


def test_an_answer_with_urls(fake: FakeFlux, tmp_path: Path) -> None:
    """As OpenAI's SDK has it. The URL needs no key, ends with the result, and cannot be guessed from the job."""
    keys = Keys(tmp_path / "keys", create=True)
    secret = keys.create("a", Limits())[1]
    header = {"authorization": f"Bearer {secret}"}
    files = tmp_path / "files"
    kept = settings(f"sqlite:///{tmp_path / 'jobs.sqlite'}", files, keep=1.5, sweep=0.1)
    with keeping(fake, kept, Keys(tmp_path / "keys")) as gateway:
        client = gateway.sdk(api_key=secret)
        answer = client.images.generate(prompt="a", n=2, response_format="url", extra_body={"seed": 3})
        urls = [image.url or "" for image in answer.data or []]
        assert all(url.startswith(f"{gateway.url}/v1/files/") for url in urls)
        assert all(image.b64_json is None for image in answer.data or [])
        assert [httpx2.get(url).content for url in urls] == [fake.answer({})["images"][0]] * 2
        assert httpx2.get(urls[0]).headers["content-type"] == "image/png"
        (job,) = gateway.get("/v1/jobs", headers=header).json()["data"]
        assert job["status"] == "completed"
        token = urls[0].rsplit("/", 1)[1]
        assert token not in str(job)
        for wrong in ("x", f"A{token[1:]}" if token[0] != "A" else f"B{token[1:]}", "..%2F..%2Fjobs.sqlite", "1-0.png"):
            assert gateway.get(f"/v1/files/{job['id']}/{wrong}").status_code == 404
        path = f"/v1/jobs/{job['id']}/images/1"
        assert gateway.get(path).status_code == 401
        assert gateway.get(path, headers=header).status_code == 200
        wait_for(lambda: httpx2.get(urls[0]).status_code == 404)
        assert list(files.glob("job_*")) == []
        body = {"prompt": "a", "stream": True, "response_format": "url"}
        answer = gateway.post(json=body, headers=header)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "response_format")
    assert len(fake.requests) == 1
