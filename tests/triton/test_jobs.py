"""Fifty jobs, three gateways and one Triton; a gateway and Triton are killed in the middle."""

import io
import os
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from fluxserve_gateway import Fleet
from PIL import Image

from tests.client.fakes import FakeFlux
from tests.gateway.conftest import postgres  # noqa: F401 (a fixture)
from tests.gateway.jobs import settings, submit
from tests.gateway.serving import MODEL, Gateway, server_of
from tests.gateway.test_command import serving
from tests.support.postgres import Postgres
from tests.triton.conftest import READY_S, wait_for
from tests.triton.supervised import Serve, serve, tree

JOBS = 50
QUICK = 20  # of one step; the others take longer than the test needs to notice that these are done, and to kill
AT_A_TIME = 4


def ended(table: psycopg.Connection[Any]) -> int:
    """How many jobs have ended, by the table itself."""
    row = table.execute("SELECT count(*) FROM fluxserve_jobs WHERE ended IS NOT NULL").fetchone()
    assert row is not None
    return int(row[0])


def kill_triton(served: Serve) -> None:
    names = {pid: Path(f"/proc/{pid}/comm").read_text().strip() for pid in tree(served.process.pid)}
    (triton,) = (pid for pid, name in names.items() if name == "tritonserver")
    os.kill(triton, signal.SIGKILL)


@pytest.mark.xdist_group("postgresql")
def test_nothing_is_lost_and_nothing_is_drawn_twice(
    postgres: Postgres,  # noqa: F811
    tmp_path: Path,
) -> None:
    database = postgres.database()
    idle = Fleet({MODEL: [server_of(FakeFlux(), ready=False)]})  # this one takes in, and cannot draw
    with (
        serve() as served,
        Gateway(idle, jobs=settings(database, tmp_path)) as door,
        psycopg.connect(database, autocommit=True) as table,
    ):

        def send(number: int) -> tuple[str, bool]:
            fields = {"size": "64x64", "num_inference_steps": 1 if number < QUICK else 24, "seed": number}
            answer = submit(door, f"apple {number}", f"key {number}", **fields)
            assert answer.status_code == 202, answer.text
            return answer.json()["id"], "idempotent-replayed" in answer.headers

        with ThreadPoolExecutor(8) as pool:
            ids = [job_id for job_id, _ in pool.map(send, range(JOBS))]
        server = f"{MODEL}=grpc://127.0.0.1:{served.ports.grpc}"
        options = ("--server", server, "--no-auth", "--jobs", database, "--job-files", tmp_path, "--job-lease", 3)
        with serving(*options) as killed, serving(*options) as other:
            wait_for(lambda: ended(table) >= QUICK // 2, READY_S)
            killed.process.kill()
            wait_for(lambda: ended(table) >= QUICK, READY_S)
            kill_triton(served)
            assert ended(table) < JOBS - AT_A_TIME, "all were drawn before Triton was killed"
            wait_for(lambda: ended(table) == JOBS, READY_S)
            assert other.end() == 0
        found = {job["id"]: job for job in door.get("/v1/jobs", params={"limit": 100}).json()["data"]}
        assert len(found) == JOBS
        statuses = Counter(job["status"] for job in found.values())
        assert statuses["completed"] + statuses["failed"] == JOBS
        assert statuses["completed"] >= JOBS - 2 * AT_A_TIME
        assert all(job["error"]["message"] for job in found.values() if job["status"] == "failed")
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(send, range(JOBS))) == [(job_id, True) for job_id in ids]
        for number, job_id in enumerate(ids):
            if found[job_id]["status"] == "completed":
                (drawn,) = found[job_id]["result"]["data"]
                assert drawn["seed"] == number
                assert Image.open(io.BytesIO(door.get(drawn["url"]).content)).size == (64, 64)
        lost = table.execute("SELECT count(*) FROM fluxserve_jobs WHERE losses > 0").fetchone()
    assert lost is not None
    assert 2 <= lost[0] <= 3 * AT_A_TIME  # what was drawn when something was killed, and nothing else, is drawn again
