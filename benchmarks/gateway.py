"""What the gateway adds to a request: `fluxserve_client` alone against OpenAI's API, in turn, in one run.

    python -m benchmarks.gateway [--n 100] [--bytes 1260000] [--stream]

Three processes: this one calls; the gateway; and a server that speaks Triton's gRPC and answers every request at once
with the same file. So neither Triton nor a model takes part, and a difference of a millisecond can be seen. The client
ends with the file in memory, the gateway's caller with the answer, base64 in JSON; what it then takes to decode that,
by Python's own json and base64, is a row of its own. The last line on stdout is JSON.
"""

import argparse
import asyncio
import base64
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
from fluxserve_client import Client
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import serialize_byte_tensor

from benchmarks.surroundings import surroundings

_TIMINGS = json.dumps(dict.fromkeys(("queue", "encode", "denoise", "decode", "total", "image"), 0.0)).encode()
_PNG = b"\x89PNG\r\n\x1a\n"


class _Server(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Answers `flux` with one file."""

    def __init__(self, size: int) -> None:
        file = _PNG + os.urandom(size - len(_PNG))
        self._outputs = {
            "images": ("BYTES", [1], _strings(file)),
            "seeds": ("INT64", [1], np.array([7], np.int64).tobytes()),
            "timings": ("BYTES", [1], _strings(_TIMINGS)),
            "image_size": ("INT32", [2], np.array([1024, 1024], np.int32).tobytes()),
        }

    async def ServerReady(self, _: Any, __: Any) -> Any:
        return service_pb2.ServerReadyResponse(ready=True)

    async def ModelReady(self, _: Any, __: Any) -> Any:
        return service_pb2.ModelReadyResponse(ready=True)

    async def ModelInfer(self, request: Any, _: Any) -> Any:
        answer = service_pb2.ModelInferResponse(model_name=request.model_name, id=request.id)
        for name, (kind, shape, data) in self._outputs.items():
            answer.outputs.add(name=name, datatype=kind, shape=shape)
            answer.raw_output_contents.append(data)
        return answer


def _strings(value: bytes) -> bytes:
    return bytes(serialize_byte_tensor(np.array([value], np.object_)).item())


async def _serve(port: int, size: int) -> None:
    server = grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(_Server(size), server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@contextmanager
def _running(port: int, *words: str, patience: float = 60.0) -> Iterator[None]:
    """Run a process that listens on `port` once this yields; it is gone when this ends.

    Raises:
        RuntimeError: the process ended, or does not listen within `patience` seconds.
    """
    with subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + patience
            while not _open(port):
                if process.poll() is not None:
                    raise RuntimeError(f"{' '.join(words)}: ended with status {process.returncode}")
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{' '.join(words)}: does not listen on port {port} after {patience:g} s")
                time.sleep(0.05)
            yield
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def _open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _through_gateway(port: int, stream: bool) -> Callable[[], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    body = json.dumps({"prompt": "a red fox", "stream": stream})

    def call() -> bytes:
        connection.request("POST", "/v1/images/generations", body, {"content-type": "application/json"})
        return connection.getresponse().read()

    return call


def _decoded(answer: bytes, stream: bool) -> bytes:
    if stream:
        return base64.b64decode(json.loads(answer[answer.index(b"data: ") + 6 :])["b64_json"])
    return base64.b64decode(json.loads(answer)["data"][0]["b64_json"])


def measure(n: int, size: int, stream: bool) -> dict[str, Any]:
    """Milliseconds of each way, in turn; the first fifth warms up."""
    behind, front = _free_port(), _free_port()
    server = ("-m", "benchmarks.gateway", "--serve", str(behind), "--bytes", str(size))
    gateway = ("-m", "fluxserve_gateway", "serve", "--no-auth", "--port", str(front))
    with (
        _running(behind, *server),
        _running(front, *gateway, "--server", f"m=grpc://127.0.0.1:{behind}"),
        Client(f"grpc://127.0.0.1:{behind}") as client,
    ):
        call = _through_gateway(front, stream)
        taken: dict[str, list[float]] = {"client": [], "gateway": [], "decoding": []}
        for _ in range(n + n // 5):
            marks = [time.perf_counter()]
            assert len(client.generate("a red fox").image) == size
            marks.append(time.perf_counter())
            answer = call()
            marks.append(time.perf_counter())
            assert len(_decoded(answer, stream)) == size
            marks.append(time.perf_counter())
            for each, begun, ended in zip(taken.values(), marks, marks[1:], strict=False):
                each.append(1000 * (ended - begun))
    percentiles = {name: np.percentile(each[n // 5 :], (50, 90)).round(2).tolist() for name, each in taken.items()}
    added = round(percentiles["gateway"][0] - percentiles["client"][0], 2)
    return {"bytes": size, "n": n, "stream": stream, "p50_p90_ms": percentiles, "added_p50_ms": added}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--bytes", type=int, default=1_260_000)
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        asyncio.run(_serve(given.serve, given.bytes))
        return
    result = measure(given.n, given.bytes, given.stream)
    print(
        f"the client alone {result['p50_p90_ms']['client'][0]} ms, the gateway {result['p50_p90_ms']['gateway'][0]} ms"
    )
    print(json.dumps({**result, **surroundings()}))


if __name__ == "__main__":
    main()
