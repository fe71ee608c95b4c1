"""A small honest stand-in for triton_python_backend_utils, and what is expected of it.

Honest: the names, signatures and refusals are those of the real module as far as fluxserve uses it, and nothing more;
a call that it does not know is an error here too. The unit tests of serving/ run the real models against it.
"""

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest

import fluxserve.serving

MODULES = ("shared_memory", "tensors", "errors", "metrics", "lifecycle", "prepare", "previews", "generate", "control")


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        if array.dtype == np.object_:
            assert all(isinstance(x, bytes) for x in array.reshape(-1)), f"{name}: BYTES must be bytes"
        assert array.dtype.kind in "Oiufb" and array.flags.c_contiguous, f"{name}: Triton copies the buffer as it lies"
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


FINAL = 1


class ResponseSender:
    """Each request is answered once, and then ended."""

    def __init__(self) -> None:
        self.response: InferenceResponse | None = None
        self.ended = False

    def send(self, response: "InferenceResponse | None" = None, flags: int = 0) -> None:
        assert not self.ended, "answered after the end"
        if response is None:
            assert flags == FINAL, "neither a response nor the end"
        else:
            assert self.response is None, "answered twice"
            self.response = response
        self.ended = flags == FINAL


class InferenceRequest:
    """`cancelled_after`: how often `is_cancelled` says no before the caller hangs up."""

    def __init__(self, inputs: Mapping[str, Any], request_id: str = "", cancelled_after: int | None = None) -> None:
        self._inputs = {name: Tensor(name, np.ascontiguousarray(value)) for name, value in inputs.items()}
        self._id, self._left, self._sender = request_id, cancelled_after, ResponseSender()

    def inputs(self) -> list[Tensor]:
        return list(self._inputs.values())

    def request_id(self) -> str:
        return self._id

    def get_response_sender(self) -> ResponseSender:
        return self._sender

    def is_cancelled(self) -> bool:
        if self._left is None:
            return False
        self._left -= 1
        return self._left < 0


class TritonError:
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        self._tensors, self._error = output_tensors or [], error

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors


class Metric:
    def __init__(self, labels: Mapping[str, str], kind: int, buckets: list[float] | None) -> None:
        self.labels, self.kind, self.buckets, self.total, self.seen = dict(labels), kind, buckets, 0.0, list[float]()

    def increment(self, value: float) -> None:
        assert self.kind == MetricFamily.COUNTER
        assert value >= 0, "a counter never falls"
        self.total += value

    def set(self, value: float) -> None:
        assert self.kind == MetricFamily.GAUGE
        self.total = value

    def observe(self, value: float) -> None:
        assert self.kind == MetricFamily.HISTOGRAM
        self.seen.append(value)


class MetricFamily:
    COUNTER, GAUGE, HISTOGRAM = range(3)
    known: ClassVar[dict[str, "MetricFamily"]] = {}

    def __init__(self, name: str, description: str, kind: int) -> None:
        assert name not in self.known, f"{name}: Triton refuses a family that exists with another description"
        self.kind, self.metrics = kind, list[Metric]()
        self.known[name] = self

    def Metric(self, labels: Mapping[str, str], buckets: list[float] | None = None) -> Metric:
        assert (buckets is not None) == (self.kind == self.HISTOGRAM)
        self.metrics.append(Metric(labels, self.kind, buckets))
        return self.metrics[-1]


class SharedMemory:
    @staticmethod
    def free_memory() -> int:
        return 2**20


class Logger:
    lines: ClassVar[list[str]] = []

    @classmethod
    def log_error(cls, message: str) -> None:
        cls.lines.append(message)


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return next((t for t in request.inputs() if t.name() == name), None)


