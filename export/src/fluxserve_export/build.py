"""An ONNX file → a serialized engine for one GPU architecture, with TensorRT or TensorRT-RTX.

Networks are strongly typed: every tensor keeps the type that the ONNX file gives it, and what is quantised there (E4M3,
between QuantizeLinear and DequantizeLinear) is what is computed in FP8. TensorRT-RTX builds ahead of time for any
architecture it knows, without a GPU; TensorRT times its kernels, so it builds on the GPU that will run them.

FP8 attention: q, k and v come from DequantizeLinear; the softmax's scale is already in q and k, because the fused
kernel wants nothing between them and itself. The parser multiplies by the node's scale all the same: that layer is
taken out (its factor must be 1), and the softmax's output is quantised to E4M3 by 1/448, which ONNX can't say. The
fusion may not fall apart into single operations unnoticed: such an attention is marked as one that can't be decomposed,
which turns a fusion that fails into a build that fails.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fluxserve.engines.tensorrt import Cuda
from fluxserve.engines.tensorrt_library import Library
from fluxserve.errors import ExportError
from fluxserve_export.fp8 import SOFTMAX_AMAX, scale_of

log = logging.getLogger(__name__)

Shape = tuple[int, ...]
Progress = Callable[[str, int, int], None]
"""Called with a phase's name, the steps of it that are done, and how many it has; from another thread."""

_SOFTMAX_SCALE = scale_of(SOFTMAX_AMAX)

_INTERRUPTIBLE_S = 0.5
"""How long an interrupt may go unnoticed at worst."""


@dataclass(frozen=True)
class BuildReport:
    """What was built. Layers are those of the parsed network, before TensorRT fuses them."""

    seconds: float
    bytes: int
    layers: int
    matmuls: int
    fp8_matmuls: int
    """Matrix products whose two factors are dequantised from E4M3: those that the tensor cores compute in FP8."""
    attentions: int
    fp8_attentions: int


def _silent(phase: str, step: int, steps: int) -> None:
    """Report nothing."""


def build(
    library: Library,
    onnx_file: Path,
    shapes: Mapping[str, tuple[Shape, Shape, Shape]],
    target: Path,
    *,
    architecture: str,
    fp8_attentions: int = 0,
    progress: Progress = _silent,
) -> BuildReport:
    """Build an engine and write it to `target`, which appears whole or not at all.

    Args:
        shapes: least, typical and largest shape of every input with a dimension that varies; others may be left out.
        architecture: "sm89". TensorRT builds only for the GPU that is here.
        fp8_attentions: how many Attention nodes of the file are quantised; each of them must become one fused kernel.

    Raises:
        ExportError: the file can't be parsed, an FP8 attention is not one, or the library can't build it.
        LibraryRefused: there is no GPU, and TensorRT needs one.
    """
    start = time.monotonic()
    library.listen()
    builder = library.builder()
    config = _config(library, builder, architecture)
    network = library.strongly_typed_network(builder)
    parser = library.module.OnnxParser(network, library.logger)
    _parse(library, parser, onnx_file)
    graph = _Graph(library, network)
    kept_alive = _fuse_fp8_attentions(graph, fp8_attentions, onnx_file)
    _add_profile(library, builder, network, config, shapes)
    plan = _build(library, builder, network, config, progress, f"{onnx_file} for {architecture}", fp8_attentions)
    del kept_alive  # the library reads constants out of our memory until here
    size = _write(plan, target)
    return BuildReport(
        seconds=time.monotonic() - start,
        bytes=size,
        layers=network.num_layers,
        matmuls=len(graph.of_type("MATRIX_MULTIPLY")),
        fp8_matmuls=sum(graph.is_fp8_matmul(layer) for layer in graph.of_type("MATRIX_MULTIPLY")),
        attentions=len(graph.of_type("ATTENTION_INPUT")),
        fp8_attentions=fp8_attentions,
    )


def _config(library: Library, builder: Any, architecture: str) -> Any:
    module, config = library.module, builder.create_builder_config()
    _set_architecture(library, config, architecture)
    config.clear_flag(module.BuilderFlag.TF32)  # which float32 would be rounded to by default
    config.max_aux_streams = 0  # one stream, as a CUDA graph is captured
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    if library.has("BuilderFlag", "REQUIRE_USER_ALLOCATION"):  # or else some shapes can't be captured
        config.set_flag(module.BuilderFlag.REQUIRE_USER_ALLOCATION)
    return config


