"""Hold an operator's decisions about jobs; `options` fills them in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class JobSettings:
    """Where jobs are kept, for how long, and how many.

    Attributes:
        database: SQLAlchemy's URL of the database, with `sqlite` or `postgresql+psycopg`.
        files: URL of the place for pictures, as obstore reads it: file://, s3://, …
        at_a_time: jobs that this gateway draws at the same time.
        max_queued, max_queued_per_key: jobs that wait, in all and of one key.
        keep: seconds for which a result is kept; also the longest that a job may wait.
        lease: seconds after which a gateway that shows no sign of life loses its jobs to others.
        poll: seconds between two looks for jobs that another gateway took in.
        sweep: seconds between two removals of what was kept long enough.
        webhook_origins: the only receivers of webhooks, e.g. "https://hooks.example.com"; none by default.
        webhook_private: whether a receiver may have a private address.
        webhook_secret: the operator's secret, from which each key's own is derived.
        webhook_retries: seconds between the tries of a delivery.
        webhook_timeout: seconds for one try.
    """

    database: str
    files: str
    at_a_time: int = 4
    max_queued: int = 1000
    max_queued_per_key: int = 100
    keep: float = 86_400.0
    lease: float = 15.0
    poll: float = 1.0
    sweep: float = 60.0
    webhook_origins: tuple[str, ...] = ()
    webhook_private: bool = False
    webhook_secret: bytes = b""
    webhook_retries: tuple[float, ...] = (5.0, 60.0, 600.0, 3600.0)
    webhook_timeout: float = 10.0

    @property
    def beat(self) -> float:
        """Seconds between two signs of life; a job's steps are as old as this."""
        return min(1.0, self.lease / 5)
