"""Mixed load for minutes, and whether a server keeps its promises under it.

    python -m benchmarks.soak [--minutes 15] [--at-once 8] [--seed 0] [--json OUT]
        [--artifact A | --checkpoint C] [--engine E] [--sides 64 128 256] [--steps 4] [--long-steps 50] [--references]
        [--server HTTP_HOST:PORT GRPC_HOST:PORT]

Sends requests of mixed sizes, steps, formats and pictures over gRPC and HTTP. One in five is abandoned in one of four
ways, one in twenty is wrong, and a tenth of the good ones repeats a request whose bytes are known. The sequence depends
on the seed alone. Without --server it starts a server of its own, under its supervisor, and looks at memory, processes
and the in-flight table as well. Exit status 1 if a promise is broken. The last line on stdout is JSON.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.command import report
from benchmarks.served import REPOSITORY
from benchmarks.soak.cases import Shape
from benchmarks.soak.footprint import MIB, growth
from benchmarks.soak.promises import Promise, as_json
from benchmarks.soak.run import Plan, Soaked, soak
from benchmarks.surroundings import surroundings
from fluxserve import settings
from fluxserve.supervisor import Ports, TritonServer, Watch
from fluxserve.supervisor.installation import bundled


@contextmanager
def supervised(options: dict[str, str]) -> Iterator[TritonServer]:
    """A server of our own, under its supervisor."""
    stopping: list[bool] = []
    with (
        tempfile.TemporaryFile() as log,
        TritonServer(REPOSITORY, Ports.free(), bundled(), log=log, options=options) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        server.start()
        server.wait_ready()
        watch = Watch(server, lambda: bool(stopping), lambda line: print(line, file=sys.stderr))
        watching = pool.submit(watch.run)
        try:
            yield server
        finally:
            stopping.append(True)
        watching.result()


def summary(soaked: Soaked) -> dict[str, Any]:
    """Counts by kind, protocol and end; milliseconds of good requests; memory early and late."""
    outcomes, footprint = soaked.outcomes, soaked.footprint
    counts = Counter(
        (o.case.kind, o.case.what if o.case.kind == "abandoned" else "", o.case.protocol, o.ended) for o in outcomes
    )
    good = sorted(o.ms for o in outcomes if o.case.kind == "good" and not o.wrong)
    result: dict[str, Any] = {
        "requests": len(outcomes),
        "counts": [
            {"kind": k, "way": w, "protocol": p, "ended": e, "n": n} for (k, w, p, e), n in sorted(counts.items())
        ],
        "good_ms": {"p50": statistics.median(good), "p99": good[int(0.99 * (len(good) - 1))]} if good else {},
    }
    if footprint and footprint.samples:
        for name in ("rss", "shared"):
            early, late = growth([getattr(s, name) for s in footprint.samples])
            result[f"{name}_mib"] = {"early": round(early / MIB, 1), "late": round(late / MIB, 1)}
    return result


def show(result: dict[str, Any], judged: Sequence[Promise]) -> None:
    for row in result["counts"]:
        print(f"{row['n']:>7}  {row['kind']:<10}{row['protocol']:<6}{row['ended']:<10}{row['way']}")
    for name in ("good_ms", "rss_mib", "shared_mib"):
        if result.get(name):
            print(f"{name:<12}" + "  ".join(f"{key} {value:.0f}" for key, value in result[name].items()))
    for promise in judged:
        print(f"{promise.verdict:<14}{promise.text}")
        for example in list(promise.broken or ())[:3]:
            print(f"{'':<14}  {example}")


def _positive(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text}; expected more than 0")
    return number


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {text}; expected at least 1")
    return number


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("artifact", "checkpoint", "engine"):
        options.add_argument(f"--{name}", default="", help="as `fluxserve serve` takes it")
    options.add_argument(
        "--server", nargs=2, metavar=("HTTP", "GRPC"), help="host:port of each; default: one of its own"
    )
    options.add_argument("--minutes", type=_positive, default=15.0, help="default: %(default)s")
    options.add_argument("--at-once", type=_count, default=8, help="default: %(default)s")
    options.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    shape = Shape()
    options.add_argument(
        "--sides", type=_count, nargs="+", default=shape.sides, help="of pictures; default: %(default)s"
    )
    options.add_argument("--steps", type=_count, default=shape.steps, help="at most; default: %(default)s")
    options.add_argument(
        "--long-steps", type=_count, default=shape.long_steps, help="of abandoned ones; default: %(default)s"
    )
    options.add_argument("--references", action="store_true", help="the model takes reference images: FLUX.2")
    options.add_argument("--json", type=Path)
    return options


def main() -> int:
    args = parser().parse_args()
    settings.let_threads_sleep()
    shape = Shape(tuple(args.sides), args.steps, args.long_steps, strength=not args.references)
    model = {name: getattr(args, name) for name in ("artifact", "checkpoint", "engine")}
    plan = Plan(shape, 60 * args.minutes, args.at_once, args.seed)
    if args.server:
        http, grpc = args.server
        soaked = asyncio.run(soak({"http": http, "grpc": grpc}, plan))
    else:
        with supervised({name: value for name, value in model.items() if value}) as server:
            soaked = asyncio.run(soak({"http": server.http_url, "grpc": server.grpc_url}, plan, server))
    result = summary(soaked)
    show(result, soaked.promises)
    run = {"minutes": args.minutes, "at_once": args.at_once, "seed": args.seed, **model}
    report({"benchmark": "soak", **surroundings(), **run, **result, "promises": as_json(soaked.promises)}, args.json)
    return int(any(promise.broken for promise in soaked.promises))


if __name__ == "__main__":
    sys.exit(main())
