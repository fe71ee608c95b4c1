"""Standard streams that any terminal can show, and whose reader may leave; a line that ticks.

A terminal in Latin-1 or ASCII lacks characters of ours, and of prompts and paths: they are spelled out in ASCII.
`fluxserve_client.console` is the same for a distribution of its own.
"""

import codecs
import contextlib
import io
import os
import sys
from pathlib import Path

_SPELLED_OUT = {"…": "...", "×": "x", "−": "-", "–": "-", "’": "'"}


def _spell_out(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    spelled = (_SPELLED_OUT.get(letter) or letter.encode("ascii", "backslashreplace").decode() for letter in lacking)
    return "".join(spelled), error.end


codecs.register_error("fluxserve-spell-out", _spell_out)


def prepare() -> None:
    """Have characters that an encoding lacks spelled out, and a closed stream replaced by one that drops its text."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 (open to the end)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="fluxserve-spell-out")


def printable(text: str) -> str:
    """Spell out control characters, which a path or a server's message may carry and a terminal would obey."""
    return "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text)


def let_go() -> None:
    """Drop output that cannot be written: the interpreter would try again at its end, and print a traceback."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError), Path(os.devnull).open("w", encoding="utf-8") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())


class Ticker:
    """One line that shows how long something takes: rewritten on a terminal, every five seconds elsewhere."""

    def __init__(self, what: str) -> None:
        self._what, self._shown = what, -1

    def __call__(self, seconds: float) -> None:
        if sys.stdout.isatty():
            _write(f"\r{self._what} … {seconds:.1f} s")
        elif int(seconds) // 5 != self._shown // 5 or self._shown < 0:
            _write(f"{self._what} … {seconds:.0f} s\n")
        self._shown = int(seconds)

    def done(self, seconds: float) -> None:
        _write(f"{chr(13) if sys.stdout.isatty() else ''}{self._what}: {seconds:.1f} s \n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
