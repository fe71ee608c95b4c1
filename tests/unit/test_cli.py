"""The ways to start the program from a shell."""

import subprocess
import sys
from pathlib import Path

import pytest

from fluxserve import __version__

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("module", ["fluxserve", "fluxserve.cli"])
def test_a_module_is_the_program(module: str) -> None:
    def started(argument: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", module, argument]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    assert started("--version").stdout.strip() == __version__
    refused = started("paint")
    assert refused.returncode == 2 and "invalid choice: 'paint'" in refused.stderr
