"""An event loop on a thread of its own, for callers without asyncio."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")


class Retired(RuntimeError):
    """The worker takes no calls any more."""


class Unresponsive(Exception):
    """The event loop did not run for too long: a callback blocks it."""


@dataclass(eq=False)
class _Call:
    """One coroutine on its way through the worker.

    Attributes:
        answer: what the coroutine returned or raised.
        reason: why the worker ended the coroutine; None while it has not.
    """

    coroutine: Coroutine[Any, Any, Any]
    answer: Future[Any] = field(default_factory=Future)
    task: asyncio.Task[None] | None = None
    reason: RuntimeError | None = None


class Worker:
    """Runs coroutines for other threads. Nothing that a coroutine raises ends the event loop.

    Whatever else ends it (a callback that stops it, an exception thrown into the thread) cancels the coroutines that
    run, and the loop goes on for as long as they take to clean up after themselves.
    """

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._lock = threading.Lock()
        self._calls: set[_Call] = set()
        self._retired = False
        self.thread = threading.Thread(target=self._main, name="fluxserve-client", daemon=True)
        self.thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T], patience: float | None = None) -> T:
        """Wait for `coroutine`, which is cancelled if an exception (Ctrl-C) ends the wait.

        Raises:
            Unresponsive: `coroutine` did not end within `patience` seconds.
            Retired: the worker takes no calls any more.
            RuntimeError: the event loop was ended; or this is the worker's own thread.
        """
        call = _Call(coroutine)
        self._submit(call)
        try:
            wait([call.answer], patience)
        except BaseException as interrupt:
            self._cancel(call)  # the request must stop before the interrupt leaves this call
            wait([call.answer])
            for note in getattr(call.answer.exception(), "__notes__", ()):
                interrupt.add_note(note)
            raise
        if not call.answer.done():
            self._cancel(call)
            raise Unresponsive
        error = call.answer.exception()
        if call.reason is not None and isinstance(error, asyncio.CancelledError):
            raise call.reason from error
        answer: T = call.answer.result()
        return answer

    def retire(self) -> None:
        """Cancel what runs, end the event loop and the thread; return at once. Twice is harmless."""
        with self._lock:
            if not self._retired:
                self._retired = True
                self.loop.call_soon_threadsafe(self.loop.stop)

    def _submit(self, call: _Call) -> None:
        if threading.current_thread() is self.thread:  # would wait for itself, for ever
            call.coroutine.close()
            raise RuntimeError("called from a progress callback; to stop the request, raise an exception there")
        with self._lock:
            if self._retired:
                call.coroutine.close()
                raise Retired("this client is closed")
            self._calls.add(call)
            self.loop.call_soon_threadsafe(self._start, call)

    def _start(self, call: _Call) -> None:
        call.task = self.loop.create_task(_contained(call))
        call.task.add_done_callback(lambda _: self._settle(call, asyncio.CancelledError()))

    def _settle(self, call: _Call, error: BaseException) -> None:
        """End the wait for a call whose coroutine never got to say how it ended."""
        self._calls.discard(call)
        call.coroutine.close()
        if not call.answer.done():
            call.answer.set_exception(error)

    def _cancel(self, call: _Call) -> None:
        # in order, so that `_start` ran before
        self.loop.call_soon_threadsafe(lambda: call.task and call.task.cancel())

    def _main(self) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
                runner.get_loop()  # the runner closes it in the end, after what is left of its tasks
                while not self._retired:
                    self._run_loop()
        finally:
            for call in list(self._calls):  # nobody else will end these waits
                self._settle(call, RuntimeError("the client's thread has ended"))

    def _run_loop(self) -> None:
        cause: BaseException | None = None
        try:
            self.loop.run_forever()
        except BaseException as error:  # noqa: BLE001 (every caller that waits gets it as the cause)
            cause = error
        for call in list(self._calls):
            said = "this client was closed" if self._retired else "the client's event loop was ended"
            call.reason = RuntimeError(f"{said} before the answer came")
            call.reason.__cause__ = cause
            if call.task is not None:
                call.task.cancel()


async def _contained(call: _Call) -> None:
    """Keep whatever leaves the coroutine: a SystemExit that left the task would end the event loop."""
    try:
        result = await call.coroutine
    except BaseException as error:  # noqa: BLE001 (raised again in the caller's thread)
        call.answer.set_exception(error)
    else:
        call.answer.set_result(result)
