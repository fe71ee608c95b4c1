"""Leases, claims and files below HTTP: what a gateway that is gone, late or cut off may no longer do."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from fluxserve_gateway.jobs.database import Database, DatabaseError
from fluxserve_gateway.jobs.files import Files, new_id
from fluxserve_gateway.jobs.store import COMPLETED, FAILED, QUEUED, Job, NewJob, Store, TooMany

from tests.client.fakes import FakeFlux
from tests.gateway.jobs import ended, keeping, settings, submitted
from tests.gateway.serving import MODEL, wait_for
from tests.support.postgres import Postgres

ECHO = {"operation": "image_generation", "safety_identifier": None, "input_pixels": 0}


def new(key: str | None = None, owner: str = "") -> NewJob:
    return NewJob(new_id(), owner, key, "f", MODEL, {"arguments": {"prompt": "a"}, "echo": ECHO}, 0, None)


class Opened:
    """A store with leases of `lease` seconds."""

    def __init__(self, url: str, lease: float = 60.0) -> None:
        self.database = Database(url.replace("postgresql:", "postgresql+psycopg:"))
        self.store = Store(self.database, 60.0, lease)

    def submit(self) -> Job:
        return self.store.submit(new(), 1000, 1000)[0]


@pytest.fixture
def opened(database: str) -> Iterator[Opened]:
    made = Opened(database)
    yield made
    made.database.close()


def test_one_job_has_one_claim(opened: Opened) -> None:
    """Eight claimants at once: each job goes to one of them, in the order of arrival."""
    jobs = [opened.submit().id for _ in range(24)]
    with ThreadPoolExecutor(8) as pool:
        claimed = list(pool.map(lambda n: opened.store.claim(f"worker {n % 8}", [MODEL]), range(30)))
    assert sorted(job.id for job in claimed if job) == sorted(jobs)
    assert opened.store.counts() == {(MODEL, "in_progress"): 24}
    first = opened.submit()
    opened.submit()
    assert opened.store.claim("w", ["another"]) is None
    claim = opened.store.claim("w", [MODEL])
    assert claim is not None
    assert claim.id == first.id


def test_one_idempotency_key_is_inserted_once(opened: Opened) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: opened.store.submit(new("k"), 1000, 1000), range(16)))
    assert len({job.id for job, _ in found}) == 1
    assert sum(is_new for _, is_new in found) == 1


def test_the_bounds_are_exact(opened: Opened) -> None:
    def submit(number: int) -> bool:
        try:
            opened.store.submit(new(owner=f"key {number % 2}"), 9, 5)
        except TooMany:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(submit, range(24))) == 9


def test_a_lost_claim_writes_nothing(database: str) -> None:
    opened = Opened(database, lease=0.2)
    try:
        opened.submit()
        late = opened.store.claim("late", [MODEL])
        assert late is not None
        assert opened.store.claim("other", [MODEL]) is None
        assert opened.store.beat("late", {late.id: (1, 2)}) == {late.id: (1, False)}
        time.sleep(0.3)
        assert opened.store.claim("late", [MODEL], [late.id]) is None  # not from itself
        taken = opened.store.claim("other", [MODEL])
        assert taken is not None
        assert (taken.id, taken.claims, taken.losses) == (late.id, 2, 1)
        assert taken.last_draw_id == late.draw_id
        assert opened.store.beat("late", {late.id: (2, 2)}) == {}
        assert not opened.store.finish(late, COMPLETED, result={"late": True})
        assert not opened.store.put_back(late, 0.0, lost=False)
        assert opened.store.finish(taken, COMPLETED, result={"late": False})
        assert not opened.store.finish(taken, FAILED)
        found = opened.store.find("", late.id)
        assert found is not None
        assert found[0].result == {"late": False}
    finally:
        opened.database.close()


def test_a_gateway_that_is_gone_loses_its_jobs(fake: FakeFlux, database: str, tmp_path: Path) -> None:
    """Its request may still run on the server: it is stopped before the job is drawn again."""
    opened = Opened(database, lease=0.5)
    try:
        job = opened.submit()
        claim = opened.store.claim("gone", [MODEL])
        assert claim is not None
        with keeping(fake, settings(database, tmp_path / "files")) as gateway:
            assert ended(gateway, job.id)["status"] == "completed"
        assert fake.actions[0] == (claim.draw_id, "cancel")
        assert [name for name, _ in fake.requests] == [f"{job.id}-2"]
        assert not opened.store.finish(claim, COMPLETED)
    finally:
        opened.database.close()


def test_a_gateway_without_its_database_stops_drawing(fake: FakeFlux, postgres: Postgres, tmp_path: Path) -> None:
    """It cannot tell whether another one has taken over. Once the database is back, the job is drawn."""
    fake.steps, fake.step_s = 1000, 0.02
    with keeping(fake, settings(postgres.database(), tmp_path / "files", lease=1.0)) as gateway:
        job_id = submitted(gateway)
        wait_for(lambda: fake.table)
        postgres.stop()
        try:
            assert gateway.get(f"/v1/jobs/{job_id}").status_code == 503
            assert gateway.get("/v1/models").status_code == 200
            wait_for(lambda: [outcome for _, outcome in fake.ended] == ["cancelled"])
        finally:
            postgres.start()
        fake.steps = 1
        assert ended(gateway, job_id)["status"] == "completed"


def test_a_database_that_says_nothing_is_none(fake: FakeFlux, postgres: Postgres, tmp_path: Path) -> None:
    fake.steps, fake.step_s = 1000, 0.02
    with keeping(fake, settings(postgres.database(), tmp_path / "files", lease=1.0)) as gateway:
        job_id = submitted(gateway)
        wait_for(lambda: fake.table)
        postgres.pause(signal.SIGSTOP)
        try:
            wait_for(lambda: [outcome for _, outcome in fake.ended] == ["cancelled"])
        finally:
            postgres.pause(signal.SIGCONT)
        fake.steps = 1
        assert ended(gateway, job_id)["status"] == "completed"


def test_what_no_longer_answers_is_said_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(DatabaseError, match="cannot be used") as caught:
        Database(f"postgresql+psycopg://u:secret@/nothing?host={tmp_path}")
    assert "secret" not in str(caught.value)
    (tmp_path / "jobs.sqlite").write_text("no database " * 1000)
    with pytest.raises(DatabaseError):
        Database(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    with pytest.raises(DatabaseError):
        Database("sqlite:////proc/none/jobs.sqlite")


def test_a_place_for_files_has_one_database(fake: FakeFlux, tmp_path: Path) -> None:
    """Gateways of two databases would remove one another's files as those of no job."""
    one, other = (f"sqlite:///{tmp_path / name}" for name in ("one.sqlite", "other.sqlite"))
    for _ in range(2):
        with keeping(fake, settings(one, tmp_path / "files")) as gateway:
            ended(gateway, submitted(gateway))
    with pytest.raises(ValueError, match="another database"):
        keeping(fake, settings(other, tmp_path / "files"))


