"""TensorRT and TensorRT-RTX: runs an artifact's serialized engines, each bound shape as a captured CUDA graph.

A model's engines share one scratch buffer: their contexts never run together, because one stream runs them all. A
captured graph pins every address in it, so the buffer is as large as the hungriest engine needs from the start, and a
bound's tensors never move. Capture follows the library's rules: a stream that is not the default one, one execution
and a synchronisation after the shapes are set, one context for each graph. `run` replays the graph on the stream that
is current then, which need not be the one that it was captured on.

TensorRT-RTX compiles kernels for each shape when a context first meets it; they are kept in a cache folder, from one
start of the server to the next.
"""

import logging
import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxserve.engine import FLOATING, Components, Dim, Shapes, Signature, TensorSpec
from fluxserve.engines import tensorrt_library
from fluxserve.engines.tensorrt_library import Library
from fluxserve.errors import ArtifactError, ArtifactUnsuited, LibraryRefused
from fluxserve.folders.artifact import Artifact
from fluxserve.kernels.jit import disk_cache

log = logging.getLogger(__name__)

_CACHE = "tensorrt-rtx"
"""The cache's subfolder of TensorRT-RTX's compiled kernels, a file for each engine."""

_PROFILE = 0  # a plan has one optimisation profile: the artifact's shapes
_ALIGNMENT = 256  # bytes; what set_device_memory asks for

_TORCH_NAMES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64", "INT32": "int32"}


class Cuda:
    """What this engine needs of CUDA on one device; tests on a CPU put something else in its place."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        try:
            major, minor = torch.cuda.get_device_capability(self._device)
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        except (RuntimeError, AssertionError) as error:  # no driver; a torch that was built without CUDA
            raise LibraryRefused(f"{device}: no CUDA device: {error}") from error
        self.architecture = f"sm{major}{minor}"
        """As manifests spell it: "sm89"."""

    @property
    def stream(self) -> int:
        """The handle of a stream that is not the default one."""
        return int(self._stream.cuda_stream)

    def active(self) -> AbstractContextManager[object]:
        """This device is the current one, which is where the library works, meanwhile."""
        return torch.cuda.device(self._device)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self._device)

    def synchronize(self) -> None:
        """Wait for all streams of the device."""
        torch.cuda.synchronize(self._device)

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """Record what `enqueue` puts on `stream`; the result replays it on the stream that is current then.

        Raises:
            LibraryRefused: CUDA could not record it.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(self._stream):
                graph.capture_begin(capture_error_mode="thread_local")  # other threads of a server may use CUDA
                try:
                    enqueue()
                finally:
                    graph.capture_end()
        except RuntimeError as error:  # what `enqueue` raised comes first: CUDA only says that the capture is invalid
            raise LibraryRefused(f"CUDA graph: {error.__context__ or error}") from error

        def replay() -> None:
            with torch.cuda.device(self._device):
                graph.replay()

        return replay


class Scratch:
    """Working memory that every context of a model uses in its turn. Its address never changes: graphs have it."""

    def __init__(self, cuda: Cuda, size: int) -> None:
        self.size = max(size, _ALIGNMENT)
        self._memory = cuda.zeros((self.size + _ALIGNMENT,), torch.uint8)
        self.address = -(-self._memory.data_ptr() // _ALIGNMENT) * _ALIGNMENT


class RuntimeCache:
    """TensorRT-RTX's compiled kernels of one engine, in a file. What can't be read or written costs time, no more."""

    def __init__(self, library: Library, config: Any, file: Path) -> None:
        self._library, self._file = library, file
        self._cache = config.create_runtime_cache()
        try:
            blob = file.read_bytes()
        except FileNotFoundError:
            blob = b""
        except OSError as error:
            log.warning("%s: unreadable (%s); kernels are compiled again", file, error)
            blob = b""
        if blob and not self._cache.deserialize(blob):
            log.warning("%s: refused (%s); kernels are compiled again", file, library.words())
        if not config.set_runtime_cache(self._cache):
            raise LibraryRefused(f"{library}: no runtime cache: {library.words()}")

    def save(self) -> None:
        """Write the file; another process that has it open keeps reading the old one."""
        blob = self._cache.serialize()
        if blob is None:
            log.warning("%s: not written (%s)", self._file, self._library.words())
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._file.parent)
            with os.fdopen(handle, "wb") as f:
                f.write(blob)
            Path(name).replace(self._file)
        except OSError as error:
            log.warning("%s: not written (%s)", self._file, error)


