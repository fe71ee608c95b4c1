"""The only reader of environment variables and of Triton's model parameters.

A parameter in a config.pbtxt (or in `--model-config` overrides) wins over the environment, which wins over the default.
`fluxserve doctor` prints the table.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fluxserve import process
from fluxserve.errors import SettingsError
from fluxserve.families import registry

_PREFIX = "FLUXSERVE_"
_PATHS = ("checkpoint", "artifact", "inflight", "c2pa_certificate", "c2pa_key")
_BOUNDS = (("threads", 0, math.inf), ("max_rows", 1, math.inf), ("max_waiting", 0, 192), ("queue_timeout", 0, 86_400))
_PACKAGE = Path(__file__).resolve().parent


def default_checkpoint() -> Path:
    """checkpoints/tiny of the source tree that this package was installed from."""
    return _PACKAGE.parent / "checkpoints" / "tiny"


@dataclass(frozen=True)
class Settings:
    """Everything that can be set from outside. Field `x` is FLUXSERVE_X in the environment, `x` in a config.pbtxt."""

    checkpoint: str = ""
    """A diffusers-format folder; empty: the tiny model."""
    artifact: str = ""
    """A folder made by `fluxserve export`, served in place of a checkpoint."""
    model: str = ""
    """Which model of the family a checkpoint is, where its shapes can't tell (flux.2-dev-turbo); empty: they can."""
    engine: str = ""
    """Which engine runs the model; empty: the one that an artifact is for, and torch_eager for a checkpoint."""
    dtype: str = "auto"
    """float32, bfloat16, float16; auto: bfloat16 on a GPU, float32 on a CPU."""
    threads: int = 0
    """CPU threads of the GPU worker's process; 0: as many as there are cores."""
    max_rows: int = 1
    """Images that go through the transformer together; 1 keeps an image's bytes the same alone and in a batch."""
    max_waiting: int = 0
    """Requests that may wait for a GPU; 0: as many as are drawn within the queue's timeout, at most 64."""
    queue_timeout: int = 0
    """Seconds that a request may wait for a GPU; 0: what generate/config.pbtxt says, 120 as shipped."""
    cache: str = ""
    """Where compiled kernels and attention plans are kept between starts; empty: ~/.cache/fluxserve."""
    c2pa_certificate: str = ""
    """A PEM file with the certificates that files are signed with; empty: no file is signed."""
    c2pa_key: str = ""
    """A PEM file with the key of the first of them."""
    inflight: str = ""
    """The in-flight table's file; empty: one for each tritonserver process, in shared memory."""

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise SettingsError("dtype", self.dtype, "auto, float32, bfloat16, float16")
        models = [member.name for member in registry.members()]
        if self.model not in ("", *models):
            raise SettingsError("model", self.model, f"{', '.join(models)}; or nothing")
        for name, least, most in _BOUNDS:
            if not least <= getattr(self, name) <= most:
                allowed = f"{least} or more" if most == math.inf else f"{least} to {most:,}"
                raise SettingsError(name, getattr(self, name), allowed)

    @property
    def checkpoint_path(self) -> Path:
        return Path(self.checkpoint) if self.checkpoint else default_checkpoint()

    @property
    def artifact_path(self) -> Path:
        return Path(self.artifact)

    @property
    def inflight_path(self) -> Path:
        """Every model of one server must agree on it: their common parent is the tritonserver process."""
        if self.inflight:
            return Path(self.inflight)
        return Path(f"/dev/shm/{process.prefix(os.getppid())}inflight")  # noqa: S108 (opened with care: serving/inflight.py)


def load(parameters: Mapping[str, Any] | None = None) -> Settings:
    """Read the settings.

    Args:
        parameters: the `parameters` of a Triton model configuration, {name: {"string_value": value}}.

    Raises:
        SettingsError: a value that can't be read or is not allowed; the name says which.
    """
    values: dict[str, Any] = {}
    for field in fields(Settings):
        raw = _raw(field.name, parameters or {})
        if raw is not None:
            values[field.name] = _convert(field.name, raw, field.default)
    return Settings(**values)


def _raw(name: str, parameters: Mapping[str, Any]) -> str | None:
    if name in parameters:
        parameter = parameters[name]
        if not isinstance(parameter, Mapping) or "string_value" not in parameter:
            raise SettingsError(name, parameter, "a parameter with a string_value")
        text = str(parameter["string_value"])
        return os.fsdecode(text.encode(errors="surrogateescape"))  # as this process writes paths, in UTF-8 or in ASCII
    return os.environ.get(_PREFIX + name.upper())


def _convert(name: str, raw: str, default: object) -> object:
    if not isinstance(default, int):
        return raw
    try:
        return int(raw)
    except ValueError as error:
        raise SettingsError(name, raw, "an integer") from error


# OpenMP's threads spin while they wait, by default. On a CPU that has anything else to do, the spinners starve the
# thread that they wait for: twenty steps of the tiny model took 17 to 36 s beside two busy processes on two cores, and
# 0.5 to 0.9 s with waiters that sleep. OpenMP reads this once, when torch is first imported.
_OPENMP = {"OMP_WAIT_POLICY": "passive"}

# A picture of a megapixel passes through a dozen buffers of 3 MB. glibc gives memory of that size back to the kernel
# when it is freed: at once where it was mapped, or when too much is free at a heap's end. So every request touched its
# memory for the first time: thousands of page faults, microseconds each in a virtual machine. With these, what is freed
# stays, and the next request finds it. 32 MiB is the most that every glibc takes; one arena, so that every thread finds
# what another has freed.
_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(128 << 20),
    "MALLOC_ARENA_MAX": "1",
}

# Weights pass through larger buffers on their way to the GPU. PyTorch's pool gives memory back in the pieces that it
# asked for, and a gibibyte of those stayed, each with a little in use. Mapped page by page, what is free is given back.
_CUDA = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


def cache_folder() -> Path:
    """Return the folder of what was compiled; FLUXSERVE_CACHE says it for every process of a server."""
    return Path(os.environ.get(f"{_PREFIX}CACHE") or "~/.cache/fluxserve").expanduser()


def keep_cache_in(folder: str) -> None:
    """Have this process and its children keep what they compile in a folder; an empty one changes nothing."""
    if folder:
        os.environ[f"{_PREFIX}CACHE"] = folder


def let_threads_sleep() -> None:
    """For this process; call it before torch is imported. What the user has set stays."""
    for name, value in _OPENMP.items():
        os.environ.setdefault(name, value)


def silence_grpc() -> None:
    """Keep the log of gRPC's library off standard error; call it before the client is imported."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def as_served() -> None:
    """The same, and this process takes a GPU's memory as a server's does; call it before torch is imported."""
    let_threads_sleep()
    for name, value in _CUDA.items():
        os.environ.setdefault(name, value)


def environment(**values: str) -> dict[str, str]:
    """The process environment with the given settings in it: what a server is started with, in any folder.

    Collectors of traces on this machine are reached without a proxy.
    """
    env = {**_OPENMP, **_MALLOC, **_CUDA, **os.environ, **{_PREFIX + k.upper(): v for k, v in values.items()}}
    for name in (_PREFIX + setting.upper() for setting in _PATHS):
        if name in env and Path(env[name]).exists():
            env[name] = str(Path(env[name]).absolute())
    for name in ("no_proxy", "NO_PROXY"):
        env[name] = ",".join([*filter(None, [env.get(name)]), "localhost", "127.0.0.1", "::1"])
    return env
