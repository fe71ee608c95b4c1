"""A server of one's own that is never started: folders stand for the wheel and the model repository."""

from pathlib import Path

from fluxserve import contract
from fluxserve.supervisor import Ports, TritonServer
from fluxserve.supervisor.installation import Installation


def made(tmp_path: Path, **options: str) -> TritonServer:
    backends = tmp_path / "backends"
    (backends / "python" / "folder").mkdir(parents=True, exist_ok=True)
    (backends / "python" / "libtriton_python.so").touch()
    (tmp_path / "stub").touch()
    for name in contract.MODELS:
        (tmp_path / name / "1").mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "config.pbtxt").write_text("ensemble_scheduling")
        (tmp_path / name / "1" / "model.py").write_text("import fluxserve.serving")
    folders, libpython = (Path("/one"), Path("/two")), Path("/lib/libpython.so")
    installation = Installation(tmp_path / "none", backends, folders, libpython, tmp_path / "stub")
    return TritonServer(tmp_path, Ports(1, 2, 3), installation, options=options)
