"""A TensorRT without a GPU: as much of the API as fluxserve uses, as it is in each version, and a record of the calls.

`make("tensorrt-10.13.3.9")` is a module to put in place of `tensorrt` (or of `tensorrt_rtx`). Names that a version
lacks are missing from its module, and attributes that a class lacks can't be set: trt_api.json, read off the real
bindings, says which. Plans are JSON. Executing one is arithmetic on tensors that are looked up by their address, so
that a wrong address, shape or stream is noticed; on CUDA tensors it enqueues on the stream that it is given, so that
it can be captured. The parser makes the layers that the real one makes of the few operations it knows.
"""

import enum
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fluxserve.engine import FLOATING, Dim, Signature, TensorSpec

API: dict[str, dict[str, list[str]]] = json.loads(Path(__file__).with_name("trt_api.json").read_text(encoding="utf-8"))
VERSIONS = tuple(API)
RTX = "tensorrt_rtx-1.7.1"
SCRATCH = 1000
_MAGIC = b"FAKEPLAN"
_DTYPES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64"}

MEMORY: dict[int, Tensor] = {}
"""Every tensor that was allocated through `allocate`, by its address."""


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> Tensor:
    tensor = torch.zeros(shape, dtype=dtype, device=device)
    MEMORY[tensor.data_ptr()] = tensor
    return tensor


class Trace:
    """What was called, in order, and whether a graph is being captured on the host."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.capturing = False

    def __call__(self, *call: Any) -> None:
        self.calls.append(call)

    def named(self, *names: str) -> list[tuple[Any, ...]]:
        return [call for call in self.calls if call[0] in names]


class HostCuda:
    """In place of engines.tensorrt.Cuda, on a CPU: a capture runs nothing, and a replay runs what was captured."""

    def __init__(self, trace: Trace, architecture: str = "sm90") -> None:
        self.trace, self.architecture, self.stream = trace, architecture, 7

    def active(self) -> AbstractContextManager[object]:
        return nullcontext()

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return allocate(shape, dtype)

    def synchronize(self) -> None:
        self.trace("synchronize")

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        self.trace("capture")
        self.trace.capturing = True
        enqueue()
        self.trace.capturing = False
        return enqueue


def plan_of(
    module: ModuleType, signature: Signature, compute_dtype: str, architecture: str = "sm90", **changes: Any
) -> bytes:
    """A plan with a signature's tensors; `changes` replaces top-level entries, `without` drops tensors."""
    dropped = changes.pop("without", ())

    def entry(tensor: TensorSpec) -> dict[str, Any]:
        dtype = _DTYPES[compute_dtype if tensor.dtype == FLOATING else tensor.dtype]
        low, high = ([d if isinstance(d, int) else d.size(getattr(d, k)) for d in tensor.dims] for k in _ENDS)
        dims = [d if isinstance(d, int) else _source(d, signature) for d in tensor.dims]
        return {"dtype": dtype, "min": low, "max": high, "dims": dims}

    plan = {
        "version": module.__version__,
        "architecture": architecture,
        "profiles": 1,
        "scratch": SCRATCH,
        "inputs": {t.name: entry(t) for t in signature.inputs if t.name not in dropped},
        "outputs": {t.name: entry(t) for t in signature.outputs if t.name not in dropped},
        **changes,
    }
    return _MAGIC + json.dumps(plan).encode()


_ENDS = ("least", "most")


def _source(dim: Dim, signature: Signature) -> list[Any]:
    """Return which input's axis a dimension follows: [input, axis, multiple, offset, and both of that axis]."""
    return next(
        [t.name, axis, dim.multiple, dim.offset, d.multiple, d.offset]
        for t in signature.inputs
        for axis, d in enumerate(t.dims)
        if isinstance(d, Dim) and d.symbol == dim.symbol
    )


