"""A served model under load, by NVIDIA's perf_analyzer: pictures a second and latency with several callers at once.

    python -m benchmarks.load [--artifact A | --checkpoint C] [--callers 1 2 4] [--n 20] [--protocol grpc]
        [--size 1024x1024] [--steps 28]

perf_analyzer must be on the PATH, or named with --perf-analyzer; it comes with `pip install perf-analyzer` (2.60 and
later; Ubuntu 24.04, because it wants glibc 2.38). Starts Triton on free ports of this machine and lets each number of
callers ask `--n` times, with the prompts of benchmarks/perf_analyzer.json, a seed each, and size and steps if given,
which makes them the requests of benchmarks.served. Its client is C++: what one caller waits beyond the device's time
and the image's encoding is the share of Triton and the wire alone. The last line is JSON.
"""

import argparse
import csv
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.command import add_served, report, served
from benchmarks.served import REPOSITORY, WARM_UP
from benchmarks.surroundings import surroundings
from fluxserve import contract, settings
from fluxserve.supervisor import LOOPBACK, Ports, TritonServer
from fluxserve.supervisor.installation import bundled

_PROMPTS = Path(__file__).with_name("perf_analyzer.json")
_LATENCIES = ("p50", "p90", "p95", "p99")
_SHARES = ("Client Send", "Network+Server Send/Recv", "Client Recv", "Server Queue")
_COMPUTED = ("Server Compute Input", "Server Compute Infer", "Server Compute Output")
"""Of the average latency, in microseconds."""
_OF_A_PICTURE = ("total", "image")
"""Stages that are not Triton's: the device's time and the file's."""


def requests(fields: dict[str, int]) -> dict[str, Any]:
    """perf_analyzer's input data: every prompt once, with its own seed and these fields, each one number."""
    prompts = json.loads(_PROMPTS.read_text(encoding="utf-8"))["data"]
    return {"data": [prompt | _numbers({"seed": seed, **fields}) for seed, prompt in enumerate(prompts)]}


def _numbers(fields: dict[str, int]) -> dict[str, Any]:
    return {name: {"content": [value], "shape": [1]} for name, value in fields.items()}


def command(program: str, ports: Ports, protocol: str, callers: int, n: int, data: Path, table: Path) -> list[str]:
    """perf_analyzer's: exactly `n` requests, by so many callers."""
    url = f"{LOOPBACK}:{ports.grpc if protocol == 'grpc' else ports.http}"
    return [
        *(program, "-m", contract.FLUX.name, "-i", protocol, "-u", url),
        *("--input-data", str(data), "--concurrency-range", str(callers)),
        *("--request-count", str(n), "-f", str(table)),
    ]


def read(table: str) -> dict[str, float]:
    """What perf_analyzer's CSV says in its one row: pictures a second, and latencies in milliseconds."""
    (row,) = csv.DictReader(table.splitlines())
    latencies = {name: round(float(row[f"{name} latency"]) / 1000, 2) for name in _LATENCIES}
    mean = sum(float(row[share]) for share in (*_SHARES, *_COMPUTED)) / 1000
    return {"pictures_per_s": float(row["Inferences/Second"]), "mean": round(mean, 2), **latencies}


def stages(metrics: str) -> dict[str, tuple[float, float]]:
    """Of the server's metrics: seconds and pictures so far, by stage."""
    found: dict[str, list[float]] = {}
    for line in metrics.splitlines():
        for place, kind in enumerate(("sum", "count")):
            if line.startswith(f"fluxserve_stage_seconds_{kind}{{"):
                name = line.split('stage="')[1].split('"')[0]
                found.setdefault(name, [0.0, 0.0])[place] += float(line.rsplit(" ", 1)[1])
    return {name: (spent, count) for name, (spent, count) in found.items()}


def between(before: dict[str, tuple[float, float]], after: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Milliseconds a picture, by stage, of what came in between."""
    found = {}
    for name, (spent, count) in after.items():
        earlier = before.get(name, (0.0, 0.0))
        if count > earlier[1]:
            found[name] = round(1000 * (spent - earlier[0]) / (count - earlier[1]), 2)
    return found


def measure(
    program: str, options: dict[str, str], fields: dict[str, int], protocol: str, callers: list[int], n: int
) -> list[dict[str, Any]]:
    """A server of its own; for each number of callers what they saw, asking with these fields, and the server's stages.

    Raises CalledProcessError: perf_analyzer failed.
    """
    found = []
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory() as folder:
        server = TritonServer(REPOSITORY, Ports.free(), bundled(), log=log, options=options)
        data, table = Path(folder) / "requests.json", Path(folder) / "table.csv"
        data.write_text(json.dumps(requests(fields)), encoding="utf-8")

        def ask(count: int, times: int) -> dict[str, Any]:
            before = stages(_metrics(server))
            asked = command(program, server.ports, protocol, count, times, data, table)
            subprocess.run(asked, check=True, stdout=sys.stderr)
            return {**read(table.read_text()), "stages_ms": between(before, _counted(server, before, times))}

        with server:
            server.start()
            server.wait_ready()
            ask(1, WARM_UP)
            for count in callers:
                seen = ask(count, n)
                beyond = seen["mean"] - sum(seen["stages_ms"][stage] for stage in _OF_A_PICTURE)
                found.append(
                    {"callers": count, "n": n, **seen, **({"overhead": round(beyond, 2)} if count == 1 else {})}
                )
                print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return found


def _counted(server: TritonServer, before: dict[str, tuple[float, float]], n: int) -> dict[str, tuple[float, float]]:
    """The stages once `n` more pictures are counted: the server answers first. Raises TimeoutError."""
    expected = before.get("image", (0.0, 0.0))[1] + n
    for _ in range(50):
        after = stages(_metrics(server))
        if after.get("image", (0.0, 0.0))[1] >= expected:
            return after
        time.sleep(0.1)
    raise TimeoutError(f"{n} pictures were asked for, and not all of them counted")


def _metrics(server: TritonServer) -> str:
    with urllib.request.urlopen(f"http://{LOOPBACK}:{server.ports.metrics}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_served(parser)
    parser.add_argument("--callers", type=int, nargs="+", default=[1, 2, 4], help="at once; default: 1 2 4")
    parser.add_argument("--n", type=int, default=20, help="requests of each; default: %(default)s")
    parser.add_argument("--protocol", choices=("grpc", "http"), default="grpc")
    parser.add_argument("--perf-analyzer", default="perf_analyzer", metavar="PROGRAM")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    program = shutil.which(args.perf_analyzer)
    if program is None:
        sys.exit(
            f"--perf-analyzer: {args.perf_analyzer} not found; `pip install perf-analyzer` brings it (Ubuntu 24.04)"
        )
    settings.let_threads_sleep()
    given = served(args)
    found = measure(program, given.options, given.fields, args.protocol, args.callers, args.n)
    columns = ("callers", "pictures_per_s", "mean", *_LATENCIES, "overhead")
    print("".join(f"{name:>16}" for name in columns))
    for row in found:
        print("".join(f"{row.get(name, ''):>16}" for name in columns))
    asked = {**given.model, **given.fields, "protocol": args.protocol}
    result = {"benchmark": "load", **surroundings(), **asked, "callers": found}
    report(result, args.json)


if __name__ == "__main__":
    main()
