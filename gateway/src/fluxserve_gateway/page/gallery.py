"""Remember what each browser has drawn: a browser is known by a secret that it keeps, the pictures are on the shelf."""

from __future__ import annotations

import re
import secrets
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fluxserve_gateway.page.shelf import Shelf

_MAX_PICTURES = 60
_MAX_BROWSERS = 1000
_SECRET = re.compile(r"[A-Za-z0-9_-]{22}")


@dataclass(frozen=True)
class Entry:
    """One picture.

    Attributes:
        name: of its file on the shelf.
        body: the request that draws this picture again, and no other, without its images.
        edit: whether the request had images.
        format: of the file.
        width, height: in pixels.
    """

    name: str
    body: Mapping[str, Any]
    edit: bool
    format: str
    width: int
    height: int

    @property
    def seed(self) -> int:
        """The seed that draws it again."""
        return int(self.body["seed"])

    @property
    def prompt(self) -> str:
        """The words it was drawn from."""
        return str(self.body["prompt"])


class Galleries:
    """The pictures of every browser, newest first. The least recently used browser is forgotten first."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._of: OrderedDict[str, list[Entry]] = OrderedDict()

    @staticmethod
    def secret(claimed: object) -> str:
        """Return the secret that a browser claims to have been given, or, if it can be none, a new one."""
        known = isinstance(claimed, str) and _SECRET.fullmatch(claimed)
        return str(claimed) if known else secrets.token_urlsafe(16)

    def add(self, secret: str, entries: list[Entry]) -> None:
        """Put the pictures of one request in front."""
        self._of[secret] = (entries + self.pictures(secret))[:_MAX_PICTURES]
        self._of.move_to_end(secret)
        while len(self._of) > _MAX_BROWSERS:
            self._of.popitem(last=False)

    def pictures(self, secret: str) -> list[Entry]:
        """Return the pictures that are still there."""
        return [entry for entry in self._of.get(secret, ()) if entry.name in self._shelf]

    def find(self, secret: str, name: object) -> Entry | None:
        """Return one of a browser's own pictures."""
        return next((entry for entry in self.pictures(secret) if entry.name == name), None)