def test_prompts_are_their_owners(fake: FakeFlux, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    url = f"sqlite:///{folder / 'jobs.sqlite'}"
    with keeping(fake, settings(url, folder / "files")) as gateway:
        ended(gateway, submitted(gateway, "a secret"))
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
        assert all(mode & 0o077 == 0 for mode in modes.values()), modes
        assert b"\x89PNG" not in (folder / "jobs.sqlite").read_bytes()  # pictures are files


async def test_files_of_no_job_are_removed(fake: FakeFlux, tmp_path: Path) -> None:
    """A gateway may die between a file and its row. What is not a job's is left alone."""
    folder = tmp_path / "files"
    files = Files(folder.as_uri())
    database = Database(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    try:
        store = Store(database, 60.0, 60.0)
        known, _ = store.submit(new(), 10, 10)
        unknown, young = new_id(), new_id()
        for name in (f"{known.id}/input-0", f"{unknown}/input-0", "holiday/picture.png"):
            await files.put(name, b"x")
            os.utime(folder / name, (1, 1))
        await files.put(f"{young}/input-0", b"x")
        from fluxserve_gateway.jobs.metrics import JobMetrics
        from fluxserve_gateway.jobs.upkeep import Upkeep
        from prometheus_client import CollectorRegistry

        upkeep = Upkeep(database, store, files, JobMetrics(CollectorRegistry(), [MODEL]), 60.0)
        await asyncio.gather(upkeep.remove_abandoned(), upkeep.remove_abandoned())
        assert {each.name for each in folder.iterdir()} == {known.id, young, "holiday"}
        await files.remove(known.id)
        await files.remove(known.id)
        assert await files.get(f"{known.id}/input-0") is None
    finally:
        database.close()


def test_an_input_that_is_gone_is_no_picture(fake: FakeFlux, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'jobs.sqlite'}"
    opened = Opened(url)
    job = NewJob(new_id(), "", None, "f", MODEL, {"arguments": {"prompt": "a"}, "echo": ECHO}, 1, None)
    opened.store.submit(job, 10, 10)
    opened.database.close()
    with keeping(fake, settings(url, tmp_path / "files", lease=0.3)) as gateway:
        found = ended(gateway, job.id)
        assert (found["status"], found["error"]["code"]) == ("failed", "lost")
    assert fake.requests == []


def test_a_delivery_has_one_gateway_at_a_time(opened: Opened) -> None:
    for _ in range(9):
        opened.store.submit(replace(new(), webhook="https://a.example"), 10, 10)
        claim = opened.store.claim("w", [MODEL])
        assert claim is not None
        assert opened.store.finish(claim, COMPLETED)
    opened.submit()
    with ThreadPoolExecutor(4) as pool:
        found = [job for batch in pool.map(lambda _: opened.store.claim_deliveries(4, 1.0), range(8)) for job in batch]
    assert len({job.id for job in found}) == len(found) == 9
    for job in found[:7]:
        opened.store.delivered(job, None)
    opened.store.delivered(found[7], 60.0)
    time.sleep(1.1)  # the ninth was taken by a gateway that is gone
    (again,) = opened.store.claim_deliveries(4, 1.0)
    assert (again.id, again.webhook_tries) == (found[8].id, 1)


def test_a_queue_has_an_order(opened: Opened) -> None:
    first, second = opened.submit(), opened.submit()
    claim = opened.store.claim("w", [MODEL])
    assert claim is not None
    assert opened.store.put_back(claim, 0.0, lost=True)
    again = opened.store.claim("w", [MODEL])
    assert again is not None
    assert (again.id, again.losses, again.claims) == (first.id, 1, 2)
    assert opened.store.put_back(again, 60.0, lost=False)
    later = opened.store.claim("w", [MODEL])
    assert later is not None
    assert later.id == second.id
    found = opened.store.find("", first.id)
    assert found is not None
    assert (found[0].status, found[1]) == (QUEUED, 0)