class _Fake:
    """A class of the module: only attributes of the real one can be set."""

    trt: Any

    def __setattr__(self, name: str, value: Any) -> None:
        own = type(self).__name__
        if not name.startswith("_") and type(self) is getattr(self.trt, own, None) and name not in self.trt.api[own]:
            raise AttributeError(f"{own} of {self.trt.key} has no {name}")
        super().__setattr__(name, value)


class ILogger(_Fake):
    def log(self, severity: Any, message: str) -> None:
        raise NotImplementedError


class Runtime(_Fake):
    def __init__(self, logger: ILogger) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, blob: Any) -> Any:
        data = bytes(blob)
        self.trt.trace("deserialize", len(data))
        try:
            if not data.startswith(_MAGIC):
                raise ValueError("magic tag")
            plan = json.loads(data[len(_MAGIC) :])
        except ValueError as error:
            self.logger.log(self.trt.Severity.ERROR, f"Serialization assertion failed: {error}")
            return None
        return self.trt.ICudaEngine(plan, self.logger)


class ICudaEngine(_Fake):
    def __init__(self, plan: dict[str, Any], logger: ILogger) -> None:
        self._plan, self._logger = plan, logger
        self._tensors = {**plan["inputs"], **plan["outputs"]}

    @property
    def device_memory_size_v2(self) -> int:
        return int(self._plan["scratch"])

    @property
    def num_optimization_profiles(self) -> int:
        return int(self._plan["profiles"])

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return self.trt.TensorIOMode.INPUT if name in self._plan["inputs"] else self.trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return self.trt.DataType[self._tensors[name]["dtype"]]

    def get_tensor_shape(self, name: str) -> Sequence[int]:
        entry = self._tensors[name]
        return [-1 if isinstance(dim, list) else dim for dim in entry["dims"]]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Sequence[int]]:
        assert profile_index < self._plan["profiles"]
        entry = self._plan["inputs"][name]
        return [entry["min"], entry["min"], entry["max"]]

    def create_runtime_config(self) -> Any:
        return self.trt.IRuntimeConfig()

    def create_execution_context(self, config: Any) -> Any:
        self.trt.trace("context", config._strategy.name)
        return self.trt.IExecutionContext(self, config)


class IRuntimeConfig(_Fake):
    cuda_graph_strategy: Any = None
    dynamic_shapes_kernel_specialization_strategy: Any = None
    _strategy: Any = None
    _cache: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self._strategy = strategy

    def create_runtime_cache(self) -> Any:
        return self.trt.IRuntimeCache()

    def set_runtime_cache(self, cache: Any) -> bool:
        self._cache = cache
        return True


class IRuntimeCache(_Fake):
    """Grows by one letter for each context that compiles."""

    _kernels = b"cache:"

    def deserialize(self, blob: bytes) -> bool:
        self.trt.trace("cache read", blob)
        if blob.startswith(b"cache:"):
            self._kernels = blob
        return blob.startswith(b"cache:")

    def serialize(self) -> bytes:
        return self._kernels


