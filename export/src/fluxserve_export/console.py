"""What an operator sees of a long export: one line a stage, rewritten on a terminal, every five seconds elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_EVERY_S = 5.0


class Line:
    """One stage's line."""

    def __init__(self, title: str) -> None:
        self._title, self._begun, self._shown = title, time.perf_counter(), 0.0
        self._note = ""

    def progress(self, done: int, of: int) -> None:
        """So many of so many things are done."""
        self.say(f"{done} of {of}")

    def say(self, note: str) -> None:
        now = time.perf_counter()
        if sys.stdout.isatty():
            print(f"\r\x1b[K{self._title} … {note}, {now - self._begun:.0f} s", end="", flush=True)
        elif now - max(self._shown, self._begun) >= _EVERY_S:
            self._shown = now
            print(f"{self._title} … {note}, {now - self._begun:.0f} s", flush=True)

    def end(self, note: str) -> None:
        self._note = note

    def _close(self) -> None:
        start = "\r\x1b[K" if sys.stdout.isatty() else ""
        print(f"{start}{self._title}: {self._note}", flush=True)


@contextmanager
def line(title: str) -> Iterator[Line]:
    """A stage's line; it ends with what was said last to `end`, or not at all if the stage fails."""
    shown = Line(title)
    try:
        yield shown
    except BaseException:
        if sys.stdout.isatty():
            print(flush=True)
        raise
    shown._close()


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def size(count: int) -> str:
    """Bytes, for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
