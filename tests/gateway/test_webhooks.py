"""Webhooks: signed as the library of Standard Webhooks verifies it, and sent nowhere but where the operator said."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fluxserve_client.errors import InvalidRequest
from fluxserve_gateway.jobs.receivers import PublicResolver, Receivers, is_public
from fluxserve_gateway.jobs.settings import JobSettings
from fluxserve_gateway.jobs.webhooks import secret_of, signature
from fluxserve_gateway.keys import Keys, Limits
from standardwebhooks import Webhook
from standardwebhooks.webhooks import WebhookVerificationError

from tests.client.fakes import FakeFlux
from tests.gateway.jobs import ended, keeping, settings, submit, submitted
from tests.gateway.serving import Gateway, wait_for

MASTER = secrets.token_bytes(32)


class Receiver:
    """A caller's HTTP server, with the messages that it got.

    Attributes:
        answers: the statuses to answer, in turn; then 204.
        location: for answers that redirect.
    """

    def __init__(self) -> None:
        self.messages: list[tuple[str, dict[str, str], bytes]] = []
        self.answers: list[int] = []
        self.location = ""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                outer.messages.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
                self.send_response(outer.answers.pop(0) if outer.answers else 204)
                self.send_header("location", outer.location)
                self.send_header("content-length", "0")
                self.end_headers()

            do_GET = do_POST

            def log_message(self, *given: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.origin = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


def jobs(tmp_path: Path, *origins: str, **other: Any) -> JobSettings:
    url = f"sqlite:///{tmp_path / 'jobs.sqlite'}"
    webhooks = {"webhook_origins": origins, "webhook_secret": MASTER, "webhook_retries": (0.05, 0.05)}
    return settings(url, tmp_path / "files", **{"webhook_private": True, **webhooks, **other})


def tries(gateway: Gateway) -> dict[str, int]:
    """The tries to deliver, by outcome."""
    lines = gateway.get("/metrics").text.splitlines()
    prefix = 'fluxserve_gateway_webhook_tries_total{outcome="'
    found = [line.removeprefix(prefix).split('"} ') for line in lines if line.startswith(prefix)]
    return {outcome: int(float(count)) for outcome, count in found}


def test_an_ended_job_is_told_and_signed(fake: FakeFlux, receiver: Receiver, tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys", create=True)
    mine, theirs = ({"authorization": f"Bearer {keys.create(name, Limits())[1]}"} for name in ("mine", "theirs"))
    with keeping(fake, jobs(tmp_path, receiver.origin), Keys(tmp_path / "keys")) as gateway:
        body = {"prompt": "a", "webhook": f"{receiver.origin}/done?x=1"}
        job_id = gateway.post("/v1/jobs", json=body, headers=mine).json()["id"]
        wait_for(lambda: receiver.messages)
        ((path, headers, raw),) = receiver.messages
        assert path == "/done?x=1"
        secret = gateway.get("/v1/webhook_secret", headers=mine).json()["secret"]
        message = Webhook(secret).verify(raw, headers)
        assert message["type"] == "job.completed"
        assert message["data"] == gateway.get(f"/v1/jobs/{job_id}", headers=mine).json()
        other = gateway.get("/v1/webhook_secret", headers=theirs).json()["secret"]
        for damaged, key in ((raw + b" ", secret), (raw, other)):
            with pytest.raises(WebhookVerificationError):
                Webhook(key).verify(damaged, headers)
        assert gateway.get("/v1/webhook_secret").status_code == 401
        assert secret == secret_of(MASTER, keys.all()[0].id)


def test_the_signature_of_the_specification() -> None:
    """Its own example: github.com/standard-webhooks/standard-webhooks, spec."""
    secret, message = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "msg_p5jXN8AQM9LWM0D4loKWxJek"
    body = b'{"test": 2432232314}'
    assert signature(secret, message, 1614265330, body) == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_failed_and_cancelled_jobs_are_told_too(fake: FakeFlux, receiver: Receiver, tmp_path: Path) -> None:
    with keeping(fake, jobs(tmp_path, receiver.origin, at_a_time=1)) as gateway:
        fake.error = InvalidRequest("height: got 100; allowed: multiples of 16")
        ended(gateway, submitted(gateway, webhook=receiver.origin))
        wait_for(lambda: len(receiver.messages) == 1)
        fake.error, fake.steps, fake.step_s = None, 1000, 0.02
        submitted(gateway)
        wait_for(lambda: fake.table)
        waits = submitted(gateway, webhook=receiver.origin)
        gateway.delete(f"/v1/jobs/{waits}")
        wait_for(lambda: len(receiver.messages) == 2)
    assert [b'"type": "job.failed"' in receiver.messages[0][2], b'"type": "job.cancelled"' in receiver.messages[1][2]]


def test_a_receiver_that_fails_is_told_again_and_not_for_ever(
    fake: FakeFlux, receiver: Receiver, tmp_path: Path
) -> None:
    receiver.answers = [500, 429]
    with keeping(fake, jobs(tmp_path, receiver.origin)) as gateway:
        submitted(gateway, webhook=receiver.origin)
        wait_for(lambda: tries(gateway).get("delivered") == 1)
        assert len({headers["webhook-id"] for _, headers, _ in receiver.messages}) == 1
        assert len(receiver.messages) == 3
        receiver.answers = [500] * 9
        submitted(gateway, webhook=receiver.origin)
        wait_for(lambda: tries(gateway).get("given_up") == 1)
        receiver.answers = [410]
        submitted(gateway, webhook=receiver.origin)
        wait_for(lambda: tries(gateway).get("given_up") == 2)
        assert len(receiver.messages) == 3 + 3 + 1


def test_no_redirect_is_followed(fake: FakeFlux, receiver: Receiver, tmp_path: Path) -> None:
    inner = Receiver()
    try:
        receiver.answers, receiver.location = [302, 307, 308], f"{inner.origin}/steal"
        with keeping(fake, jobs(tmp_path, receiver.origin)) as gateway:
            submitted(gateway, webhook=receiver.origin)
            wait_for(lambda: tries(gateway).get("given_up") == 1)
        assert inner.messages == []
    finally:
        inner.close()


def test_a_name_with_a_private_address_gets_nothing(fake: FakeFlux, receiver: Receiver, tmp_path: Path) -> None:
    """The operator named it, and DNS says it is inside: for DNS is not the operator's."""
    origin = receiver.origin.replace("127.0.0.1", "localhost")
    with keeping(fake, jobs(tmp_path, origin, webhook_private=False)) as gateway:
        job_id = submitted(gateway, webhook=origin)
        wait_for(lambda: tries(gateway).get("given_up") == 1)
        assert ended(gateway, job_id)["status"] == "completed"
    assert receiver.messages == []


