"""Gateways that keep jobs, and what tests ask them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
from fluxserve_gateway import Config, Fleet
from fluxserve_gateway.jobs.settings import JobSettings
from fluxserve_gateway.keys import Keys

from tests.client.fakes import FakeFlux
from tests.gateway.serving import MODEL, Gateway, server_of, wait_for

ENDED = ("completed", "failed", "cancelled")


def settings(database: str, files: Path, **other: Any) -> JobSettings:
    """Settings for tests: short leases, and looks at the queue that are close together."""
    quick = {"lease": 2.0, "poll": 0.05}
    return JobSettings(database.replace("postgresql:", "postgresql+psycopg:"), files.as_uri(), **{**quick, **other})


def keeping(fake: FakeFlux, jobs: JobSettings, keys: Keys | None = None, config: Config | None = None) -> Gateway:
    """A gateway that keeps jobs, in front of one server."""
    return Gateway(Fleet({MODEL: [server_of(fake)]}), config, keys, jobs)


def submit(gateway: Gateway, prompt: str = "a", key: str | None = None, **fields: Any) -> httpx2.Response:
    headers = {} if key is None else {"idempotency-key": key}
    return gateway.post("/v1/jobs", json={"prompt": prompt, **fields}, headers=headers)


def submitted(gateway: Gateway, prompt: str = "a", key: str | None = None, **fields: Any) -> str:
    """Submit a job that must be taken; return its id."""
    answer = submit(gateway, prompt, key, **fields)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def look(gateway: Gateway, job_id: str) -> dict[str, Any]:
    answer = gateway.get(f"/v1/jobs/{job_id}")
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def ended(gateway: Gateway, job_id: str, patience: float = 15.0) -> dict[str, Any]:
    """Wait for a job's end."""
    found: dict[str, Any] = {}

    def over() -> bool:
        found.update(look(gateway, job_id))
        return found["status"] in ENDED

    wait_for(over, patience)
    return found
