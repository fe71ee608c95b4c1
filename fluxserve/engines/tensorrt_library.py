"""The one import point for TensorRT (10.13 to 11.x) and TensorRT-RTX (1.x), and what differs between them.

Both have the same API but for what has come and gone between versions: ask `Library.has` before using a name that is
not in all of them. Both keep the first logger of a process and ignore every later one, so a library has one logger.
"""

import importlib
import logging
from collections import deque
from dataclasses import dataclass
from functools import cache
from typing import Any

from fluxserve.errors import LibraryMissing, LibraryRefused

log = logging.getLogger(__name__)

TENSORRT = "tensorrt"
TENSORRT_RTX = "tensorrt-rtx"

_MODULES = {TENSORRT: "tensorrt", TENSORRT_RTX: "tensorrt_rtx"}
_MESSAGES_KEPT = 32
_ERRORS = ("INTERNAL_ERROR", "ERROR")


@dataclass(frozen=True)
class Library:
    """An imported library: its module, which of the two it is, and its version ("10.13.3.9")."""

    module: Any
    flavour: str
    version: str
    logger: Any

    @property
    def is_rtx(self) -> bool:
        return self.flavour == TENSORRT_RTX

    @property
    def release(self) -> str:
        """What a plan is bound to: "10.13" of "10.13.3.9"."""
        return release(self.version)

    def __str__(self) -> str:
        return f"{self.flavour} {self.version}"

    def has(self, name: str, member: str = "") -> bool:
        """Whether this version has a class, and, if asked for, a member of it."""
        found = getattr(self.module, name, None)
        return found is not None and (not member or hasattr(found, member))

    def listen(self) -> None:
        """Forget what the library has said so far: it is about something else."""
        self.logger.said.clear()

    def words(self) -> str:
        """What the library has said since `listen`: its errors, or else its warnings."""
        said = list(self.logger.said)
        errors = [text for severity, text in said if severity in _ERRORS]
        return "; ".join(dict.fromkeys(errors or (text for _, text in said))) or "it gave no reason"

    def builder(self) -> Any:
        return self.module.Builder(self.logger)

    def runtime(self) -> Any:
        return self.module.Runtime(self.logger)

    def strongly_typed_network(self, builder: Any) -> Any:
        """An empty network whose tensors keep the types they are given; 11.x knows no other and ignores the flag."""
        return builder.create_network(1 << int(self.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))


def release(version: str) -> str:
    """Major and minor of a version."""
    return ".".join(version.split(".")[:2])


def load(flavour: str) -> Library:
    """Import a library.

    Args:
        flavour: TENSORRT or TENSORRT_RTX, which are the names of their engines.

    Raises:
        LibraryMissing: it is not installed.
        LibraryRefused: it is, but can't be imported (no libcuda, a broken installation).
    """
    name = _MODULES[flavour]
    try:
        module = importlib.import_module(name)
    except Exception as error:  # a broken installation raises whatever its loader does
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            if flavour == TENSORRT_RTX:
                raise LibraryMissing(name, extra=TENSORRT_RTX) from error
            raise LibraryMissing(
                name, comes_with="its Python bindings, in the version of the container's libnvinfer: docker/README.md"
            ) from error
        raise LibraryRefused(f"{name}: installed, but its import failed: {error}") from error
    return _of(module, flavour)


@cache
def _of(module: Any, flavour: str) -> Library:
    return Library(module, flavour, str(module.__version__), _logger(module))


def _logger(module: Any) -> Any:
    """An ILogger that passes messages on to `logging` and keeps the last errors and warnings for `Library.words`."""

    class Collector(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.said: deque[tuple[str, str]] = deque(maxlen=_MESSAGES_KEPT)

        def log(self, severity: Any, message: str) -> None:
            name = str(severity.name)  # called from threads of the library: nothing here may raise
            if name in _ERRORS or name == "WARNING":
                self.said.append((name, message.strip()))
                log.warning("%s: %s: %s", module.__name__, name.lower(), message)
            elif name == "INFO":
                log.debug("%s: %s", module.__name__, message)

    return Collector()