@contextmanager
def installed() -> Iterator[dict[str, ModuleType]]:
    """serving/'s modules, imported against the fake; neither they nor it stay behind."""
    fake = ModuleType("triton_python_backend_utils")
    for thing in (Tensor, InferenceRequest, InferenceResponse, TritonError, MetricFamily, Logger):
        setattr(fake, thing.__name__, thing)
    fake.TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL  # type: ignore[attr-defined]
    fake.get_input_tensor_by_name = get_input_tensor_by_name  # type: ignore[attr-defined]
    MetricFamily.known.clear()
    Logger.lines.clear()
    stub = ModuleType("c_python_backend_utils")
    stub.shared_memory = SharedMemory  # type: ignore[attr-defined]
    sys.modules.update({fake.__name__: fake, stub.__name__: stub})
    try:
        yield {name: importlib.import_module(f"fluxserve.serving.{name}") for name in MODULES}
    finally:
        del sys.modules[fake.__name__], sys.modules[stub.__name__]
        for name in MODULES:
            sys.modules.pop(f"fluxserve.serving.{name}", None)
            vars(fluxserve.serving).pop(name, None)


def queue_policy(seconds: float) -> dict[str, Any]:
    """A part of a model's configuration, as Triton hands it on: how long a request may wait."""
    microseconds = str(round(1e6 * seconds))
    return {"dynamic_batching": {"default_queue_policy": {"default_timeout_microseconds": microseconds}}}


def answers(model: Any, requests: list[InferenceRequest]) -> list[InferenceResponse]:
    """What `generate` answered: every request, once; its one writer has counted them too."""
    assert model.execute(requests) is None, "Triton would answer a second time"
    model._writers.submit(lambda: None).result()
    responses = [request.get_response_sender().response for request in requests]
    assert None not in responses, "a request was left without an answer"
    assert all(request.get_response_sender().ended for request in requests), "a client would wait for the end"
    return responses  # type: ignore[return-value]


def prepared(model: Any, requests: list[InferenceRequest]) -> list[InferenceResponse]:
    """What `prepare` answered: at once, or through the senders once its one decoder has seen the images."""
    returned = model.execute(requests)
    model._decoder._thread.submit(lambda: None).result()
    sent = [request.get_response_sender().response for request in requests]
    if returned is None:
        assert None not in sent, "a request was left without an answer"
        assert all(request.get_response_sender().ended for request in requests), "a client would wait for the end"
        return sent  # type: ignore[return-value]
    assert sent == [None] * len(requests), "answered twice"
    return list(returned)


def counted(name: str, **labels: str) -> float:
    """A counter's value, or the sum of what a histogram saw."""
    (metric,) = (m for m in MetricFamily.known[name].metrics if m.labels == labels)
    return sum(metric.seen) if metric.buckets else metric.total


def outputs(response: InferenceResponse) -> dict[str, np.ndarray]:
    assert not response.has_error(), response.error().message()  # type: ignore[union-attr]
    return {t.name(): t.as_numpy() for t in response.output_tensors()}


def error_of(response: InferenceResponse) -> tuple[str, str]:
    """The code's name and the message of a response that must be an error."""
    error = response.error()
    assert error is not None, "it was answered"
    assert not response.output_tensors()
    (name,) = (n for n, v in vars(TritonError).items() if v == error.code() and n.isupper())
    return name, error.message()


def test_nothing_stays_behind() -> None:
    with installed() as first:
        assert first["tensors"].pb_utils.Tensor is Tensor
    assert "triton_python_backend_utils" not in sys.modules
    assert "fluxserve.serving.tensors" not in sys.modules
    with installed() as second:
        assert second["tensors"] is not first["tensors"]


def test_the_stand_in_is_strict() -> None:
    with pytest.raises(AssertionError, match="must be bytes"):
        Tensor("prompt", np.array(["text"], dtype=object))
    with pytest.raises(AssertionError, match="as it lies"):
        Tensor("pixels", np.zeros((4, 4), np.uint8).T[1:])
    with installed(), pytest.raises(AssertionError, match="never falls"):
        MetricFamily("a", "", MetricFamily.COUNTER).Metric(labels={}).increment(-1)
