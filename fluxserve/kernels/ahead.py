"""Attention's plans for every size that may come, built by a process of their own while a model is loaded.

A size never seen then finds its plan on disk. The process has no part of the GPU, is the last to get a core, and ends
with the one that started it: its input, from which it reads what to build, ends then.
"""

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch

from fluxserve.kernels import kept, plans
from fluxserve.kernels.plans import TILE, Form

log = logging.getLogger(__name__)

_COURTESY = 19
"""How much every other process goes before."""


def forms(like: Form, most: int, usual: int) -> list[Form]:
    """All that E4M3 attention of at most so many rows may ask for, the nearest to the usual number of rows first.

    Of each whole number of tiles one that is told how many rows count, and the quicker one that need not be told.
    """
    tiles = sorted(range(TILE, most + TILE, TILE), key=lambda rows: abs(rows - usual))
    return [Form(**{**asdict(like), "rows": rows, "told": told}) for rows in tiles for told in (False, True)]


class Ahead:
    """The process, if anything is not kept yet; its end is told in the log if it did not end well."""

    def __init__(self, wanted: Iterable[Form], device: torch.device) -> None:
        missing = [form for form in wanted if not plans.place(form, plans.description(device)).is_file()]
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        if missing:
            command = [sys.executable, "-m", __name__]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
            asked = {"device": plans.description(device), "forms": [asdict(form) for form in missing]}
            self._watch = threading.Thread(target=self._attend, args=(json.dumps(asked).encode(),), daemon=True)
            self._watch.start()

    def _attend(self, asked: bytes) -> None:
        """Say what to build, and wait for the end."""
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(asked + b"\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            pass  # it ended, or was closed, before it had heard: how it ended says what happened
        code = self._process.wait()
        if code and not self._closed:
            log.warning("attention's plans are built when they are asked for: the process for it ended with %d", code)

    def close(self) -> None:
        """End it, whatever is not built yet."""
        self._closed = True
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._watch.join()


def main() -> None:
    """Build what one line of the input asks for; end when the input does."""
    line = sys.stdin.readline()
    if not line:
        return
    asked = json.loads(line)
    threading.Thread(target=_end_with_the_input, daemon=True).start()
    os.nice(_COURTESY)
    for form in (Form(**fields) for fields in asked["forms"]):
        file: Path = plans.place(form, asked["device"])
        if not file.is_file():
            kept.keep(file, plans.build(form, asked["device"]))


def _end_with_the_input() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