def check_architecture(library: Library, architecture: str) -> None:
    """Raise ExportError if the library can't build for this architecture on this machine."""
    if not library.is_rtx:
        here = Cuda("cuda").architecture
        if architecture != here:
            raise ExportError(f"architecture: got {architecture}; {library} builds for the GPU that is here, {here}")
        return
    known = library.module.ComputeCapability
    if not hasattr(known, architecture.upper()):
        names = sorted(name.lower() for name in dir(known) if name.startswith("SM"))
        raise ExportError(f"architecture: got {architecture}; {library} builds for {', '.join(names)}")


def _set_architecture(library: Library, config: Any, architecture: str) -> None:
    check_architecture(library, architecture)
    if not library.is_rtx:
        return
    config.num_compute_capabilities = 1
    if not config.set_compute_capability(getattr(library.module.ComputeCapability, architecture.upper()), 0):
        raise ExportError(f"architecture: {architecture}: {library}: {library.words()}")


def _parse(library: Library, parser: Any, onnx_file: Path) -> None:
    if parser.parse_from_file(str(onnx_file)):  # by its name, so that weights beside it are found
        return
    errors = (parser.get_error(index) for index in range(parser.num_errors))
    told = "; ".join(f"node {e.node_name()!r} ({e.node_operator()}): {e.desc()}" for e in errors)
    raise ExportError(f"{onnx_file}: {library} can't parse it: {told or library.words()}")


def _add_profile(
    library: Library, builder: Any, network: Any, config: Any, shapes: Mapping[str, tuple[Shape, Shape, Shape]]
) -> None:
    inputs = (network.get_input(index) for index in range(network.num_inputs))
    dynamic = [tensor for tensor in inputs if -1 in tuple(tensor.shape)]
    if not dynamic:
        return
    profile = builder.create_optimization_profile()
    for tensor in dynamic:
        if tensor.name not in shapes:
            raise ExportError(f"shapes: got {sorted(shapes)}; expected {tensor.name} {tuple(tensor.shape)} among them")
        try:
            profile.set_shape(tensor.name, *shapes[tensor.name])
        except ValueError as error:
            raise ExportError(f"shapes: {tensor.name} {shapes[tensor.name]}: {error}") from error
    if config.add_optimization_profile(profile) < 0:
        given = {tensor.name: shapes[tensor.name] for tensor in dynamic}
        raise ExportError(f"shapes: {library} refuses {given}: {library.words()}")


# --- building -------------------------------------------------------------------------------------------------------


def _build(
    library: Library,
    builder: Any,
    network: Any,
    config: Any,
    progress: Progress,
    what: str,
    fp8_attentions: int,
) -> Any:
    """The serialized engine. An interrupt, or an error of `progress`, ends the build at its next step."""
    monitor = _monitor(library, progress)
    config.progress_monitor = monitor
    library.listen()
    with ThreadPoolExecutor(max_workers=1) as thread:  # so that this one can be interrupted
        thread.submit(int).result()  # an interrupt while the thread starts would leave the build running, unwaited for
        try:
            building = thread.submit(builder.build_serialized_network, network, config)
            while not wait([building], timeout=_INTERRUPTIBLE_S).done:
                pass  # a signal that comes just before the waiting begins is only seen when it ends
            plan = building.result()
        except BaseException:
            monitor.cancel()
            raise
    if monitor.error is not None:
        raise monitor.error
    if plan is None:
        hint = ""
        if fp8_attentions:
            hint = (
                " (it has FP8 attention, which must fuse: sequences of 32 or more, nothing between it and its inputs)"
            )
        raise ExportError(f"{what}: {library} can't build it{hint}: {library.words()}")
    return plan


