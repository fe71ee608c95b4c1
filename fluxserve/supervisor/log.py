"""Triton's output: passed on to whoever reads, with its last lines kept, which say why a start failed."""

import re
import threading
from collections import deque
from collections.abc import Iterable
from typing import IO

from fluxserve.console import Outlet

_KEPT = 500
_LONGEST = 1 << 16
_END_S = 2.0
"""For the last lines of a process that has ended."""

_LOAD = re.compile(r"failed to load '(\w+)' version \d+: [A-Z][\w ]*: (.+?)(?:\\n|\"?$)")
_OTHER = (
    re.compile(r"(what\(\):.*|terminate called after.*|.*Assertion .* failed.*)"),
    re.compile(r"(tritonserver: (?:unrecognized|option|ambiguous|error while loading).*)"),
    re.compile(r"^error: (?!creating server: Internal - failed to load all models).*"),
    re.compile(r"^E\d{4} .*\] \"(failed to .*)\"$"),
    re.compile(r"^fluxserve: .*"),
)
"""What else ends Triton, most telling first: C++, its command line and loader, itself, its ports, our launcher."""


class Log:
    """The log of one server, over all of its starts.

    Args:
        descriptor: where it goes. A reader that is gone or slow, or a full disk, stops neither Triton nor its watch.
    """

    def __init__(self, descriptor: int) -> None:
        self._outlet, self._lines = Outlet(descriptor), deque[str](maxlen=_KEPT)
        self._reader: threading.Thread | None = None

    def read(self, output: IO[bytes]) -> None:
        """Pass on the output of a Triton that has just been started, until it ends."""
        self._reader = threading.Thread(target=self._pass_on, args=(output, self._lines), name="log", daemon=True)
        self._reader.start()

    def _pass_on(self, output: IO[bytes], lines: deque[str]) -> None:
        with output:
            while line := output.readline(_LONGEST):
                lines.append(line.decode(errors="backslashreplace").rstrip())
                self._outlet.write(line)

    def ended(self) -> str:
        """Why a Triton that has ended did so, as far as its log says: one line."""
        if self._reader is not None:
            self._reader.join(_END_S)
        return reason(list(self._lines))

    def forget(self) -> None:
        """Keep nothing of a Triton that was ended: why is known."""
        self._lines = deque(maxlen=_KEPT)

    def last(self) -> str:
        """The last line that says anything."""
        return next((line for line in reversed(list(self._lines)) if line.strip("+-=| ")), "")

    def close(self) -> None:
        """Wait a moment for the last lines."""
        if self._reader is not None:
            self._reader.join(_END_S)
        self._outlet.close()


def reason(lines: Iterable[str]) -> str:
    """What made Triton end: the models that did not load and why, or else the most telling line, or the last."""
    found = list(lines)
    models: dict[str, dict[str, None]] = {}
    for model, why in (match.groups() for line in found if (match := _LOAD.search(line))):
        models.setdefault(_unescaped(why), {})[model] = None
    if models:
        return "; ".join(f"{', '.join(names)}: {why}" for why, names in models.items())
    for pattern in _OTHER:
        if told := [match[match.lastindex or 0] for line in found if (match := pattern.search(line))]:
            return told[-1]
    return next((line for line in reversed(found) if line.strip("+-=| ")), "")


def _unescaped(text: str) -> str:
    return text.replace('\\"', '"').replace("\\\\", "\\")