class TensorRTEngine:
    """A deserialised plan; every bound has a context, tensors and a graph of its own.

    Args:
        plan: the library's ICudaEngine, already checked against the signature.
        cache_file: where compiled kernels are kept; TensorRT-RTX only.
    """

    def __init__(
        self,
        library: Library,
        plan: Any,
        signature: Signature,
        compute_dtype: str,
        cuda: Cuda,
        scratch: Scratch,
        cache_file: Path,
    ) -> None:
        self.signature = signature
        self._library, self._cuda, self._scratch, self._compute_dtype = library, cuda, scratch, compute_dtype
        self._plan: Any = plan
        self._config = plan.create_runtime_config()
        strategy = library.module.ExecutionContextAllocationStrategy.USER_MANAGED
        self._config.set_execution_context_allocation_strategy(strategy)
        self._cache: RuntimeCache | None = None
        if library.is_rtx:
            self._prepare_rtx(cache_file)

    def _prepare_rtx(self, cache_file: Path) -> None:
        """Kernels for a bound's shape are compiled at once, since a graph would keep the general ones for ever."""
        module = self._library.module
        kernels = module.DynamicShapesKernelSpecializationStrategy.EAGER
        self._config.dynamic_shapes_kernel_specialization_strategy = kernels
        self._config.cuda_graph_strategy = module.CudaGraphStrategy.DISABLED  # the graphs are ours
        self._cache = RuntimeCache(self._library, self._config, cache_file)

    def bind(self, shapes: Shapes) -> "TensorRTBound":
        assert self._plan is not None, "bind after close"
        sizes = self.signature.resolve(shapes)
        self._library.listen()

        def allocate(tensors: tuple[TensorSpec, ...]) -> dict[str, Tensor]:
            return {
                t.name: self._cuda.zeros(sizes[t.name], getattr(torch, _dtype(t, self._compute_dtype))) for t in tensors
            }

        with self._cuda.active():
            inputs, outputs = allocate(self.signature.inputs), allocate(self.signature.outputs)
            context = self._context(inputs, outputs)
            return TensorRTBound(inputs, outputs, context, self._graph(context), self._cuda)

    def close(self) -> None:
        if self._cache is not None:
            self._cache.save()
        self._cache = self._config = self._plan = None

    def _context(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Any:
        """A context with its shapes, addresses and scratch memory set."""
        context = self._plan.create_execution_context(self._config)
        if context is None:
            raise LibraryRefused(f"{self._library}: no execution context: {self._library.words()}")
        assert context.active_optimization_profile == _PROFILE, "a new context starts with profile 0"
        context.set_device_memory(self._scratch.address, self._scratch.size)
        known = _tensors(self._plan)
        used = {name: t for name, t in inputs.items() if name in known}  # a model without guidance has no such input
        for name, tensor in used.items():
            if not context.set_input_shape(name, tuple(tensor.shape)):
                raise LibraryRefused(f"{self._library}: {name} {tuple(tensor.shape)}: {self._library.words()}")
        for name, tensor in outputs.items():
            got = tuple(context.get_tensor_shape(name))
            if got != tuple(tensor.shape):
                raise ArtifactError(f"{name}: the engine gives {got}; expected {tuple(tensor.shape)}")
        for name, tensor in (*used.items(), *outputs.items()):
            if not context.set_tensor_address(name, tensor.data_ptr()):
                raise LibraryRefused(f"{self._library}: {name}: address refused: {self._library.words()}")
        return context

    def _graph(self, context: Any) -> Callable[[], None]:
        """Warm up and capture. Device-wide waits: no other graph may be in the scratch memory meanwhile."""
        stream = self._cuda.stream

        def enqueue() -> None:
            if not context.execute_async_v3(stream):
                raise LibraryRefused(f"{self._library}: {self._library.words()}")

        self._cuda.synchronize()
        enqueue()
        self._cuda.synchronize()
        if self._library.is_rtx and not context.is_stream_capturable(stream):
            raise LibraryRefused(f"{self._library}: it can't be captured as a CUDA graph: {self._library.words()}")
        return self._cuda.capture(enqueue)


class TensorRTBound:
    """A graph over fixed addresses, and the context that owns what it uses."""

    def __init__(
        self,
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
        context: Any,
        replay: Callable[[], None],
        cuda: Cuda,
    ) -> None:
        self.inputs, self.outputs, self._context, self._replay = inputs, outputs, context, replay
        weakref.finalize(self, cuda.synchronize)  # before they are let go of: neither may be destroyed while it runs

    def run(self) -> None:
        """Enqueue one pass on the current stream, whichever that is; wait for nothing."""
        self._replay()


def check_artifact(artifact: Artifact, device: str) -> None:
    """Check the device, its architecture, the library and its version; see engines.open."""
    _suited(artifact, device)


def _suited(artifact: Artifact, device: str) -> tuple[Cuda, Library]:
    """Return the device and the library that an artifact was built for. Raises ArtifactUnsuited, EngineError."""
    if torch.device(device).type != "cuda":
        raise ArtifactUnsuited(f"{artifact.path}: {artifact.engine} runs it on a GPU; got the device {device}")
    cuda = Cuda(device)
    _check_architecture(artifact, cuda.architecture)
    library = tensorrt_library.load(artifact.engine)
    _check_version(artifact, library)
    return cuda, library


def open_artifact(artifact: Artifact, device: str, cache_folder: Path | None = None) -> Components:
    """Load all five components; see engines.open.open_artifact.

    Args:
        cache_folder: where TensorRT-RTX keeps what it compiles, made when it is first written to; None: the cache.
    """
    cuda, library = _suited(artifact, device)
    opened = []
    with cuda.active():
        runtime = library.runtime()
        for name in artifact.spec.components:
            component = artifact.component(name)
            file = component.engines[cuda.architecture]
            plan = deserialise(library, runtime, artifact.file(file))
            signature = component.signature(artifact.spec)
            check_plan(library, plan, signature, component.compute_dtype, artifact.path / file)
            cache_file = (cache_folder or disk_cache.folder(_CACHE)) / artifact.manifest["files"][file]["sha256"]
            opened.append((component, plan, signature, cache_file))
        scratch = Scratch(cuda, max(plan.device_memory_size_v2 for _, plan, _, _ in opened))
        engines = {
            component.name: TensorRTEngine(library, plan, signature, component.compute_dtype, cuda, scratch, cache_file)
            for component, plan, signature, cache_file in opened
        }
    return Components(engines)


def deserialise(library: Library, runtime: Any, file: Path) -> Any:
    """A plan's file → an ICudaEngine on the current device. Raises LibraryRefused with the library's words."""
    library.listen()
    with file.open("rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise LibraryRefused(f"{file}: {library} can't load it: {library.words()}")
    return engine


def _check_architecture(artifact: Artifact, got: str) -> None:
    for component in map(artifact.component, artifact.spec.components):
        if got not in component.engines:
            raise ArtifactUnsuited(
                f"{artifact.path}: this GPU is {got}; {component.name} was built for {', '.join(component.engines)}"
            )


def _check_version(artifact: Artifact, library: Library) -> None:
    built = artifact.versions.get(library.flavour)
    if built is None:
        raise ArtifactUnsuited(f"{artifact.path}: the manifest does not say which {library.flavour} built it")
    if tensorrt_library.release(built) != library.release:
        raise ArtifactUnsuited(
            f"{artifact.path}: got {library}; built by {library.flavour} {built}, whose plans need"
            f" {tensorrt_library.release(built)}.x"
        )


def check_plan(library: Library, plan: Any, signature: Signature, compute_dtype: str, file: Path) -> None:
    """Compare a plan's tensors with the signature. Raises ArtifactError, which names the tensor."""
    if plan.num_optimization_profiles != 1:
        raise ArtifactError(f"{file}: {plan.num_optimization_profiles} optimisation profiles; expected one")
    mode, known = library.module.TensorIOMode, _tensors(plan)
    unknown = known.keys() - {t.name for t in (*signature.inputs, *signature.outputs)}
    if unknown:
        raise ArtifactError(f"{file}: {', '.join(sorted(unknown))}: the engine has it; {_names(signature)} expected")
    for tensors, expected in ((signature.inputs, mode.INPUT), (signature.outputs, mode.OUTPUT)):
        for tensor in tensors:
            if tensor.name not in known:
                if expected == mode.OUTPUT:
                    raise ArtifactError(f"{file}: {tensor}: the engine has no such output")
                continue
            if known[tensor.name] != expected:
                raise ArtifactError(f"{file}: {tensor}: {known[tensor.name].name}; expected {expected.name}")
            _check_tensor(plan, tensor, compute_dtype, file)
    for tensor in signature.inputs:
        if tensor.name in known:
            _check_profile(plan, tensor, file)


def _names(signature: Signature) -> str:
    return ", ".join(t.name for t in (*signature.inputs, *signature.outputs))


def _check_tensor(plan: Any, tensor: TensorSpec, compute_dtype: str, file: Path) -> None:
    """Its dtype, and the dimensions that are fixed."""
    got = str(plan.get_tensor_dtype(tensor.name).name)
    if _TORCH_NAMES.get(got) != _dtype(tensor, compute_dtype):
        raise ArtifactError(f"{file}: {tensor}: dtype {got}; expected {_dtype(tensor, compute_dtype)}")
    shape = tuple(plan.get_tensor_shape(tensor.name))
    if len(shape) != len(tensor.dims) or any(
        isinstance(dim, int) and size not in (dim, -1) for size, dim in zip(shape, tensor.dims, strict=True)
    ):
        raise ArtifactError(f"{file}: {tensor}: the engine has {shape}")


def _check_profile(plan: Any, tensor: TensorSpec, file: Path) -> None:
    """The profile holds everything that the signature lets through."""
    least, _, most = (tuple(shape) for shape in plan.get_tensor_profile_shape(tensor.name, _PROFILE))
    for low, high, dim in zip(least, most, tensor.dims, strict=True):
        want = (dim.size(dim.least), dim.size(dim.most)) if isinstance(dim, Dim) else (dim, dim)
        if low > want[0] or high < want[1]:
            raise ArtifactError(
                f"{file}: {tensor}: built for {low} to {high}; the manifest says {dim} from {want[0]} to {want[1]}"
            )


def _tensors(plan: Any) -> dict[str, Any]:
    """Name → whether it is an input or an output."""
    names: Iterable[str] = map(plan.get_tensor_name, range(plan.num_io_tensors))
    return {name: plan.get_tensor_mode(name) for name in names}


def _dtype(tensor: TensorSpec, compute_dtype: str) -> str:
    return compute_dtype if tensor.dtype == FLOATING else tensor.dtype
