"""A small file system of its own for a process: a tmpfs in a mount namespace, where the kernel lets any user."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

_MOUNT = 'mount -t tmpfs -o "size=$1" tmpfs "$2" && shift 2 && exec "$@"'


def command(mount: Path, size: int, program: Sequence[str]) -> list[str]:
    """A command line that runs a program with a tmpfs of `size` bytes mounted. Skips the test where it can't be had."""
    if reason := _refusal():
        pytest.skip(f"no mount namespace without privileges: {reason}")
    return _unshared(str(size), str(mount), *program)


def run(mount: Path, size: int, program: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command(mount, size, program), capture_output=True, text=True, timeout=60, check=False)


def free(folder: Path) -> int:
    """Bytes that a file system has left."""
    system = os.statvfs(folder)
    return system.f_bavail * system.f_frsize


def _unshared(*arguments: str) -> list[str]:
    return ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", _MOUNT, "sh", *arguments]


@cache
def _refusal() -> str:
    """Why the kernel forbids it; empty: it does not."""
    if shutil.which("unshare") is None:
        return "unshare is not installed"
    done = subprocess.run(_unshared("4096", "/mnt", "true"), capture_output=True, text=True, check=False)
    return done.stderr.strip() if done.returncode else ""
