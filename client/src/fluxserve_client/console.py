"""Standard streams that any terminal can show, and whose reader may leave.

A terminal in Latin-1 or ASCII lacks characters of ours, and of prompts and paths: they are spelled out in ASCII.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
from pathlib import Path

_STANDARD_ERROR = 2
_SPELLED_OUT = {"…": "...", "×": "x", "−": "-", "–": "-", "’": "'"}


def _spell_out(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    spelled = (_SPELLED_OUT.get(letter) or letter.encode("ascii", "backslashreplace").decode() for letter in lacking)
    return "".join(spelled), error.end


codecs.register_error("fluxserve-client-spell-out", _spell_out)


def prepare() -> None:
    """Have characters that an encoding lacks spelled out, and a closed stream replaced by one that drops its text.

    The numbers of closed streams are taken, so that no file gets one and is written to by whoever means the stream.
    """
    while (taken := os.open(os.devnull, os.O_RDWR)) <= _STANDARD_ERROR:
        pass
    os.close(taken)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 (open to the end)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="fluxserve-client-spell-out")


def one_line(text: str) -> str:
    """Join the lines of a server's message, and spell out control characters, which a terminal would obey."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in " ".join(text.split()))


def let_go() -> None:
    """Drop output that cannot be written: the interpreter would try again at its end, and print a traceback."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError), Path(os.devnull).open("w", encoding="utf-8") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
