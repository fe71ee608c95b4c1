"""Which tritonserver: the one in the wheel nvidia-pytriton, or another by the path of its binary."""

import importlib.util
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from fluxserve.errors import ServerError


@dataclass(frozen=True)
class Installation:
    """A tritonserver binary, where its backends are, and what its loader must find.

    libraries: folders with nothing but the server's own. libpython: the file that the stub is linked with, which
    stands among all other libraries of the system.
    """

    binary: Path
    backends: Path | None = None
    libraries: tuple[Path, ...] = ()
    libpython: Path | None = None
    stub: Path | None = None


def installed_at(binary: Path) -> Installation:
    """Another server, by the path of its binary; it brings its backends and libraries itself."""
    if not binary.is_file():
        raise ServerError(f"{binary}: no such file; expected a tritonserver binary")
    return Installation(binary)


def bundled() -> Installation:
    """The server inside the wheel nvidia-pytriton, with the Python stub of the running interpreter.

    Raises:
        ServerError: it is not installed, has no stub for this Python, libpython is missing, or NumPy is too new.
    """
    found = importlib.util.find_spec("pytriton")
    if found is None or found.origin is None:
        raise ServerError("no tritonserver: install the extra 'server' (pip install 'fluxserve[server]') or name one")
    package = Path(found.origin).parent
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = package / "tritonserver" / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        known = ", ".join(sorted(p.name for p in stub.parent.parent.iterdir()))
        raise ServerError(f"the bundled tritonserver has no stub for Python {version}; it has {known}")
    _refuse_new_numpy()
    return Installation(
        binary=package / "tritonserver" / "bin" / "tritonserver",
        backends=package / "tritonserver" / "backends",
        libraries=(package.parent / "nvidia_pytriton.libs",),
        libpython=_libpython(version),
        stub=stub,
    )


def _refuse_new_numpy() -> None:
    import numpy as np

    if int(np.__version__.split(".")[0]) >= 2:
        raise ServerError(
            f"numpy {np.__version__}: the bundled server's stub reads wrong values with it; install numpy<2"
        )


def _libpython(version: str) -> Path:
    """libpython of this interpreter; a statically linked python needs the distribution's package for it."""
    name = f"libpython{version}.so.1.0"
    triplet = sysconfig.get_config_var("MULTIARCH") or ""
    folders = [
        Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib"),
        Path("/usr/lib") / triplet,
        Path("/usr/local/lib"),
    ]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise ServerError(f"{name} not found; on Debian and Ubuntu it comes with the package libpython{version}")
