"""Which tritonserver is started: the wheel's, with the libpython and the stub of this Python."""

import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from fluxserve.errors import ServerError
from fluxserve.supervisor import installation
from fluxserve.supervisor.installation import bundled

VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"
LIBRARY = f"libpython{VERSION}.so.1.0"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The layout of nvidia-pytriton as far as `bundled` looks at it."""
    stub = tmp_path / "pytriton" / "tritonserver" / "python_backend_stubs" / VERSION / "triton_python_backend_stub"
    stub.parent.mkdir(parents=True)
    stub.touch()
    (tmp_path / "pytriton" / "__init__.py").touch()
    (tmp_path / LIBRARY).touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pytriton", raising=False)
    monkeypatch.setattr(np, "__version__", "1.26.4")
    settle(monkeypatch, LIBDIR=str(tmp_path))
    return tmp_path / "pytriton"


def settle(monkeypatch: pytest.MonkeyPatch, **variables: str | None) -> None:
    real = sysconfig.get_config_var
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: variables[name] if name in variables else real(name))


def test_bundled(wheel: Path) -> None:
    found = bundled()
    assert found.binary == wheel / "tritonserver" / "bin" / "tritonserver"
    assert found.backends == wheel / "tritonserver" / "backends"
    assert found.libraries == (wheel.parent / "nvidia_pytriton.libs",)
    assert found.libpython == wheel.parent / LIBRARY
    assert found.stub is not None and found.stub.is_file()


@pytest.mark.parametrize("version", ["2.0.0", "2.4.1", "10.0"])
def test_a_newer_numpy_is_refused(wheel: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(np, "__version__", version)
    with pytest.raises(ServerError, match=f"numpy {version}: .* install numpy<2"):
        bundled()


def test_no_stub_for_this_python(wheel: Path) -> None:
    stubs = wheel / "tritonserver" / "python_backend_stubs"
    (stubs / VERSION).rename(stubs / "3.7")
    with pytest.raises(ServerError, match=f"no stub for Python {VERSION}; it has 3.7"):
        bundled()


def test_no_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ServerError, match=r"pip install 'fluxserve\[server\]'"):
        bundled()


def test_no_libpython(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for libdir in (str(tmp_path), None):
        settle(monkeypatch, LIBDIR=libdir, MULTIARCH=None)
        with pytest.raises(ServerError, match=r"libpython2\.0\.so\.1\.0 not found; .* package libpython2\.0"):
            installation._libpython("2.0")
    (tmp_path / "libpython2.0.so.1.0").touch()
    settle(monkeypatch, LIBDIR=str(tmp_path), MULTIARCH=None)
    assert installation._libpython("2.0") == tmp_path / "libpython2.0.so.1.0"
