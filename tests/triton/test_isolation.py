"""A server that is cut off: no network but loopback, an empty home, and what is there afterwards."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.triton.conftest import ROOT

pytestmark = pytest.mark.xdist_group("lifecycle")

UNSHARE = ["unshare", "--user", "--map-root-user", "--net"]
LOOPBACK_ALONE = """
import fcntl, runpy, socket, struct, sys
with socket.socket() as s:  # SIOCSIFFLAGS: up, running
    fcntl.ioctl(s, 0x8914, struct.pack("16sH14x", b"lo", 0x41))
names = [name for _, name in socket.if_nameindex()]
assert names == ["lo"], names
sys.argv = ["fluxserve", *sys.argv[1:]]
runpy.run_module("fluxserve", run_name="__main__")
"""


def can_unshare() -> bool:
    return (
        bool(shutil.which(UNSHARE[0]))
        and subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode == 0
    )


@pytest.mark.skipif(not can_unshare(), reason="this kernel gives no network namespace to a user")
def test_a_demo_needs_no_network_and_writes_nothing(tmp_path: Path) -> None:
    home, here, picture = tmp_path / "home", tmp_path / "here", tmp_path / "apple.png"
    home.mkdir()
    here.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("XDG_", "HF_", "FLUXSERVE_"))}
    environment |= {"HOME": str(home), "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), *sys.path]))}
    command = [*UNSHARE, sys.executable, "-c", LOOPBACK_ALONE, "demo", "a red apple", "-o", str(picture)]
    run = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert picture.stat().st_size > 1000
    assert list(home.rglob("*")) == []
    assert list(here.rglob("*")) == []
