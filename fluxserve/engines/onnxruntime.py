"""ONNX Runtime on the CPU: runs an exported ONNX file, and so is the check of every export.

FP8 here is simulated: quantised values are exact, products are computed in float32. ONNX Runtime's fusions for integer
Q/DQ take FP8 pairs for theirs and fail (1.31: MatMulIntegerToFloat of float8), so those, and no others, are off.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fluxserve.engine import FLOATING, Components, Shapes, Signature, TensorSpec
from fluxserve.errors import ArtifactError, ArtifactUnsuited, LibraryMissing, LibraryRefused
from fluxserve.folders.artifact import ANYWHERE, Artifact, Component
from fluxserve.folders.files import in_ascii

try:
    import onnxruntime as ort
except ImportError as error:
    raise LibraryMissing("onnxruntime", "onnxruntime") from error

_NUMPY_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.int64: "int64"}


class OrtEngine:
    """One session; every bound has its own tensors."""

    def __init__(self, signature: Signature, file: str, compute_dtype: str) -> None:
        self.signature, self._dtype = signature, getattr(torch, compute_dtype)
        self._session: ort.InferenceSession | None = open_session(file)

    def bind(self, shapes: Shapes) -> "OrtBound":
        assert self._session is not None, "bind after close"
        sizes = self.signature.resolve(shapes)

        def allocate(tensors: tuple[TensorSpec, ...]) -> dict[str, Tensor]:
            return {t.name: torch.zeros(sizes[t.name], dtype=self._dtype_of(t)) for t in tensors}

        return OrtBound(self._session, allocate(self.signature.inputs), allocate(self.signature.outputs))

    def close(self) -> None:
        self._session = None

    def _dtype_of(self, tensor: TensorSpec) -> torch.dtype:
        dtype: torch.dtype = self._dtype if tensor.dtype == FLOATING else getattr(torch, tensor.dtype)
        return dtype


class OrtBound:
    """A session that reads and writes torch's own memory."""

    def __init__(
        self, session: "ort.InferenceSession", inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> None:
        self.inputs, self.outputs, self._session = inputs, outputs, session
        self._binding = session.io_binding()
        known = {i.name for i in session.get_inputs()}  # a model without guidance has no such input
        for name, tensor in inputs.items():
            if name in known:
                self._binding.bind_input(name, "cpu", 0, _name(tensor), tuple(tensor.shape), tensor.data_ptr())
        for name, tensor in outputs.items():
            self._binding.bind_output(name, "cpu", 0, _name(tensor), tuple(tensor.shape), tensor.data_ptr())

    def run(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # the library's errors share no class but this
            raise LibraryRefused(f"onnxruntime: {error}") from error


def _name(tensor: Tensor) -> str:
    return _NUMPY_NAMES[tensor.dtype]


def check_artifact(artifact: Artifact, device: str) -> None:
    """Check the device and what each component computes in; see engines.open."""
    if device != "cpu":
        raise ArtifactUnsuited(f"{artifact.path}: onnxruntime runs it on the CPU; got the device {device}")
    for name in artifact.spec.components:
        _signature(artifact, artifact.component(name))


def open_artifact(artifact: Artifact, device: str) -> Components:
    """Load all five components; see engines.open.open_artifact."""
    check_artifact(artifact, device)

    def load(name: str) -> OrtEngine:
        component = artifact.component(name)
        artifact.folder(name)  # the file and its data, hashed before they are read
        file = artifact.path / component.engines[ANYWHERE]
        return OrtEngine(_signature(artifact, component), str(file), component.compute_dtype)

    return Components({name: load(name) for name in artifact.spec.components})


def _signature(artifact: Artifact, component: Component) -> Signature:
    if component.compute_dtype not in ("float32", "float16"):
        raise ArtifactError(
            f"{artifact.path}: {component.name} computes in {component.compute_dtype};"
            " ONNX Runtime's CPU provider has float32 and float16"
        )
    return component.signature(artifact.spec)


def open_session(file: str) -> "ort.InferenceSession":
    """A file on the CPU provider, as this engine runs it. Raises LibraryRefused with the library's words."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # as settings.let_threads_sleep does
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        with in_ascii(Path(file).parent) as folder:
            return ort.InferenceSession(str(folder / Path(file).name), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library's errors share no class but this
        raise LibraryRefused(f"onnxruntime: {file}: {error}") from error