def test_only_the_operators_origins(fake: FakeFlux, receiver: Receiver, tmp_path: Path) -> None:
    with keeping(fake, jobs(tmp_path, "https://hooks.example.com", "http://inside:8080")) as gateway:
        for url in (
            receiver.origin,
            "http://hooks.example.com/",
            "https://hooks.example.com:444/",
            "https://hooks.example.com.evil.example/",
            "https://hooks.example.com@evil.example/",
            "https://evil.example/?https://hooks.example.com",
            "https://user:pass@hooks.example.com/",
            "https://hooks.example.com\\@evil.example/",
            "https://hooks.example.com /",
            "file:///etc/passwd",
            "//hooks.example.com/",
            "",
            "https://hooks.example.com/" + "a" * 2000,
            "https://hooks.example.com/\u00e9",
            "https://[::1",
        ):
            answer = submit(gateway, webhook=url)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "webhook"), url
        for url in ("https://hooks.example.com", "https://HOOKS.example.com:443/a?b=c", "http://inside:8080/x"):
            fake.error = InvalidRequest("a: b")
            assert submit(gateway, webhook=url).status_code == 202, url
        answer = submit(gateway, webhook="https://x.example")
        assert "https://hooks.example.com, http://inside:8080" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "origin",
    ["hooks.example.com", "ftp://a", "https://", "https://a/path", "https://a?b", "https://u@a", "https://a:0"],
)
def test_what_is_no_origin(origin: str) -> None:
    with pytest.raises(ValueError, match="expected an origin"):
        Receivers([origin], private=False)


def test_no_origin_is_a_pattern() -> None:
    assert not Receivers(["https://*", "https://*.example"], private=False).allow("https://a.example")


@pytest.mark.parametrize(
    "origin", ["http://127.0.0.1", "https://10.0.0.1:8443", "http://[::1]", "https://169.254.169.254"]
)
def test_a_private_origin_needs_a_word(origin: str) -> None:
    with pytest.raises(ValueError, match="webhook-private"):
        Receivers([origin], private=False)
    assert Receivers([origin], private=True).allow(origin)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("255.255.255.255", False),
        ("224.0.1.1", False),
        ("::", False),
        ("::1", False),
        ("fe80::1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("ff0e::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
        ("2001:0:7f00:1::", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) == public


@pytest.mark.parametrize("name", ["localhost", "127.1", "0x7f.1", "2130706433"])
async def test_names_of_this_machine_resolve_to_nothing(name: str) -> None:
    resolver = PublicResolver()
    with pytest.raises(OSError, match="private addresses alone"):
        await resolver.resolve(name, 80)
    await resolver.close()
