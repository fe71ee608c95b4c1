"""What the command line shows: the progress while it waits, the report when it is done."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from fluxserve_client.result import Progress, Result

CLEAR_LINE = "\r\x1b[K"
_BAR_WIDTH = 30


@contextmanager
def progress_display(
    stream: TextIO, *, bar: bool = False, quiet: bool = False
) -> Iterator[Callable[[Progress], None] | None]:
    """The callback that shows progress on `stream`: a bar, or else a line for each change; None when `quiet`."""
    if quiet:
        yield None
    elif bar:
        started = time.monotonic()
        try:
            yield lambda now: _draw(stream, now, time.monotonic() - started)
        finally:
            _write(stream, CLEAR_LINE)  # the report takes the bar's place
    else:
        yield lambda now: _write(stream, f"{_words(now)}\n")


def _draw(stream: TextIO, now: Progress, seconds: float) -> None:
    done = _BAR_WIDTH * now.step // now.steps if now.steps else 0
    bar = "#" * done + "." * (_BAR_WIDTH - done)
    _write(stream, f"{CLEAR_LINE}[{bar}] {_words(now)}, {seconds:.1f} s")


def _write(stream: TextIO, text: str) -> None:
    stream.write(text)
    stream.flush()


def _words(now: Progress) -> str:
    return f"{now.state} {now.step}/{now.steps}" if now.steps else str(now.state)


def report(result: Result, files: Sequence[Path], *, as_json: bool) -> str:
    """What came of a request: files, seeds, size, timings in milliseconds; a text, or one JSON object."""
    timings = dataclasses.asdict(result.timings)
    if as_json:
        return json.dumps(
            {
                "files": [str(path) for path in files],
                "seeds": result.seeds,
                "height": result.height,
                "width": result.width,
                "request_id": result.request_id,
                "timings_ms": timings,
            }
        )
    seeds = " ".join(str(seed) for seed in result.seeds)
    stages = "  ".join(f"{stage} {milliseconds:.0f} ms" for stage, milliseconds in timings.items())
    paths = "\n".join(str(path) for path in files)
    size = f"{result.height} × {result.width} (height × width)"
    return f"{paths}\nsize    {size}\nseed    {seeds}\ntime    {stages}"
