"""Jobs of the command, as a process that is killed; and what it does not start with."""

from __future__ import annotations

import secrets
from pathlib import Path

import httpx2
import pytest

from tests.client.fakes import FakeFlux, Wire
from tests.gateway.serving import wait_for
from tests.gateway.test_command import Process, run, serving


def statuses(gateway: Process) -> list[str]:
    answer = httpx2.get(f"{gateway.url}/v1/jobs", params={"limit": 100}, timeout=20)
    return [job["status"] for job in answer.json()["data"]]


def test_kill_9_in_the_middle(fake: FakeFlux, tmp_path: Path) -> None:
    """The next gateway on the folder draws what the killed one had not ended, and nothing else."""
    fake.steps, fake.step_s = 4, 0.2
    with Wire(fake) as wire:
        options = ("--server", f"m={wire.url('grpc')}", "--no-auth", "--jobs", tmp_path, "--job-lease", 1)
        with serving(*options) as gateway:
            for number in range(20):
                body, header = {"prompt": str(number)}, {"idempotency-key": str(number)}
                answer = httpx2.post(f"{gateway.url}/v1/jobs", json=body, headers=header, timeout=20)
                assert answer.status_code == 202
            wait_for(lambda: statuses(gateway).count("completed") >= 2)
            gateway.process.kill()
            gateway.process.wait()
        begun = len(fake.requests)
        assert begun < 20
        fake.steps, fake.step_s = 1, 0.0
        with serving(*options) as gateway:
            wait_for(lambda: statuses(gateway) == ["completed"] * 20)
            assert gateway.end() == 0
        assert all("time" in line for line in gateway.lines)
    drawn = [name.rsplit("-", 1)[0] for name, _ in fake.requests]
    assert len(set(drawn)) == 20
    assert len(drawn) <= 20 + 4  # what was drawn at that moment


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--job-files", "a"], 2, "jobs: got nothing"),
        (["--webhook", "https://a.example"], 2, "jobs: got nothing"),
        (["--jobs", "postgresql://h/d"], 2, "job-files: got nothing"),
        (["--jobs", "mysql://u:secret@h/d"], 2, "mysql://…"),
        (["--jobs", "{folder}", "--job-files", "ftp://a"], 2, "job-files"),
        (["--jobs", "{folder}", "--webhook", "https://a.example"], 2, "webhook-secret"),
        (["--jobs", "{folder}", "--webhook", "a.example", "--webhook-secret", "{secret}"], 2, "expected an origin"),
        (["--jobs", "{folder}", "--webhook", "https://10.0.0.1", "--webhook-secret", "{secret}"], 2, "webhook-private"),
        (["--jobs", "{folder}", "--webhook", "https://a.example", "--webhook-secret", "{short}"], 2, "got 3 bytes"),
        (["--jobs", "{folder}", "--webhook", "https://a.example", "--webhook-secret", "{open}"], 2, "mode 644"),
        (
            ["--jobs", "{folder}", "--webhook", "https://a.example", "--webhook-secret", "{folder}/no"],
            1,
            "No such file",
        ),
        (["--jobs", "{folder}", "--job-hours", "0"], 2, "job-hours"),
        (["--jobs", "{folder}", "--job-hours", "nan"], 2, "job-hours"),
        (["--jobs", "{folder}", "--max-jobs", "-1"], 2, "max-jobs"),
        (["--jobs", "{secret}/jobs"], 1, "Not a directory"),
        (["--jobs", "postgresql://u:secret@/d?host=/nonexistent", "--job-files", "{folder}"], 1, "cannot be used"),
    ],
)
def test_what_it_does_not_start_with(words: list[str], status: int, said: str, tmp_path: Path) -> None:
    places = {name: tmp_path / name for name in ("folder", "secret", "short", "open")}
    for name, size, mode in (("secret", 32, 0o600), ("short", 3, 0o600), ("open", 32, 0o644)):
        places[name].write_bytes(secrets.token_bytes(size))
        places[name].chmod(mode)
    words = [word.format(**places) for word in words]
    code, out, error = run("serve", "--port", "0", "--no-auth", "--server", "m=a", *words)
    assert (code, out) == (status, ""), error
    assert said in error
    assert "Traceback" not in error
    assert "u:secret" not in error
