"""What differs between a CPU and a GPU for the loop's sake: how time is read and how far the host may run ahead."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_STEPS_AHEAD = 2


def _event(timed: bool = False) -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=timed)  # type: ignore[no-untyped-call]


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host's tensor on a device; on a GPU the host goes on at once, because it is sent from pinned memory.

    From pageable memory, more than 64 KB would make the host wait until the GPU has done all that it was told before,
    and the GPU then for the host's next launches.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def received(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Begin to copy a tensor to the host.

    Returns:
        A function that waits for the copy and returns it, for another thread than the one that launches.
    """
    if not tensor.is_cuda:
        return lambda: tensor
    host = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
    copied = _event()
    copied.record()

    def wait() -> torch.Tensor:
        copied.synchronize()
        return host

    return wait


class DeviceClock:
    """Adds up milliseconds by stage: by CUDA events on a GPU (nothing waits until `milliseconds`), else on the host."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._host: list[tuple[str, float]] = []
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        if not self._cuda:
            start = time.perf_counter()
            yield
            self._host.append((name, 1000 * (time.perf_counter() - start)))
            return
        begin, end = _event(timed=True), _event(timed=True)
        begin.record()
        yield
        end.record()
        self._events.append((name, begin, end))

    def milliseconds(self) -> dict[str, float]:
        """Total of each stage so far, in the order of their first appearance. Waits for the device."""
        if self._events:
            self._events[-1][2].synchronize()
        total: dict[str, float] = {}
        for name, spent in (*self._host, *((n, b.elapsed_time(e)) for n, b, e in self._events)):
            total[name] = total.get(name, 0.0) + spent
        return total


class Pacer:
    """Keeps the host at most two steps ahead of a GPU, so that a cancellation takes effect within two steps.

    The device never idles for it: while the host waits for step i − 2, step i − 1 and i are queued.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._done: deque[torch.cuda.Event] = deque()

    def step(self) -> None:
        """Call after a step was enqueued."""
        if not self._cuda:
            return
        event = _event()
        event.record()
        self._done.append(event)
        if len(self._done) > _STEPS_AHEAD:
            self._done.popleft().synchronize()
