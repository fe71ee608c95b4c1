"""Pictures of jobs, in a folder or an object store: what was sent, and what was drawn. Each job has a folder."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import BaseError, NotFoundError
from obstore.store import LocalStore, from_url

from fluxserve_gateway.errors import Overloaded

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

log = logging.getLogger("fluxserve_gateway")

_OWNER = "fluxserve-jobs"  # a file with the id of the database
_JOB = re.compile(r"job_[0-9a-f]{32}")
# plain HTTP is what an endpoint of the operator's own may speak, if that is what its URL says
_CLIENT: ClientConfig = {"timeout": "60s", "connect_timeout": "5s", "allow_http": True}
_RETRY: RetryConfig = {"max_retries": 3, "retry_timeout": timedelta(seconds=20)}


def new_id() -> str:
    """Make a job's id, which nobody can guess."""
    return f"job_{secrets.token_hex(16)}"


@contextmanager
def _unavailable() -> Iterator[None]:
    try:
        yield
    except (BaseError, OSError) as error:
        log.warning("jobs: %s", str(error).splitlines()[0])
        raise Overloaded("the pictures of jobs cannot be read or written now", code="jobs_unavailable") from error


class Files:
    """Files by name, below one place."""

    def __init__(self, url: str) -> None:
        """Open the place; a folder that is not there is made.

        Raises:
            ValueError: a URL of no known kind, or options that cannot be read.
            OSError: a folder that cannot be made.
        """
        self._url = url
        try:
            if url.startswith("file://"):
                path = Path(unquote(urlsplit(url).path))
                path.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._store: ObjectStore = LocalStore(path, automatic_cleanup=True)
            else:
                self._store = from_url(url, client_options=_CLIENT, retry_config=_RETRY)
        except BaseError as error:
            raise ValueError(f"job-files: got {url!r}: {str(error).splitlines()[0]}") from error

    def belong_to(self, database_id: str) -> None:
        """Have the place belong to one database: gateways of two would remove one another's files as abandoned.

        Raises:
            ValueError: it is another database's.
            OSError: it cannot be read or written.
        """
        try:
            try:
                owner = bytes(obstore.get(self._store, _OWNER).bytes()).decode(errors="replace")
            except (NotFoundError, FileNotFoundError):
                owner = database_id
                obstore.put(self._store, _OWNER, owner.encode(), use_multipart=False)
        except BaseError as error:
            raise OSError(f"job-files: {self._url} cannot be used: {str(error).splitlines()[0]}") from error
        if owner != database_id:
            message = f"job-files: {self._url} belongs to the jobs of another database; expected a place of its own"
            raise ValueError(f"{message}, or one without the file {_OWNER}")

    async def put(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all. Raises `Overloaded` where it cannot be written now."""
        with _unavailable():
            await obstore.put_async(self._store, name, data, use_multipart=False)

    async def get(self, name: str) -> bytes | None:
        """Read a file; None if it is not there. Raises `Overloaded` where it cannot be read now."""
        with _unavailable():
            try:
                found = await obstore.get_async(self._store, name)
            except (NotFoundError, FileNotFoundError):
                return None
            return bytes(await found.bytes_async())

    async def remove(self, job_id: str) -> None:
        """Remove all files of a job. Raises `Overloaded` where they cannot be removed now."""
        await self.delete([name for name, _ in await self._list(f"{job_id}/")])

    async def abandoned(self, older_than_s: float) -> dict[str, list[str]]:
        """List the files that are older, by the id of the job that they belonged to."""
        before = datetime.now(UTC) - timedelta(seconds=older_than_s)
        found: dict[str, list[str]] = {}
        for name, changed in await self._list(None):
            job_id, slash, _ = name.partition("/")
            if slash and changed < before and _JOB.fullmatch(job_id):  # what others keep there is theirs
                found.setdefault(job_id, []).append(name)
        return found

    async def delete(self, names: Iterable[str]) -> None:
        """Remove these files."""
        await asyncio.gather(*map(self._delete, names))

    async def _list(self, prefix: str | None) -> Sequence[tuple[str, datetime]]:
        with _unavailable():
            pages = obstore.list(self._store, prefix)
            return [(entry["path"], entry["last_modified"]) async for page in pages for entry in page]

    async def _delete(self, name: str) -> None:
        with _unavailable(), suppress(NotFoundError, FileNotFoundError):  # another gateway was quicker
            await obstore.delete_async(self._store, name)
