"""Programs that tests run beside the server: nginx, curl, openssl."""

import os
import shutil

import pytest


def needed(name: str) -> str:
    """Return the path of a program. Where it is missing, the test is skipped, but fails under CI=true."""
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin")
    if path is None and os.environ.get("CI") == "true":
        pytest.fail(f"{name} is not installed, and CI runs every test: scripts/system-packages.sh names it")
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path