def _monitor(library: Library, progress: Progress) -> Any:
    """An IProgressMonitor that can end the build."""
    base: Any = library.module.IProgressMonitor

    class Monitor(base):  # type: ignore[misc]
        def __init__(self) -> None:
            base.__init__(self)
            self.error: Exception | None = None
            self._steps: dict[str, int] = {}
            self._cancelled = threading.Event()

        def cancel(self) -> None:
            self._cancelled.set()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:  # noqa: ARG002
            self._steps[phase_name] = num_steps
            self._tell(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._tell(phase_name, step + 1)
            return not self._cancelled.is_set()

        def phase_finish(self, phase_name: str) -> None:
            self._tell(phase_name, self._steps[phase_name])

        def _tell(self, phase_name: str, done: int) -> None:
            try:
                progress(phase_name, done, self._steps[phase_name])
            except Exception as error:  # noqa: BLE001 (it must not cross the library's frames; raised after the build)
                self.error = error
                self.cancel()

    return Monitor()


def _write(plan: Any, target: Path) -> int:
    """Write under another name and rename; returns the bytes."""
    partial = target.with_name(f"{target.name}.part")
    try:
        with partial.open("wb") as file:
            size = file.write(plan)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return size


# --- the parsed network ---------------------------------------------------------------------------------------------


class _Graph:
    """A parsed network, and which layer each tensor comes from."""

    def __init__(self, library: Library, network: Any) -> None:
        self.library, self.network = library, network
        self.layers = [network.get_layer(index) for index in range(network.num_layers)]
        self._producers = {t.name: layer for layer in self.layers for t in _outputs(layer)}

    def of_type(self, name: str) -> list[Any]:
        """Layers of a LayerType; none where this version does not know the type."""
        kind = getattr(self.library.module.LayerType, name, None)
        return [layer for layer in self.layers if kind is not None and layer.type == kind]

    def producer(self, tensor: Any) -> Any | None:
        """The layer that a tensor comes from; None for an input of the network."""
        return self._producers.get(tensor.name)

    def type_of(self, layer: Any | None) -> str:
        return "INPUT" if layer is None else str(layer.type.name)

    def is_fp8(self, tensor: Any) -> bool:
        """Whether it is dequantised from E4M3."""
        layer = self.producer(tensor)
        return layer is not None and self.type_of(layer) == "DEQUANTIZE" and layer.get_input(0).dtype.name == "FP8"

    def is_fp8_matmul(self, layer: Any) -> bool:
        return all(self.is_fp8(self._before_shuffle(layer.get_input(index))) for index in (0, 1))

    def _before_shuffle(self, tensor: Any) -> Any:
        """The parser's broadcast of a weight moves nothing."""
        layer = self.producer(tensor)
        return layer.get_input(0) if layer is not None and self.type_of(layer) == "SHUFFLE" else tensor

    def unscaled(self, tensor: Any) -> Any:
        """The tensor that the parser multiplied by a constant 1 to get this one; itself, if it did not."""
        layer = self.producer(tensor)
        if layer is None or self.type_of(layer) != "ELEMENTWISE":
            return tensor
        layer.__class__ = self.library.module.IElementWiseLayer
        product = layer.op == self.library.module.ElementWiseOperation.PROD
        factor = self._constant(layer.get_input(1)) if product else None
        return layer.get_input(0) if factor is not None and bool(np.all(factor == 1)) else tensor

    def _constant(self, tensor: Any) -> Any | None:
        """The values of a constant, cast or not."""
        layer = self.producer(tensor)
        if layer is not None and self.type_of(layer) == "CAST":
            layer = self.producer(layer.get_input(0))
        if layer is None or self.type_of(layer) != "CONSTANT":
            return None
        layer.__class__ = self.library.module.IConstantLayer
        return np.asarray(layer.weights, dtype=np.float32)


def _outputs(layer: Any) -> Iterator[Any]:
    for index in range(layer.num_outputs):
        if (tensor := layer.get_output(index)) is not None:
            yield tensor


def _fuse_fp8_attentions(graph: _Graph, expected: int, onnx_file: Path) -> Sequence[Any]:
    """Make one kernel of every attention whose q, k and v are FP8.

    Returns:
        memory of constants, which must live until the network is built.

    Raises:
        ExportError: there are not as many as expected.
    """
    library = graph.library
    if expected and not library.has("IAttention", "normalization_quantize_scale"):
        raise ExportError(f"{onnx_file}: got {library}, which has no FP8 attention; expected 10.16 or newer")
    found, others = [], []
    for layer in graph.of_type("ATTENTION_INPUT"):
        layer.__class__ = library.module.IAttentionInputLayer
        attention = layer.attention
        inputs = [graph.unscaled(attention.get_input(index)) for index in range(3)]
        if all(map(graph.is_fp8, inputs)):
            found.append((attention, inputs))
        else:
            others.append(f"{attention.name} (from {', '.join(graph.type_of(graph.producer(t)) for t in inputs)})")
    if len(found) != expected:
        raise ExportError(
            f"{onnx_file}: {len(found)} attentions have their q, k and v from DequantizeLinear of E4M3; expected"
            f" {expected}. Not among them: {', '.join(others) or 'none'}"
        )
    return [_fuse(graph, attention, inputs) for attention, inputs in found]


def _fuse(graph: _Graph, attention: Any, inputs: Sequence[Any]) -> Any:
    """Set what the FP8 kernel wants; the result is the memory of the scale, which the network refers to."""
    module = graph.library.module
    for index, tensor in enumerate(inputs):
        attention.set_input(index, tensor)
    scale = np.array(_SOFTMAX_SCALE, dtype=np.float32)
    attention.normalization_quantize_scale = graph.network.add_constant((), module.Weights(scale)).get_output(0)
    attention.normalization_quantize_to_type = module.DataType.FP8
    attention.decomposable = False
    return scale
