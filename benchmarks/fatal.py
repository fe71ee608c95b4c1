"""Which requests end the bundled Triton, and how many threads an idle server has.

    python -m benchmarks.fatal [--json OUT]

Starts a server with the tiny model for each request of docs/security.md's table, sends it over HTTP, and notes how
Triton ended. Triton's own process may allocate no more than the supervisor lets it. The last line on stdout is JSON.
"""

import argparse
import http.client
import json
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.command import report
from benchmarks.served import REPOSITORY
from benchmarks.surroundings import surroundings
from fluxserve import process
from fluxserve.supervisor import Ports, TritonServer, memory
from fluxserve.supervisor.installation import bundled

_ENDS_WITHIN_S = 30.0
"""Longer than Triton takes from any of these requests to its end."""

_POLL_S = 0.05


@dataclass(frozen=True)
class Fatal:
    """A request to `flux` that is expected to end Triton."""

    what: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


def _with_shape(elements: int) -> bytes:
    """An input whose shape asks for 8 bytes an element, and has one."""
    return json.dumps({"inputs": [{"name": "image", "datatype": "INT64", "shape": [elements], "data": [1]}]}).encode()


def _classified() -> bytes:
    values: dict[str, tuple[str, Any]] = {
        "prompt": ("BYTES", "a fox"),
        "height": ("INT32", 64),
        "width": ("INT32", 64),
        "num_inference_steps": ("INT32", 1),
    }
    inputs = [{"name": n, "datatype": d, "shape": [1], "data": [v]} for n, (d, v) in values.items()]
    return json.dumps({"inputs": inputs, "outputs": [{"name": "images", "parameters": {"classification": 1}}]}).encode()


def requests() -> list[Fatal]:
    deep, deeper = 100_000, 5_000_000
    data = b'{"inputs":[{"name":"prompt","datatype":"BYTES","shape":[1],"data":%b}]}'
    return [
        Fatal("classification of images", _classified()),
        Fatal("shape [2^62]", _with_shape(2**62)),
        Fatal("shape [2^29]", _with_shape(2**29)),
        Fatal("shape [2 * 10^9]", _with_shape(2 * 10**9)),
        Fatal("100,000 nested brackets as data", data % (b"[" * deep + b"]" * deep)),
        Fatal("five million nested brackets as inputs", b'{"inputs":%b}' % (b"[" * deeper + b"]" * deeper)),
        Fatal("length header 2147483648", b"{}", {"Inference-Header-Content-Length": "2147483648"}),
    ]


@contextmanager
def _serving() -> Iterator[TritonServer]:
    with tempfile.TemporaryFile() as log, TritonServer(REPOSITORY, Ports.free(), bundled(), log=log) as server:
        server.start()
        server.wait_ready()
        assert server.is_up(), "the limit of its memory is set"
        yield server


def _send(server: TritonServer, request: Fatal) -> str:
    """Return the status of the answer, or why there is none."""
    connection = http.client.HTTPConnection("127.0.0.1", server.ports.http, timeout=_ENDS_WITHIN_S)
    try:
        connection.request("POST", "/v2/models/flux/infer", request.body, dict(request.headers))
        return str(connection.getresponse().status)
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__
    finally:
        connection.close()


def ending(server: TritonServer, request: Fatal) -> dict[str, Any]:
    """Send a request, and note the answer and how Triton ended; "lives" if it did not."""
    answer = _send(server, request)
    deadline = time.monotonic() + (_ENDS_WITHIN_S if not answer.isdigit() else 1.0)
    while (status := server.exit_status()) is None and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    ended = "lives" if status is None else signal.Signals(-status).name if status < 0 else f"status {status}"
    return {"request": request.what, "bytes": len(request.body), "answer": answer, "triton": ended}


def threads(server: TritonServer) -> dict[str, int]:
    """Threads of the server's processes: of Triton's own, and of all."""
    counts = {pid: sum(1 for _ in Path(f"/proc/{pid}/task").iterdir()) for pid in process.session(server.pid)}
    return {"triton": counts[server.pid], "all": sum(counts.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows, idle = [], {}
    for request in requests():
        with _serving() as server:
            idle = idle or threads(server)
            rows.append(ending(server, request))
        print("  ".join(f"{name} {value}" for name, value in rows[-1].items()))
    limit = {"limit_gib": memory.BURST / 2**30}
    report({"benchmark": "fatal", **surroundings(), **limit, "idle_threads": idle, "requests": rows}, args.json)


if __name__ == "__main__":
    main()
