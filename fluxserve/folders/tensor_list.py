"""What a component's files of weights must hold, by name and shape."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorList:
    """What one component's files hold.

    Attributes:
        read: canonical name → shape; every one is needed.
        spellings: (pattern, replacement) from the names that published files use to the canonical ones.
        unread: patterns of canonical names that may be there and change nothing.
    """

    read: Mapping[str, Shape]
    spellings: tuple[tuple[str, str], ...] = ()
    unread: tuple[str, ...] = ()

    def canonical(self, name: str) -> str:
        for pattern, replacement in self.spellings:
            name = re.sub(pattern, replacement, name, count=1)
        return name

    def may_hold(self, canonical: str) -> bool:
        """Whether a tensor that is not read may be there all the same."""
        return any(re.fullmatch(pattern, canonical) for pattern in self.unread)
