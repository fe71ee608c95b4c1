"""Pictures of jobs in an object store, through the client that speaks to real ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.client.fakes import FakeFlux
from tests.gateway.jobs import ended, keeping, settings
from tests.gateway.serving import png, wait_for
from tests.support.fake_s3 import FakeS3


def test_pictures_in_a_bucket(fake: FakeFlux, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fluxserve_gateway.jobs.files._RETRY", {"max_retries": 0})
    with FakeS3() as s3:
        for name, value in {
            "AWS_ENDPOINT_URL": s3.url,
            "AWS_ACCESS_KEY_ID": "id",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "eu-central-1",
        }.items():
            monkeypatch.setenv(name, value)
        jobs = settings(f"sqlite:///{tmp_path / 'jobs.sqlite'}", tmp_path, keep=1.5, sweep=0.1)
        with keeping(fake, replace(jobs, files="s3://bucket/some/prefix")) as gateway:
            answer = gateway.post("/v1/jobs", data={"prompt": "a"}, files={"image": png()})
            job = ended(gateway, answer.json()["id"])
            assert job["status"] == "completed"
            folder = f"bucket/some/prefix/{job['id']}"
            owner = "bucket/some/prefix/fluxserve-jobs"
            assert set(s3.objects) == {owner, f"{folder}/input-0", f"{folder}/1-0.png"}
            picture = gateway.get(f"/v1/jobs/{job['id']}/images/0")
            assert picture.content == s3.objects[f"{folder}/1-0.png"]
            wait_for(lambda: set(s3.objects) == {owner})
            assert gateway.get(f"/v1/jobs/{job['id']}").status_code in (200, 404)
            s3.broken = True
            assert gateway.post("/v1/jobs", data={"prompt": "a"}, files={"image": png()}).status_code == 503
        assert s3.unsigned == 0
    assert not list(tmp_path.glob("job_*"))
