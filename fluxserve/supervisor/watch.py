"""The watch: starts Triton again when a process of the server died, hangs, or when the server holds too much memory.

One loop looks ten times a second and never waits for anything else, so that a signal is heard wherever it comes: while
models load, while requests are finished, between two deaths.

    READY ── trouble ──▶ LOADING ── ready ──▶ READY        a death; the fourth within ten minutes ends the watch
    READY ── memory ──▶ DRAINING ── drained ──▶ LOADING    no death
    LOADING, DRAINING ── trouble ──▶ LOADING               a death

A death ends the whole server at once, also where only one process of `prepare` or `control` died. Triton 2.51 would go
on sending requests to the dead process and answer each with INTERNAL after a second, which no client tries again; a
running picture that is lost is UNAVAILABLE, and can be drawn again.
"""

import time
from collections import deque
from collections.abc import Callable

from fluxserve.errors import ServerError
from fluxserve.inflight import Status
from fluxserve.supervisor.server import DRAIN_TIMEOUT_S, POLL_S, READY_TIMEOUT_S, TritonServer

MAX_RESTARTS = 3
RESTARTS_WITHIN_S = 600.0
_WEIGH_S = 2.0
_AGAIN_S = 1.0
"""Before a start that failed is the next death: a port may be taken for a moment."""

_NAMED = 8
"""Lost requests that a report names."""


class Watch:
    """Watches a server that is ready.

    Args:
        stopping: whether the watch should end; it does so within a moment.
        report: takes a line about what happened.
        memory_limit: bytes that the server may hold, 0 for no limit.
        drain_timeout: seconds for the admitted requests when the server is started again for its memory.
    """

    def __init__(
        self,
        server: TritonServer,
        stopping: Callable[[], bool],
        report: Callable[[str], None],
        memory_limit: int = 0,
        drain_timeout: float = DRAIN_TIMEOUT_S,
    ) -> None:
        self._server, self._stopping, self._report = server, stopping, report
        self._limit, self._drain_timeout = memory_limit, drain_timeout
        self._deaths: deque[float] = deque(maxlen=MAX_RESTARTS)
        self._do: Callable[[], None] = self._while_ready
        self._since = self._weighed = time.monotonic()
        self._settle()

    def run(self) -> None:
        """Watch until `stopping` says so. Raises ServerError at the fourth death within ten minutes."""
        while not self._stopping():
            if trouble := self._server.trouble() or self._overdue():
                self._mourn(trouble)
                self._start()
            else:
                self._do()
            time.sleep(POLL_S)

    def _overdue(self) -> str | None:
        loading = self._do == self._while_loading and time.monotonic() - self._since > READY_TIMEOUT_S
        return self._server.late(READY_TIMEOUT_S) if loading else None

    def _mourn(self, trouble: str) -> None:
        now = time.monotonic()
        lost = _named(self._server)
        if self._do == self._while_loading:
            trouble += self._server.why()
        if len(self._deaths) == MAX_RESTARTS and now - self._deaths[0] < RESTARTS_WITHIN_S:
            spent = now - self._deaths[0]
            raise ServerError(f"{trouble}, the {MAX_RESTARTS + 1}th death in {spent:.0f} s; giving up{lost}")
        self._deaths.append(now)
        self._report(f"{trouble}; starting it again{lost}")

    def _start(self) -> None:
        """End what there is and start Triton. What goes wrong is the next trouble, and so the next death."""
        self._server.kill(self._stopping)
        self._do, self._since = self._while_loading, time.monotonic()
        try:
            self._server.start()
        except ServerError as error:
            self._report(str(error))
            time.sleep(_AGAIN_S)

    # --- the three states ------------------------------------------------------------------------------------------

    def _while_loading(self) -> None:
        if self._server.is_up():
            self._report(f"tritonserver is back after {time.monotonic() - self._since:.1f} s")
            self._settle()
            self._do = self._while_ready

    def _while_ready(self) -> None:
        now = time.monotonic()
        if not self._limit or now - self._weighed < _WEIGH_S:
            return
        self._weighed = now
        if (held := self._server.memory()) > self._limit:
            self._report(
                f"tritonserver holds {_mib(held)}, more than the limit of {_mib(self._limit)}; starting it again once "
                "the admitted requests are answered"
            )
            self._server.table.drain()
            self._do, self._since = self._while_draining, now

    def _while_draining(self) -> None:
        if self._server.drained() or time.monotonic() - self._since > self._drain_timeout:
            self._start()

    def _settle(self) -> None:
        """Give a limit up that the server is above as soon as it is ready: starting it again would not help."""
        if self._limit and (held := self._server.memory()) > self._limit:
            self._report(f"memory limit: {_mib(self._limit)} are less than the {_mib(held)} after loading; not watched")
            self._limit = 0


def _named(server: TritonServer) -> str:
    """The requests that are lost, by their ids. One that ended Triton before it was admitted is not among them."""
    requests = server.table.requests()
    if not requests:
        return "; no admitted request was lost"
    words = [f"{name!r} ({_state(status)})" for name, status in requests[:_NAMED]]
    more = f" and {len(requests) - _NAMED} more" if len(requests) > _NAMED else ""
    return f"; lost: {', '.join(words)}{more}"


def _state(status: Status) -> str:
    return f"{status.state}, step {status.step} of {status.steps}" if status.steps else status.state


def _mib(size: int) -> str:
    return f"{size >> 20} MiB"
