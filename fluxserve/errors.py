"""The tree of errors. Every error names what it got and what it expected.

FluxserveError
├── InvalidRequest         the caller's input; names the field              → INVALID_ARG
├── Refused                the request is fine, this server can't take it
│   ├── QueueFull                                                           → UNAVAILABLE
│   ├── ImagesFull                                                          → UNAVAILABLE
│   ├── NoRoom             in shared memory, for the answer                 → UNAVAILABLE
│   ├── Draining                                                            → UNAVAILABLE
│   └── RequestIdInUse                                                      → ALREADY_EXISTS
├── Cancelled              the caller asked for it                          → CANCELLED
├── CheckpointError        a folder of weights that can't be served
│   ├── UnsafeWeights      pickled weights where safetensors are required
│   └── UnsupportedArchitecture
├── ArtifactError          an exported folder that can't be served
│   ├── ArtifactDamaged    a file that is not the one that was exported
│   └── ArtifactUnsuited   made for another device, GPU architecture or library version
├── ExportError            a checkpoint that can't be exported as it was asked
├── EngineError
│   ├── UnknownEngine
│   ├── LibraryMissing     the engine's library is not installed
│   ├── LibraryRefused     TensorRT or ONNX Runtime said no, in its own words
│   ├── DeviceUnsuited     an engine that has no kernels for the device there is
│   ├── OutOfMemory        the device has no room for weights or activations
│   ├── NotFinite          a picture of NaN or infinity: weights or precision are at fault
│   └── ShapeError         a tensor outside an engine's signature
├── SettingsError          an environment variable or a Triton parameter
├── SigningFailed          a file can't be signed, and is not sent without
├── DecoderLost            the process that decodes images ended at one of them
└── ServerError            tritonserver could not be started, reached or stopped

`serving/errors.py` maps the tree onto Triton's status codes, once, at the border.
"""

from collections.abc import Iterable
from pathlib import Path


class FluxserveError(Exception):
    """Root of everything fluxserve raises on purpose."""


class InvalidRequest(FluxserveError):
    """A field of a request is not acceptable.

    Args:
        field: the contract's name of the input.
        got: what came, already fit to print.
        allowed: what would have been accepted.
    """

    def __init__(self, field: str, got: str, allowed: str) -> None:
        super().__init__(f"{field}: got {got}; allowed: {allowed}")
        self.field, self.got, self.allowed = field, got, allowed


class Refused(FluxserveError):
    """The server can't take this request now."""


class QueueFull(Refused):
    """No more requests may wait.

    Args:
        wait_s: how long one more would wait, in seconds; 0 if that is not known.
    """

    def __init__(self, waiting: int, allowed: int, wait_s: float = 0.0) -> None:
        wait = f". The wait would be about {wait_s:.0f} s" if wait_s else ""
        super().__init__(f"queue: {waiting} requests are waiting; at most {allowed} may{wait}. Try again later")


class ImagesFull(Refused):
    def __init__(self, waiting: int, size: int) -> None:
        waits = f"{waiting} requests with images, of {size} bytes, are waiting to be decoded"
        super().__init__(f"images: {waits}; no more may. Try again later")


class NoRoom(Refused):
    def __init__(self, size: int, room: int) -> None:
        ask = "Ask for fewer or smaller images, or give the server a larger /dev/shm (docker run --shm-size)"
        super().__init__(f"answer: it has {size} bytes, and shared memory has room for {room}. {ask}")


class Draining(Refused):
    def __init__(self) -> None:
        super().__init__("server: it is shutting down and takes no new requests")


class RequestIdInUse(Refused):
    def __init__(self, request_id: str, state: str) -> None:
        super().__init__(f"request_id: {request_id!r} is in use by a {state} request; ids must be unique in flight")


class Cancelled(FluxserveError):
    def __init__(self, request_id: str, step: int, steps: int) -> None:
        super().__init__(f"request {request_id!r} was cancelled at step {step} of {steps}")


class CheckpointError(FluxserveError):
    """A checkpoint folder is missing, incomplete or damaged."""


class UnsafeWeights(CheckpointError):
    def __init__(self, path: str) -> None:
        super().__init__(f"{path}: pickled weights are never loaded; expected .safetensors files")


class UnsupportedArchitecture(CheckpointError):
    def __init__(self, where: str, got: object, expected: str) -> None:
        super().__init__(f"{where}: got {got!r}; expected {expected}")


class ArtifactError(FluxserveError):
    """An artifact is missing, says what can't be, or can't work on this machine."""


class ArtifactDamaged(ArtifactError):
    def __init__(self, file: Path, got: str) -> None:
        super().__init__(f"{file}: {got}. It is not the file that was exported: export again, or copy it again")


class ArtifactUnsuited(ArtifactError):
    """An artifact was made for another device, GPU architecture or library version than there is here."""


class ExportError(FluxserveError):
    """A checkpoint can't be exported as it was asked."""


class EngineError(FluxserveError):
    """An engine can't be opened, bound or run."""


class UnknownEngine(EngineError):
    def __init__(self, got: str, known: Iterable[str]) -> None:
        super().__init__(f"engine: got {got!r}; known engines: {', '.join(sorted(known))}")


class LibraryMissing(EngineError):
    """An engine's library is not installed: an extra brings it, or, where none does, what `comes_with` says."""

    def __init__(self, library: str, extra: str = "", comes_with: str = "") -> None:
        expected = comes_with or f"the extra {extra!r} (pip install 'fluxserve[{extra}]')"
        super().__init__(f"{library}: not installed; expected {expected}")


class LibraryRefused(EngineError):
    """An engine's own library refused; the message has its words."""


class DeviceUnsuited(EngineError):
    def __init__(self, engine: str, got: str, expected: str) -> None:
        super().__init__(f"{engine}: got {got}; expected {expected}")


class OutOfMemory(EngineError):
    """A device has no room for what an engine needs."""

    def __init__(self, what: str, needed: str, allowed: str) -> None:
        super().__init__(f"{what}: needs {needed} of the device's memory; allowed: {allowed}")


class NotFinite(EngineError):
    """A picture came out as NaN or infinity, which a file would show as black."""

    def __init__(self) -> None:
        super().__init__(
            "picture: got NaN or infinity; expected finite numbers. The weights or the engine's precision are at fault,"
            " not the request: `fluxserve doctor` checks the weights"
        )


class ShapeError(EngineError):
    """A tensor's shape lies outside the engine's signature."""


class SettingsError(FluxserveError):
    def __init__(self, name: str, got: object, allowed: str) -> None:
        super().__init__(f"{name}: got {got!r}; allowed: {allowed}")


class SigningFailed(FluxserveError):
    """C2PA's library refused to sign a file; the message has its words."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"signature: {reason}. The picture was drawn and is not sent without one")


class DecoderLost(FluxserveError):
    def __init__(self, size: int, status: int) -> None:
        super().__init__(f"image: the process that decodes ended with status {status} at a file of {size} bytes")


class ServerError(FluxserveError):
    """tritonserver could not be found, started, reached or stopped."""
