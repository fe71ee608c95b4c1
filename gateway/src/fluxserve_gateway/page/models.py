"""What each model takes, by the name it is served under: the page shows these fields and no others.

A served name that begins with one of these, such as `flux.1-dev-fp8`, is taken for that model. Under any other name
the page shows the fields that every model has. A test holds the table against the server's own specifications.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_PATCH = 16  # pixels; sides are multiples of it
_RATIOS = ((1, 1), (3, 2), (2, 3), (16, 9), (9, 16))


@dataclass(frozen=True)
class Takes:
    """The fields of one model.

    Attributes:
        side: of a picture whose size is not given, in pixels; None where it is not known.
        steps, max_steps: the default and the most; None hides the field.
        guidance: the default; None hides the field.
        references: how many images a picture may be drawn after; 0: one image, which is redrawn.
        strength: whether that one image has a strength.
    """

    side: int | None = None
    steps: int | None = None
    max_steps: int = 100
    guidance: float | None = None
    references: int = 0
    strength: bool = False

    @property
    def sizes(self) -> tuple[str, ...]:
        """Sizes of common proportions, with about as many pixels as the default has."""
        if self.side is None:
            return ()
        return tuple(_size(self.side, width, height) for width, height in _RATIOS)

    @property
    def images(self) -> int:
        """The most images that a request may have."""
        return max(self.references, 1)


_TABLE = {
    "flux.1-dev": Takes(1024, 28, guidance=3.5, strength=True),
    "flux.1-schnell": Takes(1024, 4, strength=True),
    "flux.2-klein": Takes(1024, 4, max_steps=8, references=4),
    "flux.2-klein-base": Takes(1024, 50, guidance=4.0, references=4),
    "flux.2-dev": Takes(1024, 28, guidance=4.0, references=4),
    "flux.2-dev-turbo": Takes(1024, guidance=2.5, references=4),  # its steps are given: they are no field
    "tiny": Takes(128, 20, guidance=3.0, strength=True),
}


def takes(name: str) -> Takes:
    """Return what the model served as `name` takes."""
    known = [start for start in _TABLE if re.match(rf"{re.escape(start)}(?![a-z0-9])", name.lower())]
    return _TABLE[max(known, key=len)] if known else Takes()


def _size(side: int, width: int, height: int) -> str:
    scale = side / (width * height) ** 0.5
    return "x".join(str(round(each * scale / _PATCH) * _PATCH) for each in (width, height))
