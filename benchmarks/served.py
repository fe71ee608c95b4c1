"""A served model as its users see it: gRPC request in, picture out, one after the other; and where the time goes.

    python -m benchmarks.served [--artifact A | --checkpoint C] [--engine E] [--n 20] [--size 1024x1024]
        [--unseen 896x1152 832x1216] [--reference 1024x1024] [--json OUT]

Starts Triton on free ports of this machine, asks it for pictures one at a time with the client, and sets beside each
other: what the client measured, the device's stages, the image's encoding, and Triton's own statistics of every model.
What is left over is overhead: client − device − encoding. One seed is drawn again at once, after other sizes, and
beside another picture: its file must have the same bytes. With --reference each request brings a picture of that size
along, as a PNG, which a model that takes references draws after. The last line on stdout is JSON.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tritonclient.grpc as triton
from fluxserve_client import Client, Timings

from benchmarks.command import add_served, report, served
from benchmarks.pictures import photograph, sides
from benchmarks.surroundings import of_gpu, surroundings
from benchmarks.timing import summary
from fluxserve import settings
from fluxserve.media.images import write_image
from fluxserve.request import DEFAULT_QUALITY
from fluxserve.supervisor import Ports, TritonServer
from fluxserve.supervisor.installation import bundled

PROMPT = "a photograph of a fox that reads a newspaper in a café, morning light, shallow depth of field"
WARM_UP = 3
REPOSITORY = Path(__file__).parents[1] / "model_repository"
_BATCHES = (1, 2, 4)
_AGAIN = 3
_NANOSECONDS = ("queue", "compute_input", "compute_infer", "compute_output")


@dataclass(frozen=True)
class Asked:
    """Of a request: milliseconds that its caller waited, where they went, the file's bytes. The picture is let go, as a
    caller does who has saved it: kept ones would have every answer land in memory never used before."""

    ms: float
    timings: Timings
    size: int


def ask(client: Client, seed: int, fields: dict[str, Any]) -> Asked:
    begun = time.perf_counter()
    result = client.generate(PROMPT, seed=seed, **fields)
    return Asked(1000 * (time.perf_counter() - begun), result.timings, len(result.image))


def statistics_of(url: str) -> dict[str, dict[str, float]]:
    """Nanoseconds that each of Triton's models has spent so far, by what on, and its count of requests."""
    with triton.InferenceServerClient(url) as client:
        models = client.get_inference_statistics(as_json=True)["model_stats"]
    found = {}
    for model in models:
        stats = model["inference_stats"]
        spent = {name: float(stats.get(name, {}).get("ns", 0)) for name in _NANOSECONDS}
        found[model["name"]] = {**spent, "count": float(stats.get("success", {}).get("count", 0))}
    return found


