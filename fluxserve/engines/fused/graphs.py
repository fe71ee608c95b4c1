"""A sequence of launches as one: run as it is the first time, captured the second, replayed from then on."""

import gc
from collections.abc import Callable
from functools import cache

import torch


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Replayed:
    """`launch` must neither allocate nor wait once it has run, and work at the same addresses every time.

    The first call runs it on the current stream, so that a size that comes once pays for no capture, and everything
    that libraries load or choose late is there before one. On a CPU it is simply called.
    """

    def __init__(self, launch: Callable[[], None], device: torch.device) -> None:
        self._launch, self._device = launch, device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = False

    def __call__(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        elif self._device.type == "cpu" or not self._warm:
            self._launch()
            self._warm = True
        else:
            self._graph = self._capture()
            self._graph.replay()

    def _capture(self) -> torch.cuda.CUDAGraph:
        """By hand, because `torch.cuda.graph` also collects garbage and empties the allocator's cache, which the next
        picture would have to fill again."""
        graph, stream = torch.cuda.CUDAGraph(), _stream(self._device)
        stream.wait_stream(torch.cuda.current_stream())
        collecting = gc.isenabled()
        gc.disable()  # another graph's destruction would end this capture
        try:
            with torch.cuda.stream(stream):
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self._launch()
                finally:
                    graph.capture_end()
        finally:
            if collecting:
                gc.enable()
        torch.cuda.current_stream().wait_stream(stream)
        return graph
