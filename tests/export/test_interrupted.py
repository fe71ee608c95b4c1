"""An export that is killed leaves nothing that looks finished, and goes on where it was."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fluxserve.folders import artifact as artifacts
from tests.support.exports import SHAPES, TINY

pytestmark = pytest.mark.xdist_group("export-killed")

ROOT = Path(__file__).parents[2]


def command(out: Path) -> list[str]:
    given = [str(TINY), "--out", str(out), *SHAPES, "--prompts", "2", "--steps", "2"]
    return [sys.executable, "-m", "fluxserve", "export", *given]


def killed_at(out: Path, stage: str) -> None:
    """Run the export until it has said that a stage is finished, then SIGKILL. A slow one says before how far it is."""
    with subprocess.Popen(command(out), cwd=ROOT, stdout=subprocess.PIPE, text=True, bufsize=1) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(f"{stage}:"):
                os.kill(process.pid, signal.SIGKILL)
                return
    pytest.fail(f"it ended without saying that {stage!r} is finished")


def test_a_killed_export_goes_on_where_it_was(tmp_path: Path) -> None:
    out = tmp_path / "tiny"
    killed_at(out, "reference")
    assert not out.exists()
    killed_at(out, "onnx t5")
    assert not out.exists()
    done = subprocess.run(command(out), cwd=ROOT, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    kept = [line.split(":")[0] for line in done.stdout.splitlines() if "kept" in line]
    assert kept == ["onnx clip", "reference", "numerics clip", "onnx t5"]
    assert artifacts.read(out).manifest["verified"][0]["passed"]
    left = [
        p.name for p in (*tmp_path.iterdir(), *(tmp_path / "tiny.work").iterdir()) if p.name.startswith("fluxserve-")
    ]
    assert left == [], "what the killed ones left is gone"
