"""A fluxserve server in memory, and the same one behind real gRPC and HTTP sockets.

`FakeFlux` is a handler for `MockTransport`. `Wire` serves it as Triton would, on loopback ports of the system's
choosing, with Triton's prefixes, statuses and habits: hanging up does not stop a request.
"""

from __future__ import annotations

import asyncio
import io
import json
import ssl
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np
from aiohttp import web
from fluxserve_client.contract import Tensors
from fluxserve_client.errors import Cancelled, FluxserveError, RequestIdInUse
from PIL import Image
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import deserialize_bytes_tensor, np_to_triton_dtype, serialize_byte_tensor, triton_to_np_dtype

TIMINGS = {"queue": 1.5, "encode": 2, "denoise": 30, "decode": 4, "total": 36, "image": 0.5}


def strings(*values: bytes) -> np.ndarray[Any, Any]:
    return np.array(values, dtype=np.object_)


def preview_file(side: int, step: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side // 2), (step % 256, 0, 0)).save(file, "PNG")
    return file.getvalue()


@dataclass
class Slot:
    step: int = 0
    cancelling: bool = False


@dataclass
class FakeFlux:
    """What the server does, and what it saw.

    Attributes:
        steps, step_s: how many steps a request takes, and how long each.
        arrival_s: how long a request takes to get into the in-flight table.
        pictures: what comes back, in place of `num_images` times a few bytes.
        error, control_error: raised in place of an answer.
        requests: (id, inputs) of every call of `flux`.
        headers: of every call over a wire, keys in lower case.
        actions: (id, action) of every call of `control`.
        previews: (kind, after) of every preview that was asked for.
        ended: id and outcome of every call of `flux`: "done" or "cancelled".
    """

    steps: int = 3
    step_s: float = 0.0
    arrival_s: float = 0.0
    pictures: tuple[bytes, ...] | None = None
    error: FluxserveError | None = None
    control_error: FluxserveError | None = None
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    actions: list[tuple[str, str]] = field(default_factory=list)
    previews: list[tuple[str, int]] = field(default_factory=list)
    ended: list[tuple[str, str]] = field(default_factory=list)
    table: dict[str, Slot] = field(default_factory=dict)

    async def __call__(self, model: str, inputs: Tensors, request_id: str) -> Tensors:
        return self.control(inputs) if model == "control" else await self.flux(inputs, request_id)

    def control(self, inputs: Tensors) -> Tensors:
        name, action = (inputs[key][0].decode() for key in ("request_id", "action"))
        self.actions.append((name, action))
        if self.control_error:
            raise self.control_error
        slot = self.table.get(name)
        if slot is None:
            return {**_progress("unknown", 0, 0), **_preview(b"", 0)}
        slot.cancelling |= action == "cancel"
        said, shown = _progress("cancelling" if slot.cancelling else "running", slot.step, self.steps), _preview(b"", 0)
        if action == "preview":
            kind, after = inputs["kind"][0].decode(), int(inputs["after"][0])
            self.previews.append((kind, after))
            if slot.step > after:
                shown = _preview(preview_file(8 if kind == "glimpse" else 64, slot.step), slot.step)
        return {**said, **shown}

    async def flux(self, inputs: Tensors, request_id: str) -> Tensors:
        self.requests.append((request_id, dict(inputs)))
        if self.error:
            raise self.error
        if request_id in self.table:
            raise RequestIdInUse(f"request_id: {request_id!r} is in use by a running request")
        await asyncio.sleep(self.arrival_s)
        slot = self.table[request_id] = Slot()
        try:
            while slot.step < self.steps:
                if slot.cancelling:
                    self.ended.append((request_id, "cancelled"))
                    raise Cancelled(f"request {request_id!r} was cancelled at step {slot.step} of {self.steps}")
                await asyncio.sleep(self.step_s)
                slot.step += 1
        finally:
            del self.table[request_id]
        self.ended.append((request_id, "done"))
        return self.answer(inputs)

    def answer(self, inputs: Tensors) -> Tensors:
        count = int(inputs["num_images"][0]) if "num_images" in inputs else 1
        # zeros at the end, and bytes that are no UTF-8: what a careless wire would lose
        pictures = self.pictures or (b"\x89PNG\r\n\x1a\n\xff\x00\x00",) * count
        first = int(inputs["seed"][0]) if "seed" in inputs else 5
        return {
            "images": strings(*pictures),
            "seeds": np.arange(first, first + len(pictures), dtype=np.int64),
            "timings": strings(json.dumps(TIMINGS).encode()),
            "image_size": np.array([16, 32], dtype=np.int32),
        }


def _progress(state: str, step: int, steps: int) -> Tensors:
    return {
        "state": strings(state.encode()),
        "step": np.array([step], dtype=np.int32),
        "steps": np.array([steps], dtype=np.int32),
    }


def _preview(image: bytes, step: int) -> Tensors:
    return {"preview": strings(image), "preview_step": np.array([step], dtype=np.int32)}


# Triton's HTTP front end has no code of its own for CANCELLED and ALREADY_EXISTS
_HTTP = {
    "INVALID_ARGUMENT": 400,
    "ALREADY_EXISTS": 400,
    "CANCELLED": 400,
    "NOT_FOUND": 404,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
}
_STATUS_OF = {Cancelled: "CANCELLED", RequestIdInUse: "ALREADY_EXISTS"}


def _as_triton(error: FluxserveError, model: str) -> tuple[str, str]:
    prefix = "in ensemble 'flux', " if model == "flux" else ""
    status = error.status or _STATUS_OF[type(error)]
    code = f"[{status}] " if status in ("CANCELLED", "ALREADY_EXISTS") else ""
    return status, prefix + code + str(error)


def _encode(tensor: Any) -> bytes:
    return serialize_byte_tensor(tensor).item() if tensor.dtype == np.object_ else tensor.tobytes()


def _decode(data: bytes, datatype: str) -> Any:
    if datatype == "BYTES":
        return deserialize_bytes_tensor(data)
    return np.frombuffer(data, dtype=triton_to_np_dtype(datatype))


class Wire:
    """`FakeFlux` on sockets, in a thread; `grpc_port` and `http_port` are open inside the `with` block."""

    def __init__(
        self, fake: FakeFlux, certificate: tuple[Path, Path] | None = None, ping_interval_s: float = 300.0
    ) -> None:
        """`ping_interval_s` is how often a client may ping while no data passes; Triton's own default is 300."""
        self.fake = fake
        self._ping_interval_s = ping_interval_s
        self._certificate = certificate
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.grpc_port = 0
        self.http_port = 0

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def url(self, protocol: str) -> str:
        secure = "s" if self._certificate else ""
        return f"{protocol}{secure}://localhost:{self.grpc_port if protocol == 'grpc' else self.http_port}"

    async def _open(self) -> None:
        context = credentials = None
        if self._certificate:
            chain, key = self._certificate
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(chain, key)
            credentials = grpc.ssl_server_credentials([(key.read_bytes(), chain.read_bytes())])
        pings = ("grpc.http2.min_ping_interval_without_data_ms", round(1000 * self._ping_interval_s))
        options = [("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0), pings]
        self._grpc = grpc.aio.server(options=options)
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(_Grpc(self.fake), self._grpc)
        add = self._grpc.add_insecure_port
        self.grpc_port = self._grpc.add_secure_port("localhost:0", credentials) if credentials else add("localhost:0")
        await self._grpc.start()
        app = web.Application(client_max_size=1 << 30)
        app.router.add_get("/v2/health/ready", _ready)
        app.router.add_get("/v2/models/{model}/ready", _ready)
        app.router.add_post("/v2/models/{model}/infer", self._infer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "localhost", 0, ssl_context=context)
        await site.start()
        self.http_port = self._runner.addresses[0][1]

    async def _close(self) -> None:
        await self._grpc.stop(0)
        await self._runner.cleanup()
        left = asyncio.all_tasks() - {asyncio.current_task()}  # requests that nobody stopped
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _infer(self, request: web.Request) -> web.Response:
        model = request.match_info["model"]
        self.fake.headers.append({key.lower(): value for key, value in request.headers.items()})
        body = await request.read()
        split = int(request.headers.get("Inference-Header-Content-Length", len(body)))
        head, rest, inputs = json.loads(body[:split]), body[split:], {}
        for tensor in head["inputs"]:
            size = tensor.get("parameters", {}).get("binary_data_size", 0)
            inputs[tensor["name"]] = _http_input(tensor, rest[:size])
            rest = rest[size:]
        try:
            outputs = await self.fake(model, inputs, head.get("id", ""))
        except FluxserveError as error:
            status, message = _as_triton(error, model)
            return web.json_response({"error": message}, status=_HTTP[status])
        asked = {output["name"]: output.get("parameters", {}) for output in head.get("outputs", [])}
        return _http_answer(outputs, {name for name in outputs if not asked or asked[name].get("binary_data")})


def _http_input(tensor: Any, raw: bytes) -> Any:
    if "data" not in tensor:
        return _decode(raw, tensor["datatype"]).reshape(tensor["shape"])
    if tensor["datatype"] == "BYTES":
        return strings(*(text.encode() for text in tensor["data"]))
    return np.array(tensor["data"], dtype=triton_to_np_dtype(tensor["datatype"]))


async def _ready(request: web.Request) -> web.Response:
    return web.Response(status=200 if request.match_info.get("model") in (None, "flux", "control") else 400)


def _http_answer(outputs: Tensors, binary: set[str]) -> web.Response:
    described, data = [], b""
    for name, tensor in outputs.items():
        entry = {"name": name, "datatype": np_to_triton_dtype(tensor.dtype), "shape": list(tensor.shape)}
        if name in binary:
            raw = _encode(tensor)
            data += raw
            entry["parameters"] = {"binary_data_size": len(raw)}
        else:
            entry["data"] = [value.decode() if isinstance(value, bytes) else value for value in tensor.tolist()]
        described.append(entry)
    head = json.dumps({"model_name": "flux", "outputs": described}).encode()
    return web.Response(body=head + data, headers={"Inference-Header-Content-Length": str(len(head))})


class _Grpc(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, fake: FakeFlux) -> None:
        self._fake = fake

    async def ServerReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerReadyResponse(ready=True)

    async def ModelReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelReadyResponse(ready=request.name in ("flux", "control"))

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        self._fake.headers.append(dict(context.invocation_metadata()))
        pairs = zip(request.inputs, request.raw_input_contents, strict=True)
        inputs = {tensor.name: _decode(raw, tensor.datatype).reshape(tensor.shape) for tensor, raw in pairs}
        try:
            # shielded as in Triton: a client that hangs up does not stop the step that runs
            outputs = await asyncio.shield(self._fake(request.model_name, inputs, request.id))
        except FluxserveError as error:
            status, message = _as_triton(error, request.model_name)
            await context.abort(grpc.StatusCode[status], message)
        answer = service_pb2.ModelInferResponse(model_name=request.model_name, id=request.id)
        for name, tensor in outputs.items():
            answer.outputs.add(name=name, datatype=np_to_triton_dtype(tensor.dtype), shape=tensor.shape)
            answer.raw_output_contents.append(_encode(tensor))
        return answer