def per_request(before: dict[str, dict[str, float]], after: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Milliseconds a request, of the models that were called in between."""
    found = {}
    for name, stats in after.items():
        count = stats["count"] - before.get(name, {}).get("count", 0.0)
        if count:
            spent = {part: stats[part] - before.get(name, {}).get(part, 0.0) for part in _NANOSECONDS}
            found[name] = {part: round(ns / count / 1e6, 2) for part, ns in spent.items()}
    return found


def sizes_never_seen(client: Client, fields: dict[str, Any], sizes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Of each: milliseconds of its first request, the median of the next ones, and how much more the first took."""
    found = []
    for height, width in sizes:
        other = fields | {"height": height, "width": width}
        first = ask(client, 0, other).ms
        after = statistics.median(ask(client, 1 + i, other).ms for i in range(_AGAIN))
        spent = {"first": first, "next": after, "more": first - after}
        found.append({"size": [height, width]} | {name: round(ms, 1) for name, ms in spent.items()})
    return found


def files_of(client: Client, fields: dict[str, Any]) -> tuple[bytes, ...]:
    """Of a request that always has the same seed."""
    return client.generate(PROMPT, seed=WARM_UP, **fields).images


def rates(client: Client, fields: dict[str, Any]) -> dict[str, float]:
    """Pictures a second, asked for so many at once, by one request each."""
    spent = {count: ask(client, 0, fields | {"num_images": count}).ms for count in _BATCHES}
    return {str(count): round(1000 * count / ms, 3) for count, ms in spent.items()}


def measure(options: dict[str, str], fields: dict[str, Any], n: int, unseen: list[tuple[int, int]]) -> dict[str, Any]:
    """Start a server with these settings, ask for `n` pictures one after the other; then others, and other sizes."""
    with tempfile.TemporaryFile() as log:
        server = TritonServer(REPOSITORY, Ports.free(), bundled(), log=log, options=options)
        with server:
            begun = time.perf_counter()
            server.start()
            server.wait_ready()
            ready = time.perf_counter() - begun
            with Client(server.grpc_url) as client:
                first = ask(client, 0, fields).ms
                for seed in range(1, WARM_UP):
                    ask(client, seed, fields)
                before = statistics_of(server.grpc_url)
                asked = [ask(client, WARM_UP + i, fields) for i in range(n)]
                after = statistics_of(server.grpc_url)
                used, batches = of_gpu("memory.used"), rates(client, fields)
                (own,), (again,) = files_of(client, fields), files_of(client, fields)
                new = sizes_never_seen(client, fields, unseen)
                (after_others,), (beside, _) = files_of(client, fields), files_of(client, fields | {"num_images": 2})
    return {
        "n": n,
        "ready_s": round(ready, 1),
        "first_ms": round(first, 1),
        "unseen_sizes_ms": new,
        "same_bytes": {
            "at once": again == own,
            "after other sizes": after_others == own,
            "beside another": beside == own,
        },
        **table(asked),
        "image_bytes": asked[-1].size,
        "images_per_s": batches,
        "gpu_memory_mib": used,
        "triton_ms": per_request(before, after),
    }


def table(asked: list[Asked]) -> dict[str, Any]:
    """Milliseconds by what they went on."""
    return {
        "client_ms": summary([a.ms for a in asked]),
        "overhead_ms": summary([a.ms - a.timings.total - a.timings.image for a in asked]),
        "around_the_loop_ms": summary([a.ms - a.timings.denoise for a in asked]),
        "stages_ms": {
            name: round(statistics.median(getattr(a.timings, name) for a in asked), 2)
            for name in ("queue", "encode", "denoise", "decode", "image")
        },
    }


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_served(made)
    made.add_argument(
        "--unseen", nargs="+", type=sides, default=[(96, 160)], metavar="HxW", help="asked for last; default: 96x160"
    )
    made.add_argument("--reference", type=sides, metavar="HxW", help="of an image to send; default: none")
    made.add_argument("--n", type=int, default=20, help="requests; default: %(default)s")
    made.add_argument("--json", type=Path)
    return made


def main() -> None:
    args = parser().parse_args()
    settings.let_threads_sleep()
    given = served(args)
    image = {"image": write_image(photograph(args.reference), "png", DEFAULT_QUALITY)} if args.reference else {}
    found = measure(given.options, given.fields | image, args.n, args.unseen)
    sent = {"reference": list(args.reference)} if args.reference else {}
    result = {"benchmark": "served", **surroundings(), **given.model, **given.fields, **sent, **found}
    print(f"ready after {found['ready_s']} s; first request {found['first_ms']} ms")
    for other in found["unseen_sizes_ms"]:
        print(f"a size never seen, {other['size']}: {other['first']} ms, and {other['next']} ms the next times")
    print(
        f"pictures a second, so many at once: {found['images_per_s']}; GPU memory used: {found['gpu_memory_mib']} MiB"
    )
    print(f"a picture's file: {found['image_bytes']:,} bytes; the same bytes from the same seed: {found['same_bytes']}")
    for name in ("client_ms", "overhead_ms", "around_the_loop_ms"):
        print(f"{name:<20}" + "".join(f"{key} {value:<10}" for key, value in found[name].items()))
    print(f"{'stages':<20}" + "".join(f"{key} {value:<10}" for key, value in found["stages_ms"].items()))
    for model, spent in found["triton_ms"].items():
        print(f"{model:<20}" + "".join(f"{key} {value:<10}" for key, value in spent.items()))
    report(result, args.json)


if __name__ == "__main__":
    main()
