"""Every change of a job's state, each one transaction.

    queued ──claim──▶ in_progress ──finish──▶ completed | failed | cancelled ──(keep)──▶ removed
      ▲                    │
      └──── put_back ──────┘       or claimed by another gateway, once the lease is over

A claim has a number. What a gateway writes about a job it names with that number, so a gateway that lost its lease
changes nothing any more: no job has two results.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, and_, delete, func, insert, or_, select, update

from fluxserve_gateway.jobs.database import Database, jobs

QUEUED, RUNNING = "queued", "in_progress"
COMPLETED, FAILED, CANCELLED = "completed", "failed", "cancelled"
ENDED = (COMPLETED, FAILED, CANCELLED)


@dataclass(frozen=True)
class Job:
    """One job, as a row has it. Times are the database's seconds since 1970.

    Attributes:
        number: the order of arrival.
        owner: the id of the key that submitted it; "" where there are no keys.
        request: "arguments" of the drawing without its images, and "echo".
        inputs: how many input images are among its files.
        due: not to be claimed before.
        claims: how often a gateway began to draw it.
        losses: how often a gateway, or a server, was lost while it was drawn.
        cancelling: whether its caller wants it no more.
        result: the answer, with the names of the files of its pictures.
        error: "code", "message", "param".
        webhook_due: when its receiver is to be told; None: nothing is left to tell.
    """

    number: int
    id: str
    owner: str
    idempotency_key: str | None
    fingerprint: str
    status: str
    model: str
    request: dict[str, Any]
    inputs: int
    created: float
    due: float
    started: float | None
    ended: float | None
    expires: float | None
    worker: str | None
    lease_until: float | None
    claims: int
    losses: int
    step: int
    steps: int
    cancelling: bool
    result: dict[str, Any] | None
    error: dict[str, Any] | None
    webhook: str | None
    webhook_due: float | None
    webhook_tries: int

    @property
    def draw_id(self) -> str:
        """The id of this claim's request on a server."""
        return f"{self.id}-{self.claims}"

    @property
    def last_draw_id(self) -> str:
        """The id that the claim before had."""
        return f"{self.id}-{self.claims - 1}"


@dataclass(frozen=True)
class NewJob:
    """A job that is to be kept; see `Job`."""

    id: str
    owner: str
    idempotency_key: str | None
    fingerprint: str
    model: str
    request: dict[str, Any]
    inputs: int
    webhook: str | None


class TooMany(Exception):
    """As many jobs wait as may: in all, or of one key if `of_key`."""

    def __init__(self, queued: int, *, of_key: bool) -> None:
        super().__init__(queued, of_key)
        self.queued, self.of_key = queued, of_key


def _job(row: Row[Any] | None) -> Job | None:
    return None if row is None else Job(**row._mapping)


