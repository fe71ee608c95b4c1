"""Standard streams that any terminal can show, and whose reader may leave; a line that ticks.

A terminal in Latin-1 or ASCII lacks characters of ours, and of prompts and paths: they are spelled out in ASCII.
`fluxserve_client.console` is the same for a distribution of its own.
"""

import codecs
import contextlib
import io
import os
import queue
import select
import sys
import threading
from pathlib import Path
from typing import TextIO

_STANDARD_ERROR = 2
_SPELLED_OUT = {"…": "...", "×": "x", "−": "-", "–": "-", "’": "'"}


def _spell_out(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    spelled = (_SPELLED_OUT.get(letter) or letter.encode("ascii", "backslashreplace").decode() for letter in lacking)
    return "".join(spelled), error.end


codecs.register_error("fluxserve-spell-out", _spell_out)


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


_PIECES = 10_000


class Outlet:
    """A stream whose reader may be gone, or not read for now, or a file on a full disk. A writer never waits.

    A thread writes. Text that the stream does not take is dropped, and the next text that it takes says how much.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._dropped = descriptor, 0
        self._pieces: queue.Queue[bytes | None] = queue.Queue(_PIECES)
        self._thread: threading.Thread | None = None

    def write(self, piece: bytes) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="outlet", daemon=True)
            self._thread.start()
        try:
            self._pieces.put_nowait(piece)
        except queue.Full:
            self._dropped += 1

    def close(self, patience: float = 1.0) -> None:
        """Wait a moment until everything is written. Nothing is written afterwards."""
        if self._thread is not None:
            with contextlib.suppress(queue.Full):
                self._pieces.put(None, timeout=patience)
            self._thread.join(patience)

    def _run(self) -> None:
        ready = select.poll()
        ready.register(self._descriptor, select.POLLOUT)
        while (piece := self._pieces.get()) is not None:
            dropped, self._dropped = self._dropped, 0
            rest = b"[fluxserve: %d lines dropped]\n%s" % (dropped, piece) if dropped else piece
            try:
                while rest:
                    ready.poll()  # also where the stream is one that does not block
                    rest = rest[os.write(self._descriptor, rest) :]
            except OSError:
                self._dropped += dropped + 1


class Notices:
    """Lines for a standard stream, one at a time, through an Outlet."""

    def __init__(self, stream: TextIO) -> None:
        self._outlet, self._encoding = Outlet(stream.fileno()), stream.encoding

    def __call__(self, line: str) -> None:
        self._outlet.write(f"{printable(line)}\n".encode(self._encoding, "fluxserve-spell-out"))

    def close(self) -> None:
        self._outlet.close()


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
