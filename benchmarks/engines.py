"""How long each engine takes for the same pictures, side by side in one process.

    python -m benchmarks.engines [--artifact FOLDER]... [--artifacts-only] [--n 15] [--json OUT]

The checkpoint through torch_eager, and every artifact given; picture by picture in turn, so that what else the machine
does hits all alike. Times are the pipeline's own stages. On a CPU only the ratios mean anything. The last line on
stdout is JSON.
"""

import argparse
import statistics
from pathlib import Path

import torch

from benchmarks.command import report
from benchmarks.surroundings import surroundings
from fluxserve import Model, settings

PROMPT = "a fox on a blue background"
WARM_UP = 2


class Contender:
    """One engine with the model open."""

    def __init__(self, given: dict[str, str], device: str) -> None:
        config = settings.load({name: {"string_value": value} for name, value in given.items()})
        before = allocated(reset=True)
        self._model = Model.open(config, device)
        self.memory = {"opened": allocated() - before, "most while opening": allocated(peak=True) - before}
        found = self._model.source
        self.name = found.engine
        if found.artifact:
            self.name += f" {found.artifact.manifest['precision']}"
        if arena := getattr(self._model.pipeline.network, "arena", None):
            self.memory["of which arena"] = arena.bytes / 2**30
        self.times: list[dict[str, float]] = []

    def draw(self, seed: int) -> None:
        request = self._model.request(PROMPT, seed=seed)
        before = allocated(reset=True)
        (drawing,) = self._model.draw(request)
        drawn = self.memory["opened"] + allocated(peak=True) - before
        self.memory["peak"] = max(self.memory.get("peak", 0.0), drawn)
        self.times.append(drawing.timings)

    def median(self, stage: str) -> float:
        return statistics.median(t[stage] for t in self.times[WARM_UP:])

    def summary(self) -> dict[str, object]:
        totals = sorted(t["total"] for t in self.times[WARM_UP:])
        medians = {stage: round(self.median(stage), 2) for stage in ("encode", "denoise", "decode", "total")}
        return {
            "engine": self.name,
            "median_ms": medians,
            "total_ms_least_most": [round(totals[0], 2), round(totals[-1], 2)],
            "gib": {name: round(value, 2) for name, value in self.memory.items() if torch.cuda.is_available()},
        }


def allocated(peak: bool = False, reset: bool = False) -> float:
    """GiB that PyTorch has on the GPU now, or had at most since a reset; 0 on a CPU."""
    if not torch.cuda.is_available():
        return 0.0
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="", help="default: the tiny model")
    parser.add_argument("--artifact", action="append", default=[], help="made by `fluxserve export`; may be repeated")
    parser.add_argument("--artifacts-only", action="store_true", help="without torch_eager")
    parser.add_argument("--n", type=int, default=15, help="pictures of each engine; default: %(default)s")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.artifacts_only and not args.artifact:
        parser.error("--artifacts-only: got no --artifact")
    settings.let_threads_sleep()
    contenders = [] if args.artifacts_only else [Contender({"checkpoint": args.checkpoint}, args.device)]
    contenders += [Contender({"artifact": folder}, args.device) for folder in args.artifact]
    for seed in range(WARM_UP + args.n):
        for contender in contenders:
            contender.draw(seed)
    first = contenders[0].median("total")
    print(f"{'engine':<24}{'text':>8}{'denoise':>10}{'VAE':>8}{'total ms':>10}{'times as fast':>15}")
    for c in contenders:
        stages = "".join(
            f"{c.median(s):>{w}.1f}" for s, w in (("encode", 8), ("denoise", 10), ("decode", 8), ("total", 10))
        )
        print(f"{c.name:<24}{stages}{first / c.median('total'):>15.2f}")
    result = {"benchmark": "engines", **surroundings(), "n": args.n, "engines": [c.summary() for c in contenders]}
    report(result, args.json)


if __name__ == "__main__":
    main()