class Store:
    """The jobs in one database. All methods block; `Database.run` calls them."""

    def __init__(self, database: Database, keep: float, lease: float) -> None:
        """Open the jobs of a database; `keep` and `lease` are those of `JobSettings`."""
        self._database = database
        self._keep, self._lease = keep, lease

    # ---- for callers

    def known(self, owner: str, idempotency_key: str) -> Job | None:
        """Find the job that this key submitted under this idempotency key."""
        with self._database.reads() as (db, _):
            return self._known(db, owner, idempotency_key)

    def submit(self, new: NewJob, max_queued: int, max_queued_per_key: int) -> tuple[Job, bool]:
        """Keep a new job, unless one is there with its idempotency key.

        Returns:
            The job, and whether it is new.

        Raises:
            TooMany: nothing was kept.
        """
        with self._database.writes() as (db, now):
            self._database.exclude_others(db)  # or two gateways would count, and then both would insert
            if new.idempotency_key and (known := self._known(db, new.owner, new.idempotency_key)):
                return known, False
            waiting = select(func.count()).select_from(jobs).where(jobs.c.status == QUEUED)
            own = db.execute(waiting.where(jobs.c.owner == new.owner)).scalar_one()
            if own >= max_queued_per_key:
                raise TooMany(own, of_key=True)
            if (every := db.execute(waiting).scalar_one()) >= max_queued:
                raise TooMany(every, of_key=False)
            job = _job(db.execute(insert(jobs).values(self._row(new, now)).returning(*jobs.c)).one())
            assert job is not None
            return job, True

    def add_completed(self, new: NewJob, result: Mapping[str, Any]) -> None:
        """Keep what was drawn without a queue."""
        with self._database.writes() as (db, now):
            row = {**self._row(new, now), **self._ended(now, COMPLETED), "started": now, "result": result}
            db.execute(insert(jobs).values(row))

    @staticmethod
    def _row(new: NewJob, now: float) -> dict[str, Any]:
        counts = dict.fromkeys(("claims", "losses", "step", "steps", "webhook_tries"), 0)
        return {**vars(new), **counts, "status": QUEUED, "created": now, "due": now, "cancelling": False}

    @staticmethod
    def _known(db: Connection, owner: str, idempotency_key: str) -> Job | None:
        query = select(jobs).where(jobs.c.owner == owner, jobs.c.idempotency_key == idempotency_key)
        return _job(db.execute(query).one_or_none())

    def find(self, owner: str, job_id: str) -> tuple[Job, int] | None:
        """Find a job of this owner, and how many jobs of its model are before it in the queue."""
        with self._database.reads() as (db, _):
            job = _job(db.execute(select(jobs).where(jobs.c.id == job_id, jobs.c.owner == owner)).one_or_none())
            if job is None or job.status != QUEUED:
                return None if job is None else (job, 0)
            ahead = select(func.count()).select_from(jobs)
            ahead = ahead.where(jobs.c.status == QUEUED, jobs.c.model == job.model, jobs.c.number < job.number)
            return job, db.execute(ahead).scalar_one()

    def page(self, owner: str, *, limit: int, after: str | None, newest_first: bool) -> list[Job] | None:
        """List at most `limit` jobs of this owner, beginning behind the job `after`; None if there is no such job."""
        with self._database.reads() as (db, _):
            query = select(jobs).where(jobs.c.owner == owner)
            if after is not None:
                of_after = select(jobs.c.number).where(jobs.c.id == after, jobs.c.owner == owner)
                number = db.execute(of_after).scalar_one_or_none()
                if number is None:
                    return None
                query = query.where(jobs.c.number < number if newest_first else jobs.c.number > number)
            order = jobs.c.number.desc() if newest_first else jobs.c.number
            return [Job(**row._mapping) for row in db.execute(query.order_by(order).limit(limit))]

    def cancel(self, owner: str, job_id: str) -> tuple[Job, bool] | None:
        """End a job that waits; have one that is drawn ended by the gateway that draws it.

        Returns:
            The job, and whether it waited; None if there is no such job.
        """
        of_owner = and_(jobs.c.id == job_id, jobs.c.owner == owner)
        with self._database.writes() as (db, now):
            row = db.execute(select(jobs).where(of_owner).with_for_update()).one_or_none()
            if row is not None and row.status == QUEUED:
                db.execute(update(jobs).where(of_owner).values(self._ended(now, CANCELLED)))
            elif row is not None and row.status == RUNNING:
                db.execute(update(jobs).where(of_owner).values(cancelling=True))
            job = _job(db.execute(select(jobs).where(of_owner)).one_or_none())
            return None if job is None or row is None else (job, row.status == QUEUED)

    # ---- for workers

    def claim(self, worker: str, models: Collection[str], held: Collection[str] = ()) -> Job | None:
        """Take the first job that waits, or whose gateway is gone; None if there is none for these models.

        `held`: jobs that this worker draws now; it may be late with their leases, and must not take them from itself.
        """
        with self._database.writes() as (db, now):
            waits = and_(jobs.c.status == QUEUED, jobs.c.due <= now)
            orphaned = and_(jobs.c.status == RUNNING, jobs.c.lease_until < now)
            free = and_(jobs.c.model.in_(models), jobs.c.id.not_in(held), or_(waits, orphaned))
            query = select(jobs).where(free).order_by(jobs.c.number).limit(1)
            job = _job(db.execute(query.with_for_update(skip_locked=True)).one_or_none())
            if job is None:
                return None
            values = {
                "status": RUNNING,
                "worker": worker,
                "lease_until": now + self._lease,
                "claims": job.claims + 1,
                "losses": job.losses + (job.status == RUNNING),
                "started": now if job.started is None else job.started,
                "step": 0,
                "steps": 0,
            }
            db.execute(update(jobs).where(jobs.c.number == job.number).values(values))
            return Job(**{**vars(job), **values})

    def beat(self, worker: str, steps: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, bool]]:
        """Renew the leases of these jobs, and note their steps.

        Args:
            worker: who holds them.
            steps: by job, the step, and of how many.

        Returns:
            By job that is still held: its claim's number, and whether its caller wants it no more.
        """
        with self._database.writes() as (db, now):
            held = and_(jobs.c.worker == worker, jobs.c.status == RUNNING)
            for job_id in sorted(steps):  # in one order, or two transactions might wait for one another
                step, of = steps[job_id]
                values = {"lease_until": now + self._lease, "step": step, "steps": of}
                db.execute(update(jobs).where(held, jobs.c.id == job_id).values(values))
            rows = db.execute(select(jobs.c.id, jobs.c.claims, jobs.c.cancelling).where(held, jobs.c.id.in_(steps)))
            return {row.id: (row.claims, row.cancelling) for row in rows}

    def finish(
        self, job: Job, status: str, *, result: Mapping[str, Any] | None = None, error: Mapping[str, Any] | None = None
    ) -> bool:
        """End a job that was claimed; False if it is no longer this claim's to end."""
        with self._database.writes() as (db, now):
            values = {**self._ended(now, status), "result": result, "error": error}
            return bool(db.execute(update(jobs).where(self._held(job)).values(values)).rowcount)

    def put_back(self, job: Job, delay: float, *, lost: bool) -> bool:
        """Have a job that was claimed wait again, for `delay` seconds at least; False as in `finish`."""
        with self._database.writes() as (db, now):
            values = {"status": QUEUED, "due": now + delay, "lease_until": None, "worker": None}
            values["losses"] = job.losses + lost
            return bool(db.execute(update(jobs).where(self._held(job)).values(values)).rowcount)

    @staticmethod
    def _held(job: Job) -> Any:
        return and_(jobs.c.number == job.number, jobs.c.status == RUNNING, jobs.c.claims == job.claims)

    def _ended(self, now: float, status: str) -> dict[str, Any]:
        return {
            "status": status,
            "ended": now,
            "expires": now + self._keep,
            "lease_until": None,
            "worker": None,
            "webhook_due": now,
        }

    # ---- for webhooks

    def claim_deliveries(self, limit: int, within: float) -> list[Job]:
        """Take jobs whose webhooks are due; another gateway may take them after `within` seconds."""
        with self._database.writes() as (db, now):
            due = and_(jobs.c.status.in_(ENDED), jobs.c.webhook.is_not(None), jobs.c.webhook_due <= now)
            query = select(jobs).where(due).order_by(jobs.c.webhook_due).limit(limit)
            found = [Job(**row._mapping) for row in db.execute(query.with_for_update(skip_locked=True))]
            values = {"webhook_due": now + within, "webhook_tries": jobs.c.webhook_tries + 1}
            db.execute(update(jobs).where(jobs.c.number.in_([job.number for job in found])).values(values))
            return found

    def delivered(self, job: Job, retry_in: float | None) -> None:
        """Note that a delivery is done, or when to try again."""
        with self._database.writes() as (db, now):
            due = None if retry_in is None else now + retry_in
            db.execute(update(jobs).where(jobs.c.number == job.number).values(webhook_due=due))

    # ---- for upkeep

    def expired(self, limit: int) -> list[str]:
        """List the ids of jobs that were kept long enough."""
        with self._database.reads() as (db, now):
            return list(db.scalars(select(jobs.c.id).where(jobs.c.expires < now).limit(limit)))

    def remove(self, job_id: str) -> None:
        """Forget a job that has ended."""
        with self._database.writes() as (db, _):
            db.execute(delete(jobs).where(jobs.c.id == job_id, jobs.c.status.in_(ENDED)))

    def give_up(self, error: Mapping[str, Any]) -> list[str]:
        """Fail the jobs that nobody could draw for as long as a result is kept; return their models."""
        with self._database.writes() as (db, now):
            before = now - self._keep
            waits = and_(jobs.c.status == QUEUED, jobs.c.created < before)
            orphaned = and_(jobs.c.status == RUNNING, jobs.c.lease_until < before)
            values = {**self._ended(now, FAILED), "error": error}
            change = update(jobs).where(or_(waits, orphaned)).values(values).returning(jobs.c.model)
            return list(db.scalars(change))

    def among(self, job_ids: Collection[str]) -> set[str]:
        """Return those of these ids that are jobs."""
        with self._database.reads() as (db, _):
            return set(db.scalars(select(jobs.c.id).where(jobs.c.id.in_(job_ids))))

    def counts(self) -> dict[tuple[str, str], int]:
        """Count the jobs that wait and are drawn, by model and status."""
        with self._database.reads() as (db, _):
            query = select(jobs.c.model, jobs.c.status, func.count()).where(jobs.c.status.in_((QUEUED, RUNNING)))
            return {(row[0], row[1]): row[2] for row in db.execute(query.group_by(jobs.c.model, jobs.c.status))}
