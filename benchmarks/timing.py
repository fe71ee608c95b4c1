"""How GPU work is timed: by events, behind a warm-up, launches captured so that gaps between them don't count."""

import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

Launch = Callable[[], object]


def captured(launch: Launch) -> torch.cuda.CUDAGraph:
    """Run twice, so that everything late is loaded and chosen, then capture."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):
            launch()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return graph


def milliseconds(launch: Launch, repeats: int, warm_up: int = 2) -> list[float]:
    """Of each repeat, sorted."""
    for _ in range(warm_up):
        launch()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        launch()
        mark.record()
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) for a, b in pairwise(marks))


def replayed(launch: Launch, repeats: int = 20, inner: int = 10) -> float:
    """Median milliseconds of one launch, `inner` of them to a graph."""

    def several() -> None:
        for _ in range(inner):
            launch()

    graph = captured(several)
    return statistics.median(milliseconds(graph.replay, repeats)) / inner


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, p90 and p99 (the nearest that was measured), least and most, rounded to a hundredth."""
    ordered = sorted(values)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]

    found = {"median": statistics.median(ordered), "p90": at(0.9), "p99": at(0.99), "least": at(0), "most": at(1)}
    return {name: round(value, 2) for name, value in found.items()} | {"n": len(ordered)}
