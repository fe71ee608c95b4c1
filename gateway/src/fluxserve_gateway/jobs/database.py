"""The table of jobs, and transactions on it in SQLite or PostgreSQL.

Times are the database's own, in seconds since 1970: the clocks of several gateways differ, and leases must not.
Calls block; they run on a few threads of their own.
"""

from __future__ import annotations

import asyncio
import logging
import os
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Connection,
    Engine,
    Float,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    insert,
    select,
    text,
)
from sqlalchemy.engine import make_url
from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from fluxserve_gateway.errors import Overloaded

T = TypeVar("T")

log = logging.getLogger("fluxserve_gateway")

_THREADS = 4  # for callers, and as many for this gateway: a crowd of callers must not keep it from its leases
_PATIENCE_S = 10  # for a lock, or a statement
_LOCK = 0x666C7578  # any number that no other program takes as an advisory lock
_NOW = {
    "sqlite": text("SELECT (julianday('now') - 2440587.5) * 86400.0"),
    "postgresql": text("SELECT extract(epoch FROM clock_timestamp())::float8"),
}

_metadata = MetaData()

jobs = Table(
    "fluxserve_jobs",
    _metadata,
    Column("number", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("id", Text, nullable=False, unique=True),
    Column("owner", Text, nullable=False),
    Column("idempotency_key", Text),
    Column("fingerprint", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("request", JSON, nullable=False),
    Column("inputs", Integer, nullable=False),
    Column("created", Float(53), nullable=False),
    Column("due", Float(53), nullable=False),
    Column("started", Float(53)),
    Column("ended", Float(53)),
    Column("expires", Float(53)),
    Column("worker", Text),
    Column("lease_until", Float(53)),
    Column("claims", Integer, nullable=False),
    Column("losses", Integer, nullable=False),
    Column("step", Integer, nullable=False),
    Column("steps", Integer, nullable=False),
    Column("cancelling", Boolean, nullable=False),
    Column("result", JSON(none_as_null=True)),
    Column("error", JSON(none_as_null=True)),
    Column("webhook", Text),
    Column("webhook_due", Float(53)),
    Column("webhook_tries", Integer, nullable=False),
    UniqueConstraint("owner", "idempotency_key"),
    Index("fluxserve_jobs_queue", "status", "number"),
    Index("fluxserve_jobs_of_owner", "owner", "number"),
    Index("fluxserve_jobs_expiry", "expires"),
    Index("fluxserve_jobs_webhooks", "webhook_due"),
)


_identity = Table("fluxserve_jobs_database", _metadata, Column("id", Text, primary_key=True))


class DatabaseError(OSError):
    """A database that cannot be used."""


class Database:
    """One database, open until `close`.

    Attributes:
        id: the database's own, which its place for files has, too.
    """

    def __init__(self, url: str) -> None:
        """Open it, and make the table where there is none.

        Raises:
            DatabaseError: it cannot be reached, or used.
        """
        self._engine = _sqlite(url) if url.startswith("sqlite") else _postgresql(url)
        self._reads = self._engine.execution_options(reads=True)
        self._now = _NOW[self._engine.dialect.name]
        self._threads = ThreadPoolExecutor(_THREADS, "jobs-callers")
        self._own_threads = ThreadPoolExecutor(_THREADS, "jobs-gateway")
        try:
            with self.writes() as (connection, _):
                self.exclude_others(connection)
                _metadata.create_all(connection)
                self.id = self._identify(connection)
        except SQLAlchemyError as error:
            shown = make_url(url).render_as_string()  # without its password
            raise DatabaseError(f"jobs: {shown} cannot be used: {_reason(error)}") from error

    @staticmethod
    def _identify(connection: Connection) -> str:
        found = connection.execute(select(_identity.c.id)).scalar_one_or_none()
        if found is None:
            found = uuid.uuid4().hex
            connection.execute(insert(_identity).values(id=found))
        return str(found)

    async def run(self, call: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """Call a function that blocks on the database for a caller, on a thread.

        Raises:
            Overloaded: the database cannot be used now.
        """
        return await self._on(self._threads, call, *arguments, **named)

    async def run_own(self, call: Callable[..., T], *arguments: Any, **named: Any) -> T:
        """Call a function that blocks on the database for the gateway itself; see `run`."""
        return await self._on(self._own_threads, call, *arguments, **named)

    @staticmethod
    async def _on(threads: ThreadPoolExecutor, call: Callable[..., T], *arguments: Any, **named: Any) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(threads, lambda: call(*arguments, **named))
        except (OperationalError, InterfaceError, PoolTimeout) as error:
            log.warning("jobs: %s", _reason(error))
            message = "the jobs cannot be read or written now; try again later"
            raise Overloaded(message, code="jobs_unavailable") from error

    @contextmanager
    def reads(self) -> Iterator[tuple[Connection, float]]:
        """Begin a transaction that writes nothing; yield it and its time."""
        with self._reads.begin() as connection:
            yield connection, self._time(connection)

    @contextmanager
    def writes(self) -> Iterator[tuple[Connection, float]]:
        """Begin a transaction; yield it and its time. On SQLite it is the only one that writes."""
        with self._engine.begin() as connection:
            yield connection, self._time(connection)

    def exclude_others(self, connection: Connection) -> None:
        """Hold a lock until this transaction's end; other transactions that call this wait."""
        if self._engine.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})

    def close(self) -> None:
        """Close the connections."""
        self._threads.shutdown()
        self._own_threads.shutdown()
        self._engine.dispose()

    def _time(self, connection: Connection) -> float:
        return float(connection.execute(self._now).scalar_one())


def _reason(error: SQLAlchemyError) -> str:
    return str(getattr(error, "orig", None) or error).strip().splitlines()[0]


def _postgresql(url: str) -> Engine:
    limits = f"-c statement_timeout={_PATIENCE_S * 1000} -c idle_in_transaction_session_timeout={_PATIENCE_S * 1000}"
    connect = {
        "connect_timeout": _PATIENCE_S,
        "options": limits,
        "application_name": "fluxserve-gateway",
        "tcp_user_timeout": _PATIENCE_S * 1000,  # for a network that swallows packets
        "keepalives_idle": _PATIENCE_S,
    }
    try:
        return create_engine(url, pool_pre_ping=True, connect_args=connect)
    except ImportError as error:
        raise DatabaseError("jobs: PostgreSQL needs: pip install 'fluxserve-gateway[postgresql]'") from error


def _sqlite(url: str) -> Engine:
    """Open SQLite, durable at every commit, in a file that only its owner reads: it holds prompts."""
    path = Path(str(make_url(url).database))
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    except OSError as error:
        raise DatabaseError(f"jobs: {path} cannot be used: {error.strerror}") from error
    engine = create_engine(url)

    @event.listens_for(engine, "connect")
    def connected(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # `begun` begins transactions, not the driver
        for pragma in (f"busy_timeout={_PATIENCE_S * 1000}", "journal_mode=WAL", "synchronous=FULL"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        reads = connection.get_execution_options().get("reads")
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

    return engine