class IExecutionContext(_Fake):
    def __init__(self, engine: ICudaEngine, config: IRuntimeConfig) -> None:
        self._engine, self._config = engine, config
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._warm, self._scratch = False, (0, 0)

    active_optimization_profile = 0

    def set_device_memory(self, address: int, size: int) -> None:
        self.trt.trace("scratch", address, size)
        self._scratch = (address, size)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        entry = self._engine._plan["inputs"][name]
        self._shapes[name], self._warm = shape, False
        return all(low <= size <= high for low, size, high in zip(entry["min"], shape, entry["max"], strict=True))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._shapes:
            return self._shapes[name]

        def size(dim: Any) -> int:
            if isinstance(dim, int):
                return dim
            source, axis, multiple, offset, of_source, offset_of_source = dim
            return int((self._shapes[source][axis] - offset_of_source) // of_source * multiple + offset)

        return tuple(size(dim) for dim in self._engine._plan["outputs"][name]["dims"])

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return address in MEMORY

    def is_stream_capturable(self, stream: int) -> bool:
        return self._warm and not self._engine._plan.get("allocates")

    def execute_async_v3(self, stream: int) -> bool:
        plan = self._engine._plan
        self.trt.trace("execute", id(self), stream)
        assert stream != 0, "the default stream"
        assert self._scratch[0] % 256 == 0 and self._scratch[1] >= plan["scratch"]
        if "fails" in plan:
            self._engine._logger.log(self.trt.Severity.ERROR, plan["fails"])
            return False
        if self._config._cache and not self._warm:
            self._config._cache._kernels += b"k"
        if self.trt.trace.capturing:
            assert self._warm, "captured before it had run once"
            return True
        self._warm = True
        tensors = {name: self._tensor(name) for name in self._engine._tensors}
        on_gpu = next(iter(tensors.values())).is_cuda
        with torch.cuda.stream(torch.cuda.ExternalStream(stream)) if on_gpu else nullcontext():
            total = expected({name: tensors[name] for name in plan["inputs"]})
            for index, name in enumerate(plan["outputs"]):
                tensors[name].copy_((total + index).expand(tensors[name].shape))
        return True

    def _tensor(self, name: str) -> Tensor:
        tensor = MEMORY[self._addresses[name]]
        assert tuple(tensor.shape) == tuple(self.get_tensor_shape(name)), name
        assert _DTYPES[str(tensor.dtype).removeprefix("torch.")] == self._engine._tensors[name]["dtype"], name
        return tensor


def expected(inputs: Mapping[str, Tensor]) -> Tensor:
    """What a fake plan computes of the inputs it has, in their order: its i-th output is this + i, everywhere."""
    return torch.stack([(index + 1) * t.double().mean() for index, t in enumerate(inputs.values())]).sum()


def make(key: str, version: str = "") -> Any:
    """A module that has what version `key` of trt_api.json has; `trace` is its record of calls."""
    from tests.support import fake_tensorrt_builder  # it builds upon this module

    module: Any = ModuleType(key.split("-")[0])
    module.key, module.api, module.trace = key, API[key], Trace()
    module.__version__ = version or {RTX: "1.7.1.116"}.get(key, key.split("-")[1])
    module.Severity = enum.IntEnum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"], start=0)
    for name in ENUMS & module.api.keys():
        members = [m for m in module.api[name] if m not in ("name", "value", "itemsize") and not m.startswith("__")]
        setattr(module, name, enum.IntEnum(name, members, start=0))
    for fake in (*classes(globals()), *classes(vars(fake_tensorrt_builder))):
        name = fake.__name__
        if name in module.api:
            missing = {m: _Missing(key, name, m) for m in public(fake) if m not in module.api[name]}
            setattr(module, name, type(name, (fake,), {"trt": module, **missing}))
    return module


ENUMS = {
    "BuilderFlag", "ComputeCapability", "CudaGraphStrategy", "DataType", "DynamicShapesKernelSpecializationStrategy",
    "ElementWiseOperation", "ExecutionContextAllocationStrategy", "LayerType",
    "NetworkDefinitionCreationFlag", "ProfilingVerbosity", "TensorIOMode",
}  # fmt: skip


class _Missing:
    """A member that this version lacks."""

    def __init__(self, key: str, owner: str, name: str) -> None:
        self._message = f"{owner} of {key} has no {name}"

    def __get__(self, instance: object, owner: type) -> None:
        raise AttributeError(self._message)


def classes(namespace: Mapping[str, Any]) -> Iterator[type[_Fake]]:
    for name, value in namespace.items():
        if not name.startswith("_") and isinstance(value, type) and value.__module__ == namespace["__name__"]:
            yield from (value,) if issubclass(value, _Fake) else ()


def public(fake: type) -> list[str]:
    return [name for name in dir(fake) if not name.startswith("_") and name != "trt"]
