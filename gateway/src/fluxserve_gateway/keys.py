"""Keep API keys, which an operator creates, lists and revokes, as hashes in a SQLite file that only its owner reads.

A key is 256 random bits, so a plain SHA-256 is enough: there is nothing to guess. A gateway reads the file at every
request, so a key that is revoked stops working at once.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import sqlite3
import stat
import time
from dataclasses import dataclass, fields
from pathlib import Path

_PREFIX = "fs-"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS keys (
    id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    hash TEXT NOT NULL UNIQUE,
    created INTEGER NOT NULL,
    revoked INTEGER,
    requests_per_minute INTEGER,
    pixels_per_minute INTEGER,
    at_a_time INTEGER
) STRICT
"""


_SELECT = "SELECT id, name, created, revoked, requests_per_minute, pixels_per_minute, at_a_time FROM keys"


class KeysError(Exception):
    """A file of keys that cannot be used, or an id that is not in it."""


@dataclass(frozen=True)
class Limits:
    """Limits one key; None sets no limit.

    Attributes:
        requests_per_minute: requests for pictures.
        pixels_per_minute: pixels of the pictures drawn.
        at_a_time: requests at the same time.
    """

    requests_per_minute: int | None = None
    pixels_per_minute: int | None = None
    at_a_time: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not 1 <= value < 2**63:
                raise ValueError(f"{field.name}: got {value}; allowed: 1 or more")


@dataclass(frozen=True)
class Key:
    """Describes one key, without its secret. Times are seconds since 1970."""

    id: str
    name: str
    created: int
    revoked: int | None
    limits: Limits


class Keys:
    """Keeps the keys in one file."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        """Open the file; `create` makes one that is not there.

        Raises:
            KeysError: no file, one that others can read, or one that is no SQLite database of keys.
        """
        self._path = path
        if create and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
        self._check_mode()
        try:
            # used by one thread at a time: the event loop's, which may not be the one that opened it
            self._database = sqlite3.connect(path, timeout=5, isolation_level=None, check_same_thread=False)
            self._database.execute(_SCHEMA if create else f"{_SELECT} LIMIT 0")  # a gateway may be unable to write
        except sqlite3.Error as error:
            raise KeysError(f"keys: {path} cannot be used: {error}") from error

    def _check_mode(self) -> None:
        try:
            mode = self._path.stat().st_mode
        except OSError as error:
            message = f"keys: {self._path}: {error.strerror}; make one with: fluxserve-gateway keys create NAME"
            raise KeysError(message) from error
        if stat.S_IMODE(mode) & 0o077:
            raise KeysError(
                f"keys: {self._path} has mode {stat.S_IMODE(mode):o}; allowed: 600 (chmod 600 {self._path})"
            )

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def create(self, name: str, limits: Limits) -> tuple[Key, str]:
        """Make a key; its secret is returned here and kept nowhere."""
        secret = _PREFIX + secrets.token_urlsafe(32)
        key = Key(f"key_{secrets.token_hex(6)}", name, int(time.time()), None, limits)
        self._database.execute(
            "INSERT INTO keys VALUES (?, ?, ?, ?, NULL, ?, ?, ?)",
            (
                key.id,
                name,
                _hash(secret),
                key.created,
                limits.requests_per_minute,
                limits.pixels_per_minute,
                limits.at_a_time,
            ),
        )
        return key, secret

    def all(self) -> list[Key]:
        """List every key, revoked ones too, oldest first."""
        rows = self._database.execute(f"{_SELECT} ORDER BY created, rowid")
        return [_key(row) for row in rows]

    def revoke(self, key_id: str) -> None:
        """Have a key accepted no more. Raises `KeysError` if there is no such key, or it was revoked before."""
        changed = self._database.execute(
            "UPDATE keys SET revoked = ? WHERE id = ? AND revoked IS NULL", (int(time.time()), key_id)
        )
        if not changed.rowcount:
            raise KeysError(f"keys: got {key_id!r}, which is no key in use; see: fluxserve-gateway keys list")

    def find(self, secret: str) -> Key | None:
        """Return the key with this secret; None if there is none, or it was revoked."""
        row = self._database.execute(f"{_SELECT} WHERE hash = ? AND revoked IS NULL", (_hash(secret),)).fetchone()
        return _key(row) if row else None


def _key(row: tuple[str, str, int, int | None, int | None, int | None, int | None]) -> Key:
    return Key(*row[:4], Limits(*row[4:]))


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
