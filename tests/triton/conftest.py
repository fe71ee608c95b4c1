"""A real Triton with the tiny model, once for all tests of this folder; tests that end servers start their own."""

import io
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from PIL import Image
from tritonclient.utils import InferenceServerException

from fluxserve import contract, settings, source
from fluxserve.families import registry
from fluxserve.pipeline import Pipeline
from fluxserve.supervisor import Ports, TritonServer
from fluxserve.supervisor.installation import bundled
from fluxserve.text import Tokenizers

ROOT = Path(__file__).parents[2]
REPOSITORY = ROOT / "model_repository"

DTYPES = {t.name: t.dtype for model in contract.MODELS.values() for t in (*model.inputs, *model.outputs)}
NUMPY = {
    "BYTES": np.object_,
    "UINT8": np.uint8,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP32": np.float32,
    "FP64": np.float64,
    "BOOL": np.bool_,
}

# A picture that takes several seconds on two cores: long enough to be found running, and cancelled.
LONG = {"height": 512, "width": 512, "num_inference_steps": 100}


READY_S = 120.0


@contextmanager
def serving(repository: Path = REPOSITORY, **options: str) -> Iterator[TritonServer]:
    """A server with these settings, on ports of its own, until the end."""
    with tempfile.TemporaryFile() as log, TritonServer(repository, Ports.free(), bundled(), log, options) as started:
        started.start()
        started.wait_ready(READY_S)
        yield started


@pytest.fixture(scope="session")
def server() -> Iterator[TritonServer]:
    """The shared one. How many may wait does not depend on how busy this machine was when a picture was timed."""
    with serving(max_waiting=str(contract.MAX_WAITING)) as started:
        yield started


LIBRARIES = {"grpc": triton_grpc, "http": triton_http}


def tensors(protocol: str, arrays: Mapping[str, np.ndarray]) -> list[Any]:
    """tritonclient's inputs of a protocol; of the arrays' own dtypes, which need not be the contract's."""
    inputs = []
    for name, array in arrays.items():
        dtype = DTYPES[name] if array.dtype == NUMPY[DTYPES[name]] else _dtype_of(array)
        inputs.append(LIBRARIES[protocol].InferInput(name, list(array.shape), dtype))
        inputs[-1].set_data_from_numpy(array)
    return inputs


@dataclass(frozen=True)
class PlainClient:
    """tritonclient as it is, of one protocol: what any user has."""

    protocol: str
    url: str

    def call(
        self, model: str, fields: dict[str, object], request_id: str = "", **options: object
    ) -> dict[str, np.ndarray]:
        """Send the fields, one element each; answer all outputs. Values that are arrays go as they are."""
        library = LIBRARIES[self.protocol]
        inputs = tensors(
            self.protocol, {n: v if isinstance(v, np.ndarray) else self._array(n, v) for n, v in fields.items()}
        )
        with library.InferenceServerClient(self.url) as client:
            result = client.infer(model, inputs, request_id=request_id, **options)
            answer = result.get_response(as_json=True) if self.protocol == "grpc" else result.get_response()
            return {o["name"]: result.as_numpy(o["name"]) for o in answer["outputs"]}

    @staticmethod
    def _array(name: str, value: object) -> np.ndarray:
        if isinstance(value, str):
            value = value.encode()
        return np.array([value], dtype=NUMPY[DTYPES[name]])

    def draw(
        self, prompt: str | bytes = "a red apple", request_id: str = "", **fields: object
    ) -> dict[str, np.ndarray]:
        return self.call("flux", {"prompt": prompt, **fields}, request_id)

    def control(self, request_id: str, action: str) -> tuple[str, int, int]:
        out = self.call("control", {"request_id": request_id, "action": action})
        return out["state"][0].decode(), int(out["step"][0]), int(out["steps"][0])

    def refused(self, run: Callable[[], object]) -> tuple[str, str]:
        """Status and message of a call that must be refused; the status as gRPC names it, over both protocols."""
        with pytest.raises(InferenceServerException) as caught:
            run()
        return status_of(caught.value), caught.value.message()


PATIENCE = 20.0


def wait_for(what: Callable[[], bool], patience: float = PATIENCE) -> float:
    """Seconds until it holds."""
    begin = time.monotonic()
    while not what():
        assert time.monotonic() - begin < patience, "it never came"
        time.sleep(0.01)
    return time.monotonic() - begin


@contextmanager
def running(
    client: PlainClient, request_id: str, steps: int = 2, **fields: object
) -> Iterator["Future[tuple[str, str]]"]:
    """A long request that has done some steps, and that ends in an error."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(client.refused, lambda: client.draw(request_id=request_id, **LONG, **fields))
        wait_for(lambda: client.control(request_id, "status")[1] >= steps)
        yield future


def code_of(answer: tuple[str, str]) -> str:
    """gRPC has the code; over HTTP the message begins with it."""
    status, message = answer
    return message.split("[", 1)[1].split("]")[0] if status == "INVALID_ARGUMENT" and "[" in message else status


HTTP_STATUS = {
    "400": "INVALID_ARGUMENT",
    "409": "ALREADY_EXISTS",
    "499": "CANCELLED",
    "503": "UNAVAILABLE",
    "404": "NOT_FOUND",
}


def status_of(error: InferenceServerException) -> str:
    raw = str(error.status()).removeprefix("StatusCode.")
    return HTTP_STATUS.get(raw, raw)


def _dtype_of(array: np.ndarray) -> str:
    return next(name for name, kind in NUMPY.items() if array.dtype == kind)


def plain(server: TritonServer, protocol: str) -> PlainClient:
    return PlainClient(protocol, server.grpc_url if protocol == "grpc" else server.http_url)


@pytest.fixture(params=["grpc", "http"])
def client(request: pytest.FixtureRequest, server: TritonServer) -> PlainClient:
    return plain(server, request.param)


def counters(server: TritonServer) -> dict[str, float]:
    """Our own metrics, by name and labels as the metrics port writes them."""
    text = urllib.request.urlopen(server.metrics_url, timeout=5).read().decode()
    lines = (line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("fluxserve_"))
    return {name: float(value) for name, value in lines}


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def drawn_by(chosen: dict[str, str], fields: dict[str, object]) -> np.ndarray:
    """The picture that the pipeline draws in this process."""
    found = source.find(settings.load({name: {"string_value": value} for name, value in chosen.items()}))
    pipeline = Pipeline(found.spec, found.open_components("cpu", "float32"))
    given = {name: value.encode() if isinstance(value, str) else value for name, value in fields.items()}
    (drawing,) = pipeline.draw([registry.plan(given, found.spec, Tokenizers(found.checkpoint))])
    assert drawing is not None
    return drawing.images[0]
