"""One soak of a running server: load, samples of its memory, and the verdict."""

import asyncio
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from benchmarks.soak.callers import LOST_S, Callers, Outcome
from benchmarks.soak.cases import Shape, cases, references
from benchmarks.soak.footprint import MIB, Footprint
from benchmarks.soak.promises import Promise, promises
from fluxserve.supervisor import TritonServer

SAMPLE_S = 1.0
_LINE_S = 30.0


@dataclass(frozen=True)
class Plan:
    """warm_up: seconds of load before memory is looked at, in which pools and caches reach the size of this mix."""

    shape: Shape = field(default_factory=Shape)
    seconds: float = 900.0
    at_once: int = 8
    seed: int = 0
    warm_up: float = 5.0


@dataclass(frozen=True)
class Soaked:
    """footprint: None for a server that could not be looked at."""

    outcomes: Sequence[Outcome]
    promises: Sequence[Promise]
    footprint: Footprint | None


async def soak(urls: Mapping[str, str], plan: Plan, server: TritonServer | None = None) -> Soaked:
    """Load a server, and judge it.

    Args:
        urls: host:port by protocol.
        server: that server, if it runs on this machine and may be looked at.
    """
    callers, known, sequence = Callers(urls), references(plan.shape), cases(plan.seed, plan.shape)
    footprint = Footprint(server) if server else None
    try:
        await callers.draw_references(known)
        await callers.run(sequence, plan.at_once, _after(plan.warm_up))
        begin = time.monotonic()
        async with _meanwhile(_progress(callers, footprint, begin, plan.seconds)):
            await callers.run(sequence, plan.at_once, begin + plan.seconds)
        still_live = await _still_live(server)
        different = await callers.draw_references(known)
    finally:
        await callers.close()
    judged = promises(callers.sent, callers.outcomes, different, still_live, footprint)
    return Soaked(callers.outcomes, judged, footprint)


@asynccontextmanager
async def _meanwhile(endless: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run a coroutine until the block is left; an error that ended it before is raised then."""
    task = asyncio.create_task(endless)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()


def _after(seconds: float) -> float:
    return time.monotonic() + seconds


async def _progress(callers: Callers, footprint: Footprint | None, begin: float, seconds: float) -> None:
    """Sample memory, and keep one line on stderr up to date; where that is no terminal, a line now and then."""
    printed = 0.0
    while True:
        if footprint:
            await asyncio.to_thread(footprint.sample)
        spent = time.monotonic() - begin
        if sys.stderr.isatty() or spent - printed >= _LINE_S:
            printed = spent
            end = "\r" if sys.stderr.isatty() else "\n"
            print(_line(callers.outcomes, footprint, spent, seconds), end=end, file=sys.stderr, flush=True)
        await asyncio.sleep(SAMPLE_S)


def _line(outcomes: Sequence[Outcome], footprint: Footprint | None, spent: float, seconds: float) -> str:
    kinds = Counter(o.case.kind for o in outcomes)
    counts = ", ".join(f"{kinds[kind]} {kind}" for kind in ("good", "abandoned", "bad"))
    memory = ""
    if footprint and footprint.samples:
        last = footprint.samples[-1]
        memory = f"; {last.rss / MIB:.0f} MiB resident, {last.shared / MIB:.0f} in /dev/shm"
    wrong = sum(bool(o.wrong) for o in outcomes)
    return f"{spent:5.0f} of {seconds:.0f} s: {counts}; {wrong} wrong{memory}"


async def _still_live(server: TritonServer | None) -> list[str] | None:
    """Return the requests that stay in the in-flight table; None for a server that could not be looked at.

    A request whose caller hung up without a word is drawn to the end first.
    """
    if server is None:
        return None
    deadline = _after(LOST_S)
    while (live := server.table.live()) and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    return [f"{live} requests"] if live else []
