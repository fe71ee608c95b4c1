"""The name of an engine → the engine, imported only now. Nothing falls back: a name that can't be opened raises."""

from importlib import import_module

from fluxserve.engine import Components
from fluxserve.errors import EngineError, UnknownEngine
from fluxserve.folders.artifact import Artifact
from fluxserve.folders.checkpoint import Checkpoint

WEIGHTS = {"torch_eager": "fluxserve.engines.torch_eager", "fused": "fluxserve.engines.fused.open"}
"""Engines that run a checkpoint's weights."""

ARTIFACTS = {
    "onnxruntime": "fluxserve.engines.onnxruntime",
    "tensorrt": "fluxserve.engines.tensorrt",
    "tensorrt-rtx": "fluxserve.engines.tensorrt",
    "fused": "fluxserve.engines.fused.open",
}
"""Engines that run an artifact, which says which."""

ENGINES = {**WEIGHTS, **ARTIFACTS}
DEFAULT = "torch_eager"
CPU_ONLY = ("onnxruntime",)
COMPILING = ("fused",)
"""Engines that compile kernels where they run: with a C compiler, and a cache whose files may be executed."""


def needs_artifact(name: str) -> bool:
    """Raises UnknownEngine, which lists the valid names."""
    if name not in ENGINES:
        raise UnknownEngine(name, ENGINES)
    return name not in WEIGHTS


def dtype_on(device: str, dtype: str) -> str:
    """The dtype that a checkpoint is loaded in, where the settings leave it to the device (`auto`)."""
    if dtype != "auto":
        return dtype
    return "float32" if device == "cpu" else "bfloat16"


def open_components(name: str, checkpoint: Checkpoint, device: str, dtype: str) -> Components:
    """Load every component of a checkpoint.

    Args:
        name: a key of WEIGHTS.
        device: as torch spells it: "cpu", "cuda:0".
        dtype: "float32", "bfloat16", "float16", or "auto".

    Raises:
        EngineError: a name that is unknown, or of an engine that runs artifacts.
        CheckpointError: the weights do not fit the architecture.
    """
    if needs_artifact(name):
        raise EngineError(f"engine: {name} runs an artifact, not a checkpoint; expected one of {', '.join(WEIGHTS)}")
    components: Components = import_module(WEIGHTS[name]).open_components(checkpoint, device, dtype)
    return components


def check_components(name: str, checkpoint: Checkpoint, device: str, dtype: str) -> None:
    """Raise the error that `open_components` would raise before it reads weights: of library, device or model.

    Raises:
        EngineError, SettingsError, CheckpointError.
    """
    import_module(WEIGHTS[name]).check_components(checkpoint, device, dtype)


def check_artifact(artifact: Artifact, device: str) -> None:
    """Raise the error that `open_artifact` would raise before it reads a plan or weights.

    Raises:
        ArtifactError, EngineError.
    """
    import_module(ARTIFACTS[artifact.engine]).check_artifact(artifact, device)


def open_artifact(artifact: Artifact, device: str) -> Components:
    """Load every component of an artifact with the engine that it was exported for.

    Raises:
        ArtifactError: its files are damaged, or can't work on this device.
        EngineError: the engine's library is missing or refuses.
    """
    components: Components = import_module(ARTIFACTS[artifact.engine]).open_artifact(artifact, device)
    return components
