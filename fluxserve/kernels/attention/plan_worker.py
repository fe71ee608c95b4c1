"""Attention's plans for every size that may come, built by a process of their own once a model is loaded.

A size never seen then finds its plan on disk. The process has no part of the GPU, is the last to get a core, and ends
with the one that started it: its input, from which it reads what to build, ends then. Each GPU's process has its own:
what cuDNN asks of a device names it.
"""

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from fluxserve.kernels.attention import plan_cache
from fluxserve.kernels.attention.plan_cache import TILE, Form
from fluxserve.kernels.jit import disk_cache

log = logging.getLogger(__name__)

_SCRIPT = """
import os, sys
os.nice(19)
sys.path.insert(0, sys.argv[1])
from fluxserve.kernels.attention import plan_worker
plan_worker.main()
"""
"""Every other process goes before it, from its first import on."""
_PATIENCE_S = 1.0
"""For the process to end by itself: a plan that is being built holds Python's lock."""
_LATE = "attention's plans are built when they are asked for: %s"

_writing = threading.Lock()


def forms(like: Form, most: int, usual: int) -> list[Form]:
    """All that E4M3 attention of at most so many rows may ask for, the nearest to the usual number of rows first.

    Of each whole number of tiles one that is told how many rows count, and the quicker one that need not be told.
    """
    tiles = sorted(range(TILE, most + TILE, TILE), key=lambda rows: abs(rows - plan_cache.padded(usual)))
    return [replace(like, rows=rows, told=told) for rows in tiles for told in (False, True)]


class Ahead:
    """The process, if anything is not kept yet. That it can't start or did not end well is a line in the log."""

    def __init__(self, wanted: Sequence[Form], device: torch.device) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        if not wanted:
            return
        described = plan_cache.description(device)
        try:
            places = {plan_cache.place(form, described): form for form in wanted}
            missing = {str(file): asdict(form) for file, form in places.items() if not file.is_file()}
            if missing:
                self._start(json.dumps({"device": described, "plans": missing}).encode() + b"\n")
        except OSError as error:
            log.warning(_LATE, error)

    def _start(self, asked: bytes) -> None:
        command = [sys.executable or "python3", "-P", "-c", _SCRIPT, str(Path(__file__).parents[2])]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
        )
        self._watch = threading.Thread(target=self._attend, args=(self._process, asked), daemon=True)
        self._watch.start()

    def _attend(self, process: "subprocess.Popen[bytes]", asked: bytes) -> None:
        """Say what to build, and wait for the end."""
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):  # it ended, or was closed, before it had heard
            process.stdin.write(asked)
            process.stdin.flush()
        code = process.wait()
        if code and not self._closed:
            log.warning(_LATE, f"the process for it ended with {code}")

    def close(self) -> None:
        """End it, whatever is not built yet."""
        self._closed = True
        if self._process is None or self._process.stdin is None:
            return
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._watch.join(_PATIENCE_S)
        self._process.kill()
        self._watch.join()


def main() -> None:
    """Build what one line of the input asks for; end when the input does."""
    line = sys.stdin.readline()
    if not line:
        return
    asked = json.loads(line)
    threading.Thread(target=_end_with_the_input, daemon=True).start()
    for file, fields in asked["plans"].items():
        if not Path(file).is_file():
            plan = plan_cache.build(Form(**fields), asked["device"])
            try:
                with _writing:
                    disk_cache.write(Path(file), plan)
            except OSError as error:
                sys.exit(f"{file}: {error}")


def _end_with_the_input() -> None:
    sys.stdin.read()
    with _writing:
        os._exit(0)
