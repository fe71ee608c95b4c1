"""Where a request's milliseconds go that are not the GPU's: Triton's time stamps between those of its clients.

    python -m benchmarks.hops [--artifact A | --checkpoint C] [--engine E] [--n 40] [--size 1024x1024] [--steps N]
        [--json OUT]

Starts Triton with its trace on, and asks for pictures one at a time, in turn by our client, over gRPC and HTTP, and by
tritonclient's own blocking one. Triton's trace and this process read the same clock of this machine, so that each
request is a row of stamps from one client's call to its answer. `generate` returns once its thread has drawn: what it
takes is the device's time, what is before and after it on that thread, and the file's time where the GPU writes it, a
PNG. Any other file is made by a thread of its own, behind `generate`, as the answer is. The last line on stdout is
JSON.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from fluxserve_client import Client

from benchmarks.command import add_served, report, served
from benchmarks.served import PROMPT, REPOSITORY, WARM_UP
from benchmarks.surroundings import surroundings
from fluxserve import contract, settings
from fluxserve.supervisor import Ports, TritonServer
from fluxserve.supervisor.installation import bundled

Stamps = Mapping[str, Mapping[str, int]]
"""Of one request: model → name of a stamp → nanoseconds."""


@dataclass(frozen=True)
class Asked:
    """A request: nanoseconds when its client called and had the answer, milliseconds that the answer says it took."""

    request_id: str
    begun: int
    ended: int
    device: float
    image: float


_TRACE = ("level=TIMESTAMPS", "rate=1", "count=-1", "triton,log-frequency=0")
_READ, _SENDING, _SENT = "read", "sending", "sent"
_WIRES = (
    {_READ: "GRPC_WAITREAD_END", _SENDING: "GRPC_SEND_START", _SENT: "GRPC_SEND_END"},
    {_READ: "HTTP_RECV_END", _SENDING: "HTTP_SEND_START", _SENT: "HTTP_SEND_END"},
)
"""Stamps by the protocol that a request came by."""
_PATH = (
    ("request is read", "flux", _READ),
    ("prepare is called", "prepare", "COMPUTE_START"),
    ("prepare has answered", "prepare", "COMPUTE_END"),
    ("generate is called", "generate", "COMPUTE_START"),
    ("generate has returned", "generate", "COMPUTE_END"),
    ("answer is being sent", "flux", _SENDING),
    ("answer is sent", "flux", _SENT),
)
"""A request's way, in its order: what has happened, and whose stamp says so."""


def stamps(trace: Sequence[Mapping[str, Any]]) -> Mapping[str, Stamps]:
    """Request id → its stamps, of Triton's trace file: entries that name a request's model, and entries with times."""
    times: dict[int, dict[str, int]] = {}
    for entry in trace:
        for stamp in entry.get("timestamps", ()):
            times.setdefault(entry["id"], {})[stamp["name"]] = stamp["ns"]
    found: dict[str, dict[str, dict[str, int]]] = {}
    for entry in trace:
        if entry.get("request_id"):
            found.setdefault(entry["request_id"], {})[entry["model_name"]] = times.get(entry["id"], {})
    return found


def hops(asked: Asked, seen: Stamps) -> dict[str, float]:
    """Milliseconds from each stamp to the next, the client's own first and last; then what they consist of.

    Triton takes some of its stamps a little late, so that a hop can be shorter than nothing.
    """
    at, previous, found = asked.begun, "called", {}
    (wire,) = (names for names in _WIRES if names[_READ] in seen["flux"])
    for name, model, stamp in (*_PATH, ("client has it", "", "")):
        now = seen[model][wire.get(stamp, stamp)] if model else asked.ended
        found[f"{previous} → {name}"] = (now - at) / 1e6
        at, previous = now, name
    found["device"], found["image"] = asked.device, asked.image
    found["generate, but for the device"] = found["generate is called → generate has returned"] - asked.device
    found["client − device − image"] = (asked.ended - asked.begun) / 1e6 - asked.device - asked.image
    return found


Ask = Callable[[int, Mapping[str, Any], str], Mapping[str, float]]
"""Seed, other fields, request id → the answer's timings."""


def _ours(client: Client, seed: int, fields: Mapping[str, Any], request_id: str) -> Mapping[str, float]:
    return vars(client.generate(PROMPT, seed=seed, request_id=request_id, **fields).timings)


def _blocking(
    client: triton.InferenceServerClient, seed: int, fields: Mapping[str, Any], request_id: str
) -> Mapping[str, float]:
    given = {"prompt": PROMPT.encode(), "seed": seed, **fields}
    inputs = [_input(tensor, given[tensor.name]) for tensor in contract.FLUX.inputs if tensor.name in given]
    answer = client.infer(contract.FLUX.name, inputs, request_id=request_id)
    assert len(answer.as_numpy("images")[0])  # its caller wants the picture
    return dict(json.loads(answer.as_numpy("timings")[0]))


def _input(tensor: contract.TensorContract, value: object) -> Any:
    kinds = {"BYTES": np.object_, "INT64": np.int64, "INT32": np.int32}
    return triton.InferInput(tensor.name, [1], tensor.dtype).set_data_from_numpy(np.array([value], kinds[tensor.dtype]))


def measure(options: dict[str, str], fields: dict[str, int], n: int) -> dict[str, dict[str, dict[str, float]]]:
    """Medians by client, of `hops`."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        file = Path(folder) / "trace.json"
        tracing = [f"--trace-config={option}" for option in (f"triton,file={file}", *_TRACE)]
        server = TritonServer(REPOSITORY, Ports.free(), bundled(), log=log, options=options, arguments=tracing)
        with server:
            server.start()
            server.wait_ready()
            asked = _ask_all(server, fields, WARM_UP + n)
        seen = stamps(json.loads(file.read_text()))  # whole once the server has ended
    return {name: _summary(rows[WARM_UP:], seen) for name, rows in asked.items()}


def _ask_all(server: TritonServer, fields: dict[str, int], times: int) -> dict[str, list[Asked]]:
    """All clients in turn."""
    url = server.grpc_url
    with Client(url) as own, Client(f"http://{server.http_url}") as http, triton.InferenceServerClient(url) as plain:
        clients: dict[str, Ask] = {
            "ours": partial(_ours, own),
            "HTTP": partial(_ours, http),
            "blocking": partial(_blocking, plain),
        }
        asked: dict[str, list[Asked]] = {name: [] for name in clients}
        for seed in range(times):
            for name, ask in clients.items():
                request_id, begun = f"{name}-{seed}", time.monotonic_ns()
                said = ask(seed, fields, request_id)
                asked[name].append(Asked(request_id, begun, time.monotonic_ns(), said["total"], said["image"]))
    return asked


def _summary(asked: Sequence[Asked], seen: Mapping[str, Stamps]) -> dict[str, dict[str, float]]:
    rows = [hops(a, seen[a.request_id]) for a in asked]
    return {"medians_ms": {name: round(statistics.median(row[name] for row in rows), 2) for name in rows[0]}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_served(parser)
    parser.add_argument("--n", type=int, default=40, help="requests of each client; default: %(default)s")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    settings.let_threads_sleep()
    given = served(args)
    found = measure(given.options, given.fields, args.n)
    print(f"{'medians, ms':<54}" + "".join(f"{name:>10}" for name in found))
    for row in found["ours"]["medians_ms"]:
        print(f"{row:<54}" + "".join(f"{part['medians_ms'][row]:>10}" for part in found.values()))
    result = {"benchmark": "hops", **surroundings(), **given.model, **given.fields, "n": args.n, "clients": found}
    report(result, args.json)


if __name__ == "__main__":
    main()
