"""Write the log: one line of JSON for each record, from a thread, so that a reader who is stuck stops nobody."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import threading
from typing import Any

_MAX_LINES = 10_000


class JsonLine(logging.Formatter):
    """Format a record as a line of JSON: its `fields` (see `logging`'s `extra`) if it has some, or its message."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = getattr(record, "fields", None) or {
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line = {"time": round(record.created, 3), **fields}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class Lines(logging.Handler):
    """Hands lines to a thread, which writes them to a file descriptor.

    A line that finds `most` others waiting is dropped, and so is one that cannot be written. The next line that is
    written follows one that says how many were.
    """

    def __init__(self, descriptor: int, most: int = _MAX_LINES) -> None:
        super().__init__()
        self.setFormatter(JsonLine())
        self._descriptor, self._dropped = descriptor, 0
        self._waiting: queue.Queue[str | None] = queue.Queue(most)
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._waiting.put_nowait(self.format(record))
        except queue.Full:
            self._dropped += 1

    def close(self, patience: float = 1.0) -> None:
        """Wait a moment until everything is written. Nothing is written afterwards."""
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._waiting.put(None, timeout=patience)
            self._thread.join(patience)
        super().close()

    def _run(self) -> None:
        while (line := self._waiting.get()) is not None:
            dropped, self._dropped = self._dropped, 0
            try:
                if dropped:
                    self._write(self.format(_notice(dropped)))
                self._write(line)
            except OSError:  # nobody reads, or a disk is full
                self._dropped += dropped + 1

    def _write(self, line: str) -> None:
        rest = f"{line}\n".encode()
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]


def _notice(dropped: int) -> logging.LogRecord:
    fields = {"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING"}
    return logging.makeLogRecord({**fields, "msg": "lines of this log were dropped: %d", "args": (dropped,)})
