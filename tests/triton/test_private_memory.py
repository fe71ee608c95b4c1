"""What a server keeps in /dev/shm and /tmp, seen by another user of the machine."""

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fluxserve.supervisor import TritonServer
from tests.triton.conftest import plain

pytestmark = pytest.mark.xdist_group("triton")

NOBODY = 65534
OPEN = """
import os, sys
os.setgroups([]); os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[1]))
for path in sys.argv[2:]:
    try: os.close(os.open(path, os.O_RDONLY))
    except PermissionError: continue
    print(path)
"""


def files_of(server: TritonServer) -> list[Path]:
    """Every region of Triton's Python backend, the in-flight table, and the server's folder."""
    (prefix,) = {server.table.path.name.removesuffix("inflight")}
    regions = sorted(Path("/dev/shm").glob(f"{prefix}*"))
    assert len(regions) >= 5, "the table, and a region for each of four processes"
    return regions


def test_shared_memory_is_private(server: TritonServer) -> None:
    """Also after it grew: two pictures of 512 x 512 are larger than a region at its start."""
    plain(server, "grpc").draw(
        "a secret", height=512, width=512, num_inference_steps=1, num_images=2, output_format="raw"
    )
    modes = {file.name: oct(stat.S_IMODE(file.stat().st_mode)) for file in files_of(server)}
    assert set(modes.values()) == {"0o600", "0o700"}, modes
    assert server.exposed() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_can_open_nothing(server: TritonServer, tmp_path: Path) -> None:
    readable = Path(tempfile.gettempdir()) / f"fluxserve-test-{os.getpid()}"  # what this user can open: a control
    readable.touch(0o644)
    readable.chmod(0o644)
    try:
        command = [sys.executable, "-I", "-S", "-c", OPEN, str(NOBODY), str(readable)]
        command += map(str, files_of(server))
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    finally:
        readable.unlink()
    assert run.stdout.split() == [str(readable)]
