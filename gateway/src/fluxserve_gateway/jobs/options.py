"""The options of `serve` for jobs."""

from __future__ import annotations

import argparse
import stat
from pathlib import Path

from fluxserve_gateway.jobs.settings import JobSettings

_HOUR_S = 3600.0
_MIN_SECRET = 32  # bytes


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to a parser."""
    defaults = JobSettings("", "")
    add = parser.add_argument_group("jobs").add_argument
    add("--jobs", metavar="PLACE", help="keep jobs: in a folder, or in postgresql://…, which gateways may share")
    add("--job-files", metavar="PLACE", help="keep their pictures in a folder, or in s3://BUCKET/PREFIX")
    add("--job-hours", type=float, default=defaults.keep / _HOUR_S, help="how long results are kept (%(default)g)")
    add(
        "--job-lease",
        type=float,
        default=defaults.lease,
        help="seconds until a dead gateway's are redrawn (%(default)g)",
    )
    add("--jobs-at-a-time", type=int, default=defaults.at_a_time, help="by this gateway (default: %(default)s)")
    add("--max-jobs", type=int, default=defaults.max_queued, help="that wait (default: %(default)s)")
    add("--max-jobs-per-key", type=int, default=defaults.max_queued_per_key, help="that wait (default: %(default)s)")
    add("--webhook", action="append", default=[], metavar="ORIGIN", help="may receive webhooks; repeatable")
    add("--webhook-private", action="store_true", help="receivers may have private addresses")
    add("--webhook-secret", type=Path, metavar="FILE", help="32 random bytes or more, for signatures")


def job_settings(given: argparse.Namespace) -> JobSettings | None:
    """Read the settings; None without `--jobs`.

    Raises:
        ValueError: options that contradict each other, or are out of bounds.
        OSError: a secret that cannot be read.
    """
    if given.jobs is None:
        if given.job_files or given.webhook:
            raise ValueError("jobs: got nothing, expected a place beside job-files or webhook")
        return None
    for name in ("job_hours", "job_lease", "jobs_at_a_time", "max_jobs", "max_jobs_per_key"):
        if not 0 < getattr(given, name) < 2**31:
            raise ValueError(f"{name.replace('_', '-')}: got {getattr(given, name)}, expected more than 0")
    database, files = _places(given.jobs, given.job_files)
    return JobSettings(
        database,
        files,
        at_a_time=given.jobs_at_a_time,
        max_queued=given.max_jobs,
        max_queued_per_key=given.max_jobs_per_key,
        keep=given.job_hours * _HOUR_S,
        lease=given.job_lease,
        webhook_origins=tuple(given.webhook),
        webhook_private=given.webhook_private,
        webhook_secret=_secret(given.webhook_secret) if given.webhook else b"",
    )


def _places(jobs: str, files: str | None) -> tuple[str, str]:
    """Return the URLs of the database and of the files; a folder has room for both."""
    if jobs.startswith(("postgresql://", "postgres://")):
        if files is None:
            raise ValueError("job-files: got nothing, expected a place beside a PostgreSQL database")
        return f"postgresql+psycopg://{jobs.partition('://')[2]}", _files(files)
    if "://" in jobs:
        raise ValueError(f"jobs: got {jobs.partition('://')[0]}://…, expected a folder, or postgresql://…")
    folder = Path(jobs).expanduser().absolute()
    return f"sqlite:///{folder / 'jobs.sqlite'}", _files(files or str(folder / "files"))


def _files(place: str) -> str:
    return place if "://" in place else Path(place).expanduser().absolute().as_uri()


def _secret(path: Path | None) -> bytes:
    if path is None:
        raise ValueError("webhook-secret: got nothing, expected a file with 32 random bytes or more")
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ValueError(f"webhook-secret: {path} has mode {mode:o}; allowed: 600 (chmod 600 {path})")
    secret = path.read_bytes()
    if len(secret) < _MIN_SECRET:
        raise ValueError(f"webhook-secret: got {len(secret)} bytes, expected {_MIN_SECRET} or more")
    return secret
